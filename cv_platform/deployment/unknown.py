"""Fits the rule by which a served model says that an image shows none of what it has learned.

Prototypes are the classes' mean features on training images; the limits are fixed on held-out images, so that the
stated rate of known images exceeds them, and no more. Energy is that of a softmax: multi-label models have no rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cv_platform.datasets.packing import PackedSplit
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.model.unknown import UnknownRule, measure_unknown

RATE = 0.01
"""Of known images that count as unknown."""
_MOST = 2000
_BATCH = 64
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

    if model.metadata.classifier_type != "multi-class":
        return None
    network: Any = keras.models.load_model(keras_path, compile=False)
    head = next(layer for layer in reversed(network.layers) if isinstance(layer, keras.layers.Dense))
    weights = head.get_weights()
    if len(weights) != 2 or weights[0].shape != (model.metadata.feature_dims, len(model.metadata.class_names)):
        return None
    (learned, labels), (held_out, _) = (_features(model, split) for split in (train, valid))
    return fit_unknown(learned, labels, held_out, kernel=weights[0], bias=weights[1])


def _features(model: LoadedModel, split: PackedSplit) -> tuple[np.ndarray, np.ndarray]:
    rows = np.sort(np.random.default_rng(0).permutation(len(split.paths))[:_MOST])
    starts = range(0, len(rows), _BATCH)
    batches = [np.asarray(split.images[rows[start : start + _BATCH]]) for start in starts]
    features = [model.predict_batch(batch).features for batch in batches]
    empty = np.empty((0, model.metadata.feature_dims), np.float32)
    return np.concatenate([empty, *features]), np.asarray(split.targets)[rows]


def fit_unknown(
    features: np.ndarray,
    labels: np.ndarray,
    held_out: np.ndarray,
    *,
    kernel: np.ndarray,
    bias: np.ndarray,
    rate: float = RATE,
) -> UnknownRule | None:
    """Returns the rule; None where the images are too few: a class without any, or less than 40 held out.

    Args:
        features: `(N, F)` float32, penultimate features of training images.
        labels: `(N,)` class indices.
        held_out: `(M, F)`, features of images that were not trained on.
        kernel: `(F, C)`, of the output layer.
        bias: `(C,)`.
        rate: of known images, at most, that exceed a limit.
    """
    classes = kernel.shape[1]
    if len(held_out) < _FEWEST or set(range(classes)) - set(labels.tolist()):
        return None
    means = np.stack([features[labels == index].mean(axis=0) for index in range(classes)])
    # A feature that never varies would divide by nothing, and one that hardly does would drown the others.
    spread = (features - means[labels]).std(axis=0)
    scale = np.maximum(spread, max(1e-6, 0.1 * float(spread.mean()))).astype(np.float32)
    head = (kernel.astype(np.float32), bias.astype(np.float32), (means / scale).astype(np.float32), scale)
    measured = measure_unknown(held_out, *head)
    middle = np.median(measured, axis=0)
    # The smallest limit that at most half of the rate exceeds: of 40 images, none does.
    ranked = np.sort(measured, axis=0)
    limit = ranked[len(ranked) - 1 - int(rate / 2 * len(ranked))]
    limit = np.maximum(limit, middle + 1e-6 * np.maximum(1.0, np.abs(middle)))
    return UnknownRule(*head, middle.astype(np.float32), limit.astype(np.float32), np.array(rate, np.float32))
