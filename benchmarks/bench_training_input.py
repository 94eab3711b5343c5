"""Training input: the original's tf.data pipeline against packed pixels with augmentation per batch.

Both sides read the same version of the same DVC dataset, make the same batches of the same size with the same random
operations, and are walked through without a training step. Packing happens once per dataset version; its cost is
reported as a note and not counted, as no epoch pays it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks import original_input
from benchmarks.harness import (
    Alternative,
    Observation,
    Report,
    Stopwatch,
    compare,
    in_process,
    machine_line,
    measure_interleaved,
)
from benchmarks.options import REPOSITORY, Options
from cv_platform.config import AugmentConfig, ExperimentConfig, load_experiment

BATCH_SIZE = 64
MINIMUM_SECONDS = 1.0
"""A measurement walks whole epochs until this has passed: short ones measure the clock."""
LIBRARIES = ("tensorflow", "imgaug", "numpy", "opencv-python-headless")


def run(options: Options) -> Report:
    """Runs the comparison on the digits, or on the images of `options.archive`."""
    with tempfile.TemporaryDirectory(prefix="cv-bench-input-") as folder:
        return _run(options, Path(folder))


def _run(options: Options, home: Path) -> Report:
    from cv_platform.datasets.packing import open_split, pack_images
    from cv_platform.datasets.versions import checkout_version
    from cv_platform.training.augmentation import Augmenter
    from cv_platform.training.batches import ShuffledBatches

    clock = Stopwatch()
    experiment = archive_experiment(options.archive, home)
    # The original's image size and augmentation, whatever the images are.
    animals = load_experiment(REPOSITORY / "configs" / "examples" / "animals10.yaml")
    augment = animals.train.augment
    model = experiment.model.model_copy(update={"input_size": animals.model.input_size})
    options.say(f"checking out {experiment.dataset.ds_name} {experiment.dataset.dvc_tag} …")
    version = checkout_version(experiment.dataset, model, home=home)
    begin = time.process_time()
    packed = pack_images(version, model, quarantined=(), home=home)
    packing_us = 1e6 * (time.process_time() - begin) / sum(packed.counts.values())
    train = open_split(packed, "train")
    paths = [version.directory / path for path in train.paths]
    classes = len(model.classes)

    def original(change: AugmentConfig | None) -> Callable[[], Observation]:
        pipeline = original_input.dataset(
            paths,
            train.targets,
            classes=classes,
            image_size=model.image_size,
            batch_size=BATCH_SIZE,
            augment=change,
            seed=options.seed,
        )
        return in_process(lambda: _walk(lambda epoch: pipeline))

    def platform(change: AugmentConfig) -> Callable[[], Observation]:
        batches = ShuffledBatches(
            train.images,
            train.targets,
            classes=classes,
            batch_size=BATCH_SIZE,
            augmenter=Augmenter(change, seed=options.seed),
        )
        pipeline = batches.dataset()

        def epoch(index: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
            batches.epoch = index
            return pipeline

        return in_process(lambda: _walk(epoch))

    observations = measure_interleaved(
        [
            Alternative("original", original(augment)),
            Alternative("platform", platform(augment)),
            Alternative("original, no augmentation", original(None)),
            Alternative("platform, no augmentation", platform(augment.model_copy(update={"sometimes": 0.0}))),
        ],
        rounds=options.rounds,
        say=options.say,
    )
    ratios = [
        compare(observations, f"original{suffix}", f"platform{suffix}", quantity, seed=options.seed)
        for suffix in ("", ", no augmentation")
        for quantity in ("cpu_us_per_unit", "wall_us_per_unit")
    ]
    height, width = model.image_size
    return Report(
        name="training-input",
        title=(
            f"Training input, {experiment.dataset.ds_name} at {height}×{width} px, batch {BATCH_SIZE}, "
            f"{len(paths)} images an epoch"
        ),
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={
            "ds_name": experiment.dataset.ds_name,
            "images": len(paths),
            "height_px": height,
            "width_px": width,
            "batch_size": BATCH_SIZE,
            "rounds": options.rounds,
            "seed": options.seed,
            "augment": augment.model_dump_json(),
        },
        observations=observations,
        ratios=[ratio for ratio in ratios if ratio is not None],
        notes=[f"packing, once per dataset version: {packing_us:.0f} CPU µs per image, {packed.bytes / 1e6:.1f} MB"],
    )


def _walk(epoch: Callable[[int], Iterable[tuple[np.ndarray, np.ndarray]]]) -> int:
    """Walks whole epochs for at least `MINIMUM_SECONDS` and returns the number of images seen."""
    images, index = 0, 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < MINIMUM_SECONDS:
        for batch, _ in epoch(index):
            images += int(batch.shape[0])
        index += 1
    return images


def archive_experiment(archive: Path | None, home: Path) -> ExperimentConfig:
    """Returns the digits experiment, or one over the classes and images of `archive`, imported into `home`."""
    digits = load_experiment(REPOSITORY / "configs" / "digits.yaml")
    if archive is None:
        return digits
    from cv_platform.datasets.importing import import_dataset

    imported = import_dataset(archive, ds_name="archive", tag="v1.0.0", ds_root=home / "datasets")
    return digits.model_copy(
        update={
            "model": digits.model.model_copy(update={"classes": imported.class_names}),
            "dataset": digits.dataset.model_copy(update={"ds_name": "archive", "dvc_tag": "v1.0.0", "source": None}),
        }
    )
