"""Training input: the original's tf.data pipeline against packed pixels, by each engine; and what training adds to it.

Both sides read the same version of the same DVC dataset, make the same batches of the same size with the same random
operations, and are walked through without a training step. Packing happens once per dataset version; its cost is
reported as a note and not counted, as no epoch pays it. Then `resnet9s` is trained on the smaller images: by the
platform's own fit, and after each of its epochs by a compiled loop of a few lines, which notes how long it waits for
its batches, and how long for a constant that is there already.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np

from benchmarks import original_input
from benchmarks.harness import (
    Alternative,
    Check,
    Observation,
    Ratio,
    Report,
    Stopwatch,
    compare,
    in_process,
    machine_line,
    measure_interleaved,
)
from benchmarks.options import REPOSITORY, Options
from benchmarks.uploads import write_uploads
from cv_platform.config import AugmentConfig, ExperimentConfig, InputSize, load_experiment
from cv_platform.datasets.packing import PackedSplit
from cv_platform.errors import DatasetError

BATCH_SIZE = 64
MINIMUM_SECONDS = 1.0
"""A measurement walks whole epochs until this has passed: short ones measure the clock."""
LIBRARIES = ("tensorflow", "imgaug", "numpy", "opencv-python-headless")
IMAGES = {32: 1000, 224: 420}
"""By the side in pixels: photographs of scikit-learn's, as small as CIFAR's, and as large as phones send thumbnails."""
PARTS = (*map(str, IMAGES), "training")
"""What may be measured: the input at each side, and the training on the smaller images."""
EPOCH, EPOCHS = {32: 2048, 224: 512}, 8
"""Images of an epoch, for which the photographs are repeated, and epochs of a training: what begins one is counted."""
TARGETS = {("fused", 32): 25.0, ("fused", 224): 5.0, ("imgaug", 32): 4.0, ("imgaug", 224): 4.0}
"""Times the original's CPU time, at least."""
MOST_STALL, LEAST_FIT = 0.03, 0.97
STEPS = 100


def run(options: Options) -> Report:
    """Runs `options.parts` of the comparison on crops of photographs, or on the images of `options.archive`.

    Raises:
        DatasetError: there is no such part.
    """
    if strange := set(options.parts) - set(PARTS):
        raise DatasetError(f"Expected --parts of {', '.join(PARTS)}. Received: {', '.join(sorted(strange))}.")
    clock, parts = Stopwatch(), options.parts or PARTS
    observations: dict[str, list[Observation]] = {}
    ratios, checks, notes = list[Ratio](), list[Check](), list[str]()

    def judge(ratio: Ratio | None, least: float) -> None:
        if ratio is not None:
            ratios.append(ratio)
            checks.append(_at_least(ratio, least))

    with tempfile.TemporaryDirectory(prefix="cv-bench-input-") as folder:
        for side in IMAGES:
            trains = side == min(IMAGES) and "training" in parts
            if str(side) not in parts and not trains:
                continue
            home = Path(folder) / str(side)
            experiment = archive_experiment(options.archive or _photographs(side, home / "photos", options.seed), home)
            train, paths, note = _packed(experiment, side, home)
            notes.append(note)
            for name, augment in _augmentations().items() if str(side) in parts else ():
                what = f"{side} px, {name}"
                ways = _ways(what, train, paths, augment, options.seed)
                found = measure_interleaved(ways, rounds=options.rounds, say=options.say)
                observations |= found
                for engine in ("fused", "imgaug"):
                    names = f"original, {what}", f"{engine}, {what}"
                    judge(compare(found, *names, "cpu_us_per_unit", seed=options.seed), TARGETS[engine, side])
            if trains:
                trained, (waited, least) = _trained(experiment, train, options)
                observations |= trained
                notes.append(f"share of a step that waits: {waited:.4f}, for one same batch of a constant: {least:.4f}")
                checks.append(_at_most("share of a step that waits for its batch", waited, MOST_STALL))
                judge(compare(trained, "bare loop", "fit", "cpu_us_per_unit", seed=options.seed), LEAST_FIT)
    return Report(
        name="input-pipeline",
        title=f"Training input, batches of {BATCH_SIZE}, and a training of resnet9s",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={
            "images": str(options.archive or "crops of scikit-learn's photographs"),
            "batch_size": BATCH_SIZE,
            "rounds": options.rounds,
            "seed": options.seed,
        },
        observations=observations,
        ratios=ratios,
        checks=checks,
        notes=notes,
    )


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


def _photographs(side: int, folder: Path, seed: int) -> Path:
    """Writes photographs of two classes that are a little larger than `side`, or as small."""
    for index, path in enumerate(write_uploads("photos", folder, count=IMAGES[side], seed=seed)):
        target = folder / ("building", "flower")[index % 2] / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
        if side < 200:
            small = cv2.resize(cast(Any, cv2.imread(str(target))), (side, side), interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(target), small)
    return folder


def _packed(experiment: ExperimentConfig, side: int, home: Path) -> tuple[PackedSplit, list[Path], str]:
    """Returns the training split at `side` pixels, its files, and what packing took."""
    from cv_platform.datasets.packing import open_split, pack_images
    from cv_platform.datasets.versions import checkout_version

    model = experiment.model.model_copy(update={"input_size": InputSize(h=side, w=side)})
    version = checkout_version(experiment.dataset, model, home=home)
    begin = time.process_time()
    packed = pack_images(version, model, quarantined=(), home=home)
    packing_us = 1e6 * (time.process_time() - begin) / sum(packed.counts.values())
    train = open_split(packed, "train")
    rows = np.resize(np.arange(len(train.targets)), max(EPOCH[side], len(train.targets)))
    paths = [version.directory / train.paths[row] for row in rows]
    train = PackedSplit(np.asarray(train.images)[rows], train.targets[rows], train.paths, train.sha256)
    note = f"packing {len(train.paths)} images at {side} px, once per dataset version: {packing_us:.0f} CPU µs each"
    return train, paths, note


def _augmentations() -> Mapping[str, AugmentConfig]:
    """Returns the random operations: of the original's experiment as it is shipped, and the original's own set."""
    animals = load_experiment(REPOSITORY / "configs" / "examples" / "animals10.yaml")
    return {"animals10": animals.train.augment, "the original's set": AugmentConfig(operations=("original",))}


def _ways(what: str, train: PackedSplit, paths: list[Path], augment: AugmentConfig, seed: int) -> list[Alternative]:
    from cv_platform.training.augmentation import Augmenter
    from cv_platform.training.batches import ShuffledBatches

    classes = int(train.targets.max()) + 1
    pipeline = original_input.dataset(
        paths,
        train.targets,
        classes=classes,
        image_size=(train.images.shape[1], train.images.shape[2]),
        batch_size=BATCH_SIZE,
        augment=augment,
        seed=seed,
    )
    ways = [Alternative(f"original, {what}", in_process(lambda: _walk(lambda epoch: pipeline)))]
    for engine in ("fused", "imgaug"):
        batches = ShuffledBatches(
            train.images,
            train.targets,
            classes=classes,
            batch_size=BATCH_SIZE,
            augmenter=Augmenter(augment.model_copy(update={"engine": engine}), seed=seed),
        )
        ways.append(Alternative(f"{engine}, {what}", in_process(_trainings(batches))))
    return ways


def _trainings(batches: Any) -> Callable[[], int]:
    # One iterator for all epochs, as the fit has.
    return lambda: _walk(lambda index: batches.dataset(0, EPOCHS))


def _walk(epoch: Callable[[int], Iterable[tuple[np.ndarray, np.ndarray]]]) -> int:
    """Walks whole epochs for at least `MINIMUM_SECONDS` and returns the number of images seen."""
    images, index = 0, 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < MINIMUM_SECONDS:
        for batch, _ in epoch(index):
            images += int(batch.shape[0])
        index += 1
    return images


class _Clock:
    """Takes the place of an MLflow run: notes what each epoch takes, and lets something else run after it."""

    run_id = "clock"

    def __init__(self, then: Callable[[], None]) -> None:
        self.epochs: list[Observation] = []
        self._then = then
        self._began = time.perf_counter(), time.process_time()

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        wall, cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]
        self.epochs.append(Observation(units=STEPS * BATCH_SIZE, wall_seconds=wall, cpu_seconds=cpu))
        self._then()
        self._began = time.perf_counter(), time.process_time()

    def log_curve(self, name: str, points: Mapping[int, float]) -> None:
        """Takes the loss within an epoch."""


def _trained(
    experiment: ExperimentConfig, train: PackedSplit, options: Options
) -> tuple[dict[str, list[Observation]], tuple[float, float]]:
    """Trains by turns in a bare loop and by the platform's fit.

    Returns both, and the share of the loop's steps that they wait for their batches, and for one that is there already.
    """
    from cv_platform.training.fitting import fit_model

    side, count = train.images.shape[1], STEPS * BATCH_SIZE
    rows = np.resize(np.arange(len(train.targets)), count)
    many = PackedSplit(np.asarray(train.images)[rows], train.targets[rows], [], [])
    few = PackedSplit(many.images[:BATCH_SIZE], many.targets[:BATCH_SIZE], [], [])
    config = experiment.with_fields(
        {
            "model.input_size": {"h": side, "w": side},
            "model.architecture": "resnet9s",
            "train.epochs": options.rounds + 1,
            "train.batch_size": BATCH_SIZE,
            "train.augment": _augmentations()["animals10"].model_copy(update={"engine": "fused"}).model_dump(),
        }
    )
    loop, bare, waits = _BareLoop(config, many), list[Observation](), list[tuple[float, float]]()

    def by_turns() -> None:
        seen, waited = loop.epoch()
        same, waited_for_nothing = loop.epoch(of_one=True)
        bare.append(seen)
        waits.append((waited / seen.wall_seconds, waited_for_nothing / same.wall_seconds))
        options.say(f"  fit and bare loop, round {len(bare)}/{options.rounds + 1}")

    clock = _Clock(by_turns)
    with tempfile.TemporaryDirectory(prefix="cv-bench-fit-") as work:
        fit_model(config, many, few, folder=Path(work), run=cast(Any, clock))
    # The first epoch builds the graphs.
    waited, least = np.median(waits[1:], axis=0)
    return {"bare loop": bare[1:], "fit": clock.epochs[1:]}, (float(waited), float(least))


class _BareLoop:
    """The same network, loss, optimizer and batches, in the shortest compiled loop."""

    def __init__(self, config: ExperimentConfig, split: PackedSplit) -> None:
        import keras
        import tensorflow as tf

        from cv_platform.training.augmentation import Augmenter
        from cv_platform.training.batches import ShuffledBatches
        from cv_platform.training.network import build_model
        from cv_platform.training.schedules import build_optimizer

        train = config.train
        network = build_model(config.model, weight_decay=train.weight_decay, seed=train.seed)
        optimizer = build_optimizer(train, total_steps=train.epochs * STEPS)
        optimizer.build(network.trainable_variables)
        loss: Any = keras.losses.CategoricalCrossentropy(label_smoothing=train.label_smoothing)
        batches = ShuffledBatches(
            split.images,
            split.targets,
            classes=len(config.model.classes),
            batch_size=train.batch_size,
            augmenter=Augmenter(train.augment, seed=train.seed),
        )
        self._batches: Any = iter(batches.dataset(0, train.epochs + 1))
        self._one: Any = iter(tf.data.Dataset.from_tensors(next(self._batches)).repeat())

        # The batch is drawn within, as Keras does: after a step `next` takes Python milliseconds, of a constant too.
        # Everything else waits for it: otherwise what needs no images, as the penalties, is computed in the meantime,
        # and a step that computes counts as one that waits (0.035 of a step for a constant).
        @tf.function
        def step(iterator: Any) -> tuple[Any, Any]:
            asked = tf.timestamp()
            with tf.control_dependencies([asked]):
                images, targets = next(iterator)
            with tf.control_dependencies([images]):
                waited = tf.timestamp() - asked
            with tf.control_dependencies([waited]):
                with tf.GradientTape() as tape:
                    total = loss(targets, network(images, training=True)) + tf.add_n(network.losses)
                variables: Any = network.trainable_variables
                optimizer.apply(tape.gradient(total, variables), variables)
            return total, waited

        self._step: Any = step

    def epoch(self, *, of_one: bool = False) -> tuple[Observation, float]:
        """Returns what the next epoch took, and the seconds of it that were spent waiting for batches.

        With `of_one` it is shorter, and each step has the same batch.
        """
        batches, steps = (self._one, STEPS // 4) if of_one else (self._batches, STEPS)
        waited, begin, begin_cpu = 0.0, time.perf_counter(), time.process_time()
        for _ in range(steps):
            loss, waiting = self._step(batches)
            float(loss)
            waited += float(waiting)
        seen = Observation(
            units=steps * BATCH_SIZE,
            wall_seconds=time.perf_counter() - begin,
            cpu_seconds=time.process_time() - begin_cpu,
        )
        return seen, waited


def _at_least(ratio: Ratio, least: float) -> Check:
    return Check(
        what=f"{ratio.numerator} / {ratio.denominator}, CPU time",
        expected=f"≥ {least:g}",
        received=f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
        held=ratio.median >= least,
    )


def _at_most(what: str, value: float, most: float) -> Check:
    return Check(what=what, expected=f"≤ {most:g}", received=f"{value:.4f}", held=value <= most)
