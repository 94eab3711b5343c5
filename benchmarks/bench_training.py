"""What a config reaches on real images, and the CPU time that it takes: test accuracy beside CPU seconds, for each set.

`options.archive` is the folder of the sets' archives. Pixels are packed first, which is not counted, as no second
training pays for it; then the platform's own fit runs on the train and valid splits, and the test split is classified.
CPU seconds are those of this process and all its threads: other work on the machine lengthens them by tens of percent.

With `options.images` it is a learning curve: each number of images, and beside it, unless a config is named, `resnet9s`
from random weights, by the recipe of `configs/examples/cifar10.yaml`, which sees `SHOWN` images in all, however few
there are.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, Observation, Report, Stopwatch, machine_line
from benchmarks.options import REPOSITORY, Options
from cv_platform.config import ExperimentConfig, load_experiment
from cv_platform.errors import DatasetError
from cv_platform.evaluation.intervals import wilson

LIBRARIES = ("tensorflow", "keras", "numpy", "opencv-python-headless")
SHOWN = 20_000
"""Images of all epochs of a training from random weights."""
_OF_MANY_IMAGES = ("train.epochs", "train.batch_size")
GROCERY, CIFAR = "grocery-5k.tar.gz", "cifar10-12k.tar.gz"


@dataclass(frozen=True)
class ImageSet:
    """Images and what is promised of a config on them.

    Attributes:
        archive: of SPLIT/CLASS/image.
        config: below configs/examples.
        target: test accuracy.
        budget_seconds: of CPU time, training and validation.
        classes: those with most training images; None: all.
        images: of training, a seeded choice; None: all.
        changes: of fields, by dotted names, as the config's header says of this set.
    """

    archive: str
    config: str
    target: float
    budget_seconds: float
    classes: int | None = None
    images: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)


SETS = {
    "grocery-20": ImageSet(GROCERY, "photos.yaml", 0.9, 600, classes=20),
    "cifar-1500": ImageSet(CIFAR, "photos.yaml", 0.75, 600, images=1500),
    "cifar-resnet9s": ImageSet(CIFAR, "cifar10.yaml", 0.7, 480, changes={"train.epochs": 24}),
    "cifar": ImageSet(
        CIFAR,
        "photos.yaml",
        0.86,
        600,
        changes={
            "dataset.valid_fraction": 0.05,
            "dataset.reference_fraction": 0.05,
            "train.init_lr": 0.001,
            "train.epochs": 5,
            "train.batch_size": 64,
            "train.transfer.freeze_until": 2,
            "train.augment.flip_horizontal": 0.5,
            "train.augment.rotate_degrees": 0.0,
            "model.input_size": {"h": 96, "w": 96},
        },
    ),
    "grocery": ImageSet(
        GROCERY,
        "photos.yaml",
        0.82,
        3600,
        changes={
            "train.init_lr": 0.001,
            "train.augment.flip_horizontal": 0.5,
            "model.input_size": {"h": 224, "w": 224},
        },
    ),
}


def run(options: Options) -> Report:
    """Trains on each set of `options.sets`.

    Raises:
        DatasetError: there is no such set, or no folder with its archive.
    """
    strange = [name for name in options.sets if name not in SETS]
    if strange or options.archive is None:
        raise DatasetError(
            f"Expected --sets of {', '.join(SETS)}, and --archive with the folder of {GROCERY} and {CIFAR}. "
            f"Received: {', '.join(strange) or 'no --archive'}."
        )
    clock = Stopwatch()
    observations: dict[str, list[Observation]] = {}
    checks: list[Check] = []
    notes: list[str] = []
    for name in options.sets or SETS:
        wanted = SETS[name]
        if options.budget is not None:
            wanted = replace(wanted, budget_seconds=options.budget)
        with tempfile.TemporaryDirectory(prefix="cv-bench-training-") as folder:
            classes = _import(wanted, options, Path(folder))
            for shown, count, tried in _tried(name, wanted, options):
                seen, right, tested, note = _train(_experiment(tried, classes, options), Path(folder))
                observations[shown] = [seen]
                accuracy, interval = right / tested, wilson(right, tested) or (0.0, 1.0)
                reached = f"{accuracy:.4f} ({interval[0]:.4f} to {interval[1]:.4f}) of {tested} test images"
                notes.append(f"{shown}: {reached}; {note}")
                options.say(notes[-1])
                if count is None:
                    checks.append(_check(name, wanted, accuracy, seen.cpu_seconds or 0.0))
    return Report(
        name="training",
        title="Accuracy and CPU time of trainings",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"config": str(options.config or "as each set has it")},
        observations=observations,
        ratios=[],
        checks=checks,
        notes=notes,
    )


def _tried(name: str, wanted: ImageSet, options: Options) -> Iterator[tuple[str, int | None, ImageSet]]:
    """Yields what is trained, its name, and how many images a learning curve has there; None: it is none."""
    if not options.images:
        yield name, None, wanted
    for count in options.images:
        # Epochs and batches that suit thousands of images are a few dozen steps for a hundred: these are the config's.
        kept = {name: value for name, value in wanted.changes.items() if name not in _OF_MANY_IMAGES}
        few = replace(wanted, images=count, changes=kept)
        yield f"{name}, {count} images", count, few
        if options.config is not None:
            continue
        epochs = {"train.epochs": max(8, SHOWN // count)}
        # A batch of the recipe's is more than the smallest sets have.
        batch = {"train.batch_size": min(128, max(16, count // 8))}
        side = 32 if wanted.archive == CIFAR else 64
        changes = {"model.input_size": {"h": side, "w": side}, **epochs, **batch}
        yield f"{name}, {count} images, from scratch", count, replace(few, config="cifar10.yaml", changes=changes)


def _check(name: str, wanted: ImageSet, accuracy: float, used: float) -> Check:
    return Check(
        what=name,
        expected=f"≥ {wanted.target:g} in {wanted.budget_seconds:g} CPU seconds",
        received=f"{accuracy:.4f} in {used:.0f}",
        held=accuracy >= wanted.target and used <= wanted.budget_seconds,
    )


def _train(experiment: ExperimentConfig, home: Path) -> tuple[Observation, int, int, str]:
    """Returns what the training took, how many test images are right, of how many, and a line on how it went."""
    from cv_platform.datasets.packing import open_split, pack_images
    from cv_platform.datasets.versions import checkout_version
    from cv_platform.training.fitting import fit_model

    version = checkout_version(experiment.dataset, experiment.model, home=home)
    packed = pack_images(version, experiment.model, quarantined=(), home=home, pack_scale=experiment.train.pack_scale)
    train, valid, test = (open_split(packed, split) for split in ("train", "valid", "test"))
    begun, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(dir=home) as work:
        fitted = fit_model(experiment, train, valid, folder=Path(work))
    epochs = len(fitted.history["loss"])
    images = min(len(train.images), experiment.train.max_images or len(train.images))
    seen = Observation(
        units=images * epochs,
        wall_seconds=time.perf_counter() - begun,
        cpu_seconds=time.process_time() - cpu,
    )
    starts = range(0, len(test.images), 64)
    probabilities = [
        np.asarray(fitted.network.predict_on_batch(np.asarray(test.images[at : at + 64]))) for at in starts
    ]
    right = int((np.concatenate(probabilities).argmax(axis=1) == np.asarray(test.targets)).sum())
    curve = ", ".join(f"{value:.3f}" for value in fitted.history["val_accuracy"])
    note = f"{images} training images, {epochs} epochs, the best is {fitted.best_epoch}; accuracy on valid: {curve}"
    return seen, right, len(test.images), note


def _import(wanted: ImageSet, options: Options, home: Path) -> tuple[str, ...]:
    """Imports the set's images and returns their classes."""
    from cv_platform.datasets.importing import import_dataset

    assert options.archive is not None
    source = _source(options.archive / wanted.archive, wanted.classes, home)
    return import_dataset(source, ds_name="images", tag="v1.0.0", ds_root=home / "datasets").class_names


def _experiment(wanted: ImageSet, classes: tuple[str, ...], options: Options) -> ExperimentConfig:
    """Returns the set's config, with the imported classes."""
    path = options.config or REPOSITORY / "configs" / "examples" / wanted.config
    content = load_experiment(path).model_dump(mode="json")
    content["train"]["max_images"] = wanted.images
    content["model"]["classes"] = classes
    content["dataset"] |= {"ds_name": "images", "dvc_tag": "v1.0.0"}
    experiment = ExperimentConfig.model_validate(content)
    return experiment if options.config else experiment.with_fields(wanted.changes)


def _source(archive: Path, classes: int | None, home: Path) -> Path:
    """Returns the archive, or a folder of its classes with most training images."""
    if classes is None:
        return archive
    if not archive.is_file():
        raise DatasetError(f"Expected an archive at {archive}. Received: none.")
    folder = home / "source"
    with tarfile.open(archive) as opened:
        images = [member for member in opened.getmembers() if member.isfile() and len(Path(member.name).parts) == 4]
        parts = {member.name: Path(member.name).parts for member in images}
        counts = Counter(name for _, split, name, _ in parts.values() if split == "train")
        kept = {name for name, _ in counts.most_common(classes)}
        opened.extractall(folder, [member for member in images if parts[member.name][2] in kept], filter="data")
    return folder
