"""The drift detectors of one model version: its seeded encoder, and how often the verdict fires on no drift at all.

The false-alarm rate is measured on this model's own held-out images, because a nominal level is a promise about
assumptions, and the numbers of `two_sample.py` deserve a check where they are used.
"""

# Keras comes without complete types.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cv_platform.config import ExperimentConfig
from cv_platform.drift.encoders import build_uae, encoder_hash
from cv_platform.drift.extraction import extract
from cv_platform.drift.sample import DriftSample, Float32Matrix
from cv_platform.drift.scipy_tests import binomial_quantile
from cv_platform.drift.verdict import DriftVerdict, judge
from cv_platform.errors import InvalidSampleError
from cv_platform.files import whole_file
from cv_platform.properties import batch_properties
from cv_platform.records import DriftDetectors, FalseAlarms, TrainedModel

logger = logging.getLogger(__name__)

Answer = Callable[[NDArray[np.uint8]], tuple[Float32Matrix, Float32Matrix, Float32Matrix]]
"""From images `(n, H, W, 3)` to probabilities `(n, C)`, features `(n, F)` and UAE embedding `(n, D)`."""
BATCH_ROWS = 256
_FALSE_ALARM_TRIALS = 60
_FALSE_ALARM_PERMUTATIONS = 99
_FALSE_ALARM_ROWS = 1000
_FEWEST_ROWS_PER_SIDE = 20
FEWEST_FALSE_ALARM_IMAGES = 2 * _FEWEST_ROWS_PER_SIDE
"""Fewer reference images than this, and the false-alarm rate is not measured; the config's descriptions name it."""


class ImageRows(Protocol):
    """`(N, H, W, 3)` uint8 RGB, in memory or on the disk: a number, a slice or an array of rows reads them."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> NDArray[np.uint8]: ...


class HeldOutImages(Protocol):
    """What is needed of the reference split: its images in a fixed order, with their targets."""

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


def build_detectors(trained: TrainedModel, held_out: HeldOutImages, config: ExperimentConfig) -> DriftDetectors:
    """Makes and saves the encoder, and measures how often the verdict fires on images that have not drifted.

    Args:
        trained: the model; the encoder is written beside it, complete or not at all.
        held_out: the reference split; at most 1,000 of its images, seeded, take part.
        config: `model` has the encoder's width and seed, `monitor` the level and seed of the trials.

    Raises:
        InvalidModelError: the model has no layers "features" and "probabilities".
    """
    drift, monitor = config.model.drift_detection, config.monitor
    encoder = build_uae(trained.task.image_size, drift.uae_encoding_dims, drift.uae_seed)
    uae_path = trained.directory / f"{trained.model.model_name}_uae.keras"
    with whole_file(uae_path, suffix=".keras") as partial:
        encoder.save(partial)
    rows = seeded_rows(len(held_out.paths), _FALSE_ALARM_ROWS, monitor.seed)
    sample = extract_sample(trained.keras_path, uae_path, held_out, rows)
    alarms = measure_false_alarms(sample, alpha=monitor.alpha, seed=monitor.seed)
    level = logging.WARNING if alarms.rate is None else logging.INFO
    logger.log(level, "False alarms: %s", false_alarm_summary(alarms, len(sample)))
    return DriftDetectors(
        model=trained.model,
        directory=trained.directory,
        encoder_hash=encoder_hash(encoder),
        uae_dims=sample.uae.shape[1],
        feature_dims=sample.features.shape[1],
        false_alarms=alarms,
    )


def is_calibrated(alarms: FalseAlarms) -> bool:
    """Whether the false-alarm rate was measured, and is compatible with the nominal one."""
    return alarms.rate is not None and alarms.rate <= false_alarm_bound(alarms.alpha, alarms.trials)


def false_alarm_summary(alarms: FalseAlarms, reference_images: int) -> str:
    """Returns the false-alarm rate in a sentence or two; not measured, with how many images it takes.

    Args:
        alarms: as measured.
        reference_images: number of images of the reference split.
    """
    if alarms.rate is None:
        return (
            f"Not measured: the reference split has {reference_images} images, and at least "
            f"{FEWEST_FALSE_ALARM_IMAGES} are needed. Add some, or raise dataset.reference_fraction where the "
            "dataset has no reference split of its own."
        )
    bound = false_alarm_bound(alarms.alpha, alarms.trials)
    return (
        f"Expected at most {bound:.3f} (monitor.alpha {alarms.alpha:g}). Measured: "
        f"{alarms.rate:.3f} in {alarms.trials} trials, {alarms.rows} images a side."
    )


def measure_false_alarms(
    sample: DriftSample, *, alpha: float, seed: int, trials: int = _FALSE_ALARM_TRIALS
) -> FalseAlarms:
    """Splits a sample into two halves at random, judges one against the other, and counts the alarms.

    With fewer than 40 rows nothing is measured: the rate is None, of no trials.
    """
    rows = len(sample) // 2
    if rows < _FEWEST_ROWS_PER_SIDE:
        return FalseAlarms(rate=None, trials=0, alpha=alpha, rows=0, permutations=0)
    verdicts: list[DriftVerdict] = []
    for trial in range(trials):
        order = np.random.default_rng((seed, trial)).permutation(len(sample))
        verdicts.append(
            judge(
                sample.take(order[:rows]),
                sample.take(order[rows : 2 * rows]),
                alpha=alpha,
                permutations=_FALSE_ALARM_PERMUTATIONS,
                max_reference_rows=rows,
                seed=trial,
            )
        )
    return FalseAlarms(
        rate=sum(v.drifted for v in verdicts) / trials,
        trials=trials,
        alpha=alpha,
        rows=rows,
        permutations=verdicts[0].permutations,
    )


def false_alarm_bound(alpha: float, trials: int) -> float:
    """Returns the rate that a test of level `alpha` exceeds once in 1,000 runs of `trials` trials; 1.0 for none."""
    return binomial_quantile(0.999, trials, alpha) / trials if trials else 1.0


def extract_sample(
    keras_path: Path,
    uae_path: Path,
    held_out: HeldOutImages,
    rows: NDArray[np.intp],
    answer: Answer | None = None,
) -> DriftSample:
    """Returns the sample of these images, row i of it for image `rows[i]`; one ordered pass over the pixels.

    Where `answer` is given, it answers for the Keras files; there is at least one row then.

    Raises:
        InvalidModelError: see `extract`.
        InvalidSampleError: the split holds images of another number than targets, paths and hashes.
    """
    counts = {len(held_out.images), len(held_out.targets), len(held_out.paths), len(held_out.sha256)}
    if len(counts) > 1:
        raise InvalidSampleError(
            f"Expected as many images as targets, paths and hashes. Received: {sorted(counts)}. Pack the images again."
        )
    properties: list[NDArray[np.float32]] = []

    def batches() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(rows), BATCH_ROWS):
            images = np.asarray(held_out.images[rows[start : start + BATCH_ROWS]])
            properties.append(batch_properties(images))
            yield images

    if answer is None:
        probabilities, features, uae = extract(keras_path, uae_path, batches())
    else:
        answers = [answer(images) for images in batches()]
        probabilities, features, uae = (np.concatenate(part) for part in zip(*answers, strict=True))
    return DriftSample(probabilities, features, uae, np.concatenate([batch_properties([]), *properties]))


def seeded_rows(available: int, wanted: int | None, seed: int) -> NDArray[np.intp]:
    """Returns all row numbers in order, or `wanted` of them drawn with `seed`, in order."""
    if wanted is None or wanted >= available:
        return np.arange(available, dtype=np.intp)
    return np.sort(np.random.default_rng(seed).choice(available, size=wanted, replace=False)).astype(np.intp)
