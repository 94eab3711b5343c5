"""The drift detectors of one model version: its seeded encoder, and what the verdict notices of this model's images.

The false-alarm rate is measured, because a nominal level is a promise about assumptions, and the numbers of
`two_sample.py` deserve a check where they are used.
"""

# Keras comes without complete types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cv_platform.compute import map_shards
from cv_platform.compute.engine import Engine
from cv_platform.compute.rows import ImageRows, RowShard, row_shards
from cv_platform.config import ExperimentConfig
from cv_platform.drift.encoders import build_uae, encoder_hash
from cv_platform.drift.extraction import KerasAnswer, require_finite
from cv_platform.drift.power import UNCHANGED, detection_rates
from cv_platform.drift.power_plot import save_power
from cv_platform.drift.sample import DriftSample, Float32Matrix
from cv_platform.drift.scipy_tests import binomial_quantile
from cv_platform.encoders.encoder import Encoder, open_encoder
from cv_platform.errors import InvalidSampleError
from cv_platform.files import whole_file
from cv_platform.images import resize
from cv_platform.images.corruptions import corruptions
from cv_platform.properties import batch_properties
from cv_platform.records import DetectionRate, DriftDetectors, TrainedModel

logger = logging.getLogger(__name__)

Answer = Callable[[NDArray[np.uint8]], tuple[Float32Matrix, Float32Matrix, Float32Matrix]]
"""From images `(n, H, W, 3)` to probabilities `(n, C)`, features `(n, F)` and UAE embedding `(n, D)`."""
_MOST_REFERENCE, _MOST_TEST, _MOST_CHANGED = 1000, 1000, 200
"""Images of which windows are drawn."""
FEWEST_FALSE_ALARM_IMAGES = 40
"""Fewer test or reference images than this, and no rate is measured; the config's descriptions name it."""
_SHIFTS = ("noise", "blur", "darker", "JPEG", "rotation")


class HeldOutImages(Protocol):
    """What is needed of a held-out split: its images in a fixed order, with their targets."""

    @property
    def images(self) -> ImageRows:
        """The pixels."""
        ...

    @property
    def targets(self) -> NDArray[Any]:
        """`(N,)` class indices, or `(N, C)` 0/1 for multi-label."""
        ...

    @property
    def paths(self) -> Sequence[str]:
        """Of each image, relative to the dataset."""
        ...

    @property
    def sha256(self) -> Sequence[str]:
        """Of each image's file."""
        ...


def build_detectors(
    trained: TrainedModel,
    held_out: HeldOutImages,
    test: HeldOutImages,
    config: ExperimentConfig,
    *,
    home: Path,
    engine: Engine | None = None,
) -> DriftDetectors:
    """Makes and saves the encoder, and measures what the verdict notices: see `power.py`.

    Args:
        trained: the model; the encoder is written beside it, complete or not at all.
        held_out: the reference split; at most 1,000 of its images, seeded, take part.
        test: the test split; 1,000 likewise as they are, and 200 made worse.
        config: `model` has the encoder's width and seed, `monitor` the level, seed and detectors of the trials.
        home: `Settings.home`: has the pretrained encoder, where a detector needs it. It sees the packed images here.
        engine: whose machines answer for images that take long; None: this process alone.

    Raises:
        InvalidModelError: the model has no layers "features" and "probabilities".
        EncoderError: the pretrained encoder cannot be used.
    """
    drift, monitor = config.model.drift_detection, config.monitor
    encoder = build_uae(trained.task.image_size, drift.uae_encoding_dims, drift.uae_seed)
    uae_path = trained.directory / f"{trained.model.model_name}_uae.keras"
    with whole_file(uae_path, suffix=".keras") as partial:
        encoder.save(partial)

    wanted: list[tuple[str, str, HeldOutImages, int]] = [("reference", "", held_out, _MOST_REFERENCE)]
    if min(len(held_out.paths), len(test.paths)) >= FEWEST_FALSE_ALARM_IMAGES:
        worse = ((*shift, _MOST_CHANGED) for shift in _made_worse(test, monitor.seed))
        wanted += [(UNCHANGED, "", test, _MOST_TEST), *worse]
    chosen = [(split, seeded_rows(len(split.paths), most, monitor.seed)) for _, _, split, most in wanted]
    is_encoded = len(wanted) > 1 and monitor.needs_encoder
    pretrained = open_encoder(config.encoder, home) if is_encoded else None
    reference, *samples = extract_samples(trained.keras_path, uae_path, chosen, encoder=pretrained, engine=engine)
    shifted = {(name, strength): sample for (name, strength, _, _), sample in zip(wanted[1:], samples, strict=True)}
    if shifted:
        shifted |= _without_a_class(test, samples[0], monitor.seed)
    detection = detection_rates(reference, shifted, alpha=monitor.alpha, seed=monitor.seed, detectors=monitor.detectors)
    logger.info("%s", false_alarm_summary(detection, monitor.alpha))
    detectors = DriftDetectors(
        model=trained.model,
        directory=trained.directory,
        encoder_hash=encoder_hash(encoder),
        uae_dims=reference.uae.shape[1],
        feature_dims=reference.features.shape[1],
        detection=detection,
    )
    save_power(detectors.plot_path, detection, monitor.alpha)
    return detectors


@dataclass(frozen=True)
class _Changed:
    """Images of a split after something was done to them."""

    images: NDArray[np.uint8]
    targets: NDArray[Any]
    paths: Sequence[str]
    sha256: Sequence[str]


def _made_worse(test: HeldOutImages, seed: int) -> Iterator[tuple[str, str, HeldOutImages]]:
    """Yields name, strength and images of the weaker of each corruption."""
    rows = seeded_rows(len(test.paths), _MOST_CHANGED, seed)
    images, chosen = np.asarray(test.images[rows]), [int(row) for row in rows]
    seen: set[str] = set()
    for name, strength, corrupt in corruptions(images.shape[1]):
        if name not in _SHIFTS or name in seen:
            continue
        seen.add(name)
        rng = np.random.default_rng(seed)
        worse = np.stack([corrupt(image, rng) for image in images])
        paths, sha256 = [test.paths[row] for row in chosen], [test.sha256[row] for row in chosen]
        yield name, strength, _Changed(worse, np.asarray(test.targets)[rows], paths, sha256)


def _without_a_class(test: HeldOutImages, sample: DriftSample, seed: int) -> dict[tuple[str, str], DriftSample]:
    """Returns the rows without the most frequent class; nothing for several labels an image."""
    targets = np.asarray(test.targets)[seeded_rows(len(test.paths), _MOST_TEST, seed)]
    if targets.ndim > 1:
        return {}
    counts = np.bincount(targets)
    return {
        ("a class missing", f"{counts.max() / len(targets):.0%} of the images"): sample.take(targets != counts.argmax())
    }


def is_calibrated(detection: Sequence[DetectionRate], alpha: float) -> bool:
    """Whether the false-alarm rate was measured, and is compatible with the nominal one for every size of window."""
    rates = [row for row in detection if row.shift == UNCHANGED]
    return bool(rates) and all(row.rate <= false_alarm_bound(alpha, row.independent) for row in rates)


def false_alarm_summary(detection: Sequence[DetectionRate], alpha: float) -> str:
    """Returns the false-alarm rates in a sentence or two; not measured, with how many images it takes."""
    rates = [row for row in detection if row.shift == UNCHANGED]
    if not rates:
        return (
            f"Not measured: at least {FEWEST_FALSE_ALARM_IMAGES} images are needed in the test split and in the "
            "reference split. Add some, or raise dataset.reference_fraction where the dataset has no reference split "
            "of its own."
        )
    told = "; ".join(
        f"{row.rate:.3f} with {row.images} images, at most {false_alarm_bound(alpha, row.independent):.3f} expected"
        for row in rates
    )
    text = f"Windows of the test split are taken for drift (monitor.alpha {alpha:g}): {told}."
    if not is_calibrated(detection, alpha):
        text += (
            " The test split differs from the reference split: drawn from other sources, or with groups of images that "
            "are alike. Requests that are as the test split will be taken for drift. Draw both from the same images, "
            "or go on with monitor.require_calibration: false."
        )
    return text


def false_alarm_bound(alpha: float, trials: int) -> float:
    """Returns the rate that a test of level `alpha` exceeds once in 1,000 runs of `trials` trials; 1.0 for none."""
    return binomial_quantile(0.999, trials, alpha) / trials if trials else 1.0


def extract_sample(
    keras_path: Path,
    uae_path: Path,
    held_out: HeldOutImages,
    rows: NDArray[np.intp],
    answer: Answer | None = None,
    engine: Engine | None = None,
) -> DriftSample:
    """Returns the sample of these images, row i of it for image `rows[i]`; see `extract_samples`."""
    (sample,) = extract_samples(keras_path, uae_path, [(held_out, rows)], answer, engine=engine)
    return sample


def extract_samples(
    keras_path: Path,
    uae_path: Path,
    wanted: Sequence[tuple[HeldOutImages, NDArray[np.intp]]],
    answer: Answer | None = None,
    encoder: Encoder | None = None,
    *,
    engine: Engine | None = None,
) -> list[DriftSample]:
    """Returns a sample for each split and its rows, in one ordered pass over the pixels of all.

    Where `answer` is given, it answers for the Keras files, in this process. Where `encoder` is given, the samples have
    its vectors, of the pixels as they are, resized. What takes long is shared out to the machines of `engine`, with the
    same bytes where their processors have the same vector instructions.

    Raises:
        InvalidModelError: see `extract`.
        InvalidSampleError: a split holds images of another number than targets, paths and hashes.
    """
    for split, _ in wanted:
        counts = {len(split.images), len(split.targets), len(split.paths), len(split.sha256)}
        if len(counts) > 1:
            raise InvalidSampleError(
                f"Expected as many images as targets, paths and hashes. Received: {sorted(counts)}. Pack the images "
                "again."
            )
    by_keras = KerasAnswer.of(keras_path, uae_path)
    parts = map_shards(
        partial(answer_rows, answer or by_keras, encoder),
        (shard for split, rows in wanted for shard in row_shards(split.images, rows)),
        engine=engine,
        title="Answers",
        total=sum(len(rows) for _, rows in wanted),
        alone_seconds=by_keras.device.alone_seconds(engine) if answer is None else math.inf,
    )
    columns = (np.concatenate(part) for part in zip(*(made for _, made in parts), strict=True))
    probabilities, features, uae, properties, *encoded = columns
    if answer is None:
        require_finite(probabilities, features, uae)
    whole = DriftSample(probabilities, features, uae, properties)
    if encoder is not None:
        whole = whole.with_encoded(*encoded)
    taken = np.split(np.arange(len(whole)), np.cumsum([len(rows) for _, rows in wanted])[:-1])
    return [whole.take(part) for part in taken]


def answer_rows(answer: Answer, encoder: Encoder | None, shard: RowShard) -> tuple[NDArray[np.float32], ...]:
    """Returns what `extract_samples` puts together, of a shard: what `answer` says, pixel statistics, and vectors."""
    made: list[tuple[NDArray[np.float32], ...]] = []
    for images in shard.batches():
        seen = () if encoder is None else (encoder.embed(_resized(images, encoder.input_px)),)
        made.append((*answer(images), batch_properties(images), *seen))
    return tuple(np.concatenate(part) for part in zip(*made, strict=True))


def _resized(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    resized = np.empty((len(images), side, side, 3), np.uint8)
    for at, image in enumerate(images):
        resized[at] = resize(image, (side, side))
    return resized


def seeded_rows(available: int, wanted: int | None, seed: int) -> NDArray[np.intp]:
    """Returns all row numbers in order, or `wanted` of them drawn with `seed`, in order."""
    if wanted is None or wanted >= available:
        return np.arange(available, dtype=np.intp)
    return np.sort(np.random.default_rng(seed).choice(available, size=wanted, replace=False)).astype(np.intp)
