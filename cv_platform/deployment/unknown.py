"""Fits the rule by which a served model says that an image shows none of what it has learned.

Prototypes are the classes' mean features on training images; the limits are fixed on held-out images, so that the
stated rate of known images exceeds them, and no more. What the rule finds is measured on images of known kinds
(`unknown_rates`), but for a class that was left out: the features have learned all classes, and leaving out one's
prototype alone would flatter the rule. `python -m benchmarks unknown` trains without the class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cv_platform.datasets.packing import PackedSplit
from cv_platform.evaluation.intervals import wilson
from cv_platform.images import resize
from cv_platform.images.corruptions import corruptions
from cv_platform.predictions import known_labels, one_hot
from cv_platform.records import UnknownKind, UnknownRate
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.model.unknown import UnknownRule, measure_unknown

RATE = 0.01
"""Of known images that count as unknown."""
_MOST = 2000
_RATED, _FAR = 200, 100
_BATCH = 64
_ONE_SD = 0.84
"""Quantile one standard deviation above the median, where a measure is normal."""
_FEWEST = 40
"""Held-out images below which a rate of 1 % is out of reach."""


def unknown_rule(model: LoadedModel, keras_path: Path, train: PackedSplit, valid: PackedSplit) -> UnknownRule | None:
    """Returns the rule of an exported model, by at most 2,000 images of each split; None where there can be none.

    Args:
        model: the export, whose features are those that are served.
        keras_path: the same model, for the weights of its output layer.
        train: the images that it has learned.
        valid: held-out images.
    """
    import keras

    network: Any = keras.models.load_model(keras_path, compile=False)
    head = next(layer for layer in reversed(network.layers) if isinstance(layer, keras.layers.Dense))
    weights = head.get_weights()
    if len(weights) != 2 or weights[0].shape != (model.metadata.feature_dims, len(model.metadata.class_names)):
        return None
    (learned, labels), (held_out, _) = (_features(model, split) for split in (train, valid))
    classes = len(model.metadata.class_names)
    told = told_rows(labels, classes)
    return fit_unknown(
        learned[told],
        one_hot(labels[told], classes),
        held_out,
        kernel=weights[0],
        bias=weights[1],
        is_joint=model.metadata.classifier_type == "multi-label",
    )


def told_rows(targets: np.ndarray, classes: int) -> np.ndarray:
    """Returns `(N,)` bool: images of which it is known what they show, or that they show none of the classes.

    Of several labels, an image without any known one may yet have one that nobody has looked for.
    """
    return one_hot(targets, classes).any(axis=1) | known_labels(targets, classes).all(axis=1)


def unknown_rates(model: LoadedModel, test: PackedSplit) -> tuple[UnknownRate, ...]:
    """Returns which share of images counts as unknown, by kind: known ones, corrupted ones, what shows other things.

    What is far comes with scikit-learn: handwritten digits (far from all but digits), and cuttings of two photographs,
    of a temple and of a flower.

    Args:
        model: with a rule, else there are no rates.
        test: images that neither training nor the rule has seen; at most 200, a seeded choice.
    """
    if model.unknown is None or not len(test.paths):
        return ()
    rows = np.sort(np.random.default_rng(0).permutation(len(test.paths))[:_RATED])
    images, size = np.asarray(test.images[rows]), model.metadata.image_size
    kinds: list[tuple[UnknownKind, str, np.ndarray]] = [("known", "test images", images)]
    for name, strength, corrupt in corruptions(size[0]):
        rng = np.random.default_rng(0)
        kinds.append(("corrupted", f"{name} {strength}", np.stack([corrupt(image, rng) for image in images])))
    for what, found in far_images(size).items():
        kinds.append(("far", what, found))
    rates = []
    for kind, what, shown in kinds:
        count = int((score_unknown(model, shown) > 1).sum())
        low, high = wilson(count, len(shown)) or (0.0, 1.0)
        rates.append(UnknownRate(kind=kind, what=what, images=len(shown), rate=count / len(shown), low=low, high=high))
    return tuple(rates)


def score_unknown(model: LoadedModel, images: np.ndarray) -> np.ndarray:
    """Returns the scores `(N,)` of images `(N, H, W, 3)` uint8 by the model's rule, which it must have."""
    assert model.unknown is not None
    starts = range(0, len(images), _BATCH)
    return np.concatenate(
        [model.unknown.score(model.predict_batch(images[start : start + _BATCH]).features) for start in starts]
    )


def far_images(image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Returns images of other things than most models learn, `(100, H, W, 3)` uint8 each, seeded."""
    from sklearn.datasets import load_digits, load_sample_images

    rng = np.random.default_rng(0)
    scans = load_digits().images  # pyright: ignore[reportAttributeAccessIssue]
    digits = [(255 / 16 * scans[row]).astype(np.uint8) for row in rng.permutation(len(scans))[:_FAR]]
    photographs = load_sample_images().images
    cuttings = []
    for index in range(_FAR):
        whole = photographs[index % len(photographs)]
        side = int(rng.uniform(0.2, 0.8) * whole.shape[0])
        top, left = (int(rng.integers(0, length - side)) for length in whole.shape[:2])
        cuttings.append(whole[top : top + side, left : left + side])
    return {
        "handwritten digits": np.stack([resize(np.repeat(one[..., None], 3, axis=2), image_size) for one in digits]),
        "cuttings of two photographs": np.stack([resize(one, image_size) for one in cuttings]),
    }


def _features(model: LoadedModel, split: PackedSplit) -> tuple[np.ndarray, np.ndarray]:
    rows = np.sort(np.random.default_rng(0).permutation(len(split.paths))[:_MOST])
    starts = range(0, len(rows), _BATCH)
    batches = [np.asarray(split.images[rows[start : start + _BATCH]]) for start in starts]
    features = [model.predict_batch(batch).features for batch in batches]
    empty = np.empty((0, model.metadata.feature_dims), np.float32)
    return np.concatenate([empty, *features]), np.asarray(split.targets)[rows]


def fit_unknown(
    features: np.ndarray,
    truth: np.ndarray,
    held_out: np.ndarray,
    *,
    kernel: np.ndarray,
    bias: np.ndarray,
    is_joint: bool = False,
) -> UnknownRule | None:
    """Returns the rule; None where the images are too few: a class without any, or less than 40 held out.

    Args:
        features: `(N, F)` float32, penultimate features of training images.
        truth: `(N, C)` of 0 and 1, their classes.
        held_out: `(M, F)`, features of images that were not trained on.
        kernel: `(F, C)`, of the output layer.
        bias: `(C,)`.
        is_joint: the classes are labels, of which an image has any number.
    """
    shows = truth > 0.5
    if is_joint and not shows.any(axis=1).all():
        shows = np.hstack([shows, ~shows.any(axis=1, keepdims=True)])
    if len(held_out) < _FEWEST or not shows.any(axis=0).all():
        return None
    means = np.stack([features[column].mean(axis=0) for column in shows.T])
    own = shows @ means / shows.sum(axis=1, keepdims=True)  # Of several labels, the middle of their prototypes.
    # A feature that never varies would divide by nothing, and one that hardly does would drown the others.
    spread = (features - own).std(axis=0)
    scale = np.maximum(spread, max(1e-6, 0.1 * float(spread.mean()))).astype(np.float32)
    head = (kernel.astype(np.float32), bias.astype(np.float32), (means / scale).astype(np.float32), scale)
    measured = measure_unknown(held_out, *head, is_joint=is_joint, is_angular=not is_joint)
    middle = np.median(measured, axis=0)
    spread = np.quantile(measured, _ONE_SD, axis=0) - middle
    spread = np.maximum(spread, 1e-6 * np.maximum(1.0, np.abs(middle)))
    # One limit for both, in spreads: the smallest that at most `RATE` exceeds. Of less than 100 images, none does.
    farthest = np.sort(((measured - middle) / spread).max(axis=1))
    limit = middle + spread * max(1.0, float(farthest[len(farthest) - 1 - int(RATE * len(farthest))]))
    parts = (middle.astype(np.float32), limit.astype(np.float32), np.array(RATE, np.float32))
    return UnknownRule(*head, *parts, np.array(is_joint), np.array(not is_joint))
