"""Training by two processes of one core each against one of one core: images per second, and where the loss ends.

The same packed images, the same batches. The seconds are those of the epochs but the first, without the start of the
processes; a run of several processes has to wait for the slowest of them, so the machine should be quiet.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from benchmarks.harness import (
    Alternative,
    Check,
    Observation,
    Report,
    Stopwatch,
    compare,
    machine_line,
    measure_interleaved,
)
from benchmarks.installation import scratch_folder
from benchmarks.options import Options
from cv_platform.config import ExperimentConfig, parse_experiment
from cv_platform.records import PackedImages

IMAGES, SIDE_PX, BATCH, EPOCHS = 2048, 32, 128, 4
SCALING, LOSS_TOLERANCE = 1.6, 0.1
"""Of the loss: relative, between the last epochs. Batch normalisation sees a share's images, not the batch's."""


def run(options: Options) -> Report:
    """Compares them."""
    clock = Stopwatch()
    with scratch_folder("together") as folder:
        packed, config = _packed(folder)
        observations = measure_interleaved(
            [
                Alternative(name, _training(packed, config, workers, folder))
                for name, workers in (("one worker", 1), ("two workers", 2))
            ],
            rounds=options.rounds,
            warm_up=0,
            say=options.say,
        )
    losses = {
        name: float(np.median([one.metrics["last_loss"] for one in found])) for name, found in observations.items()
    }
    ratio = compare(observations, "two workers", "one worker", "units_per_second", seed=options.seed)
    ratios = [] if ratio is None else [ratio]
    difference = abs(losses["two workers"] / losses["one worker"] - 1)
    return Report(
        name="together",
        title="Training by two processes of one core each",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(("tensorflow", "keras")),
        settings={"architecture": config.model.architecture, "images": IMAGES, "batch_size": BATCH, "epochs": EPOCHS},
        observations=observations,
        ratios=ratios,
        checks=[
            *(
                Check(
                    what="images per second, two workers / one",
                    expected=f"≥ {SCALING}",
                    received=f"{one.median:.2f}",
                    held=one.median >= SCALING,
                )
                for one in ratios
            ),
            Check(
                what="loss of the last epoch, two workers beside one",
                expected=f"differs by at most {LOSS_TOLERANCE:.0%}",
                received=f"{losses['two workers']:.4f} and {losses['one worker']:.4f}, {difference:.1%}",
                held=difference <= LOSS_TOLERANCE,
            ),
        ],
    )


def _training(packed: PackedImages, config: ExperimentConfig, workers: int, scratch: Path) -> Callable[[], Observation]:
    from cv_platform.training.callbacks import read_state
    from cv_platform.training.together import train_together

    changed = config.with_fields({"train.workers": workers})

    def measure() -> Observation:
        cores = os.sched_getaffinity(0)
        folder = Path(tempfile.mkdtemp(dir=scratch))
        os.sched_setaffinity(0, sorted(cores)[:workers])
        try:
            train_together(packed, changed, folder)
        finally:
            os.sched_setaffinity(0, cores)
        state = read_state(folder)
        assert state is not None
        rates = state.history["images_per_second"][1:]
        losses = {"last_loss": state.history["loss"][-1], "last_val_loss": state.history["val_loss"][-1]}
        return Observation(
            units=IMAGES * len(rates),
            wall_seconds=sum(IMAGES / rate for rate in rates),
            cpu_seconds=None,
            metrics=losses,
        )

    return measure


def _packed(folder: Path) -> tuple[PackedImages, ExperimentConfig]:
    """Packs images of two classes, noise of two colours, for resnet9s."""
    from cv_platform.datasets.manifest import build_manifest
    from cv_platform.datasets.packing import pack_images
    from cv_platform.records import DatasetVersion, Provenance

    classes, root = ("blue", "red"), folder / "version"
    config = parse_experiment(
        {
            "name": "together",
            "model": {
                "model_name": "together_classifier",
                "classes": list(classes),
                "input_size": {"h": SIDE_PX, "w": SIDE_PX},
                "architecture": "resnet9s",
            },
            "dataset": {"ds_name": "together", "dvc_tag": "v1"},
            "train": {"epochs": EPOCHS, "batch_size": BATCH, "optimizer": "sgd", "init_lr": 0.05},
        },
        origin="benchmarks.bench_together",
    )
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES // 2), ("valid", 64), ("test", 2), ("reference", 2)):
        for channel, name in ((0, "blue"), (2, "red")):
            target = root / "images" / split / name
            target.mkdir(parents=True)
            for index in range(count):
                image = rng.integers(0, 216, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
                image[:, :, channel] += rng.integers(0, 40, dtype=np.uint8)
                cv2.imwrite(str(target / f"{index:04}.png"), image)
    manifest = build_manifest(root, data_path="images", annotations=None, model=config.model, dataset=config.dataset)
    version = DatasetVersion(
        provenance=Provenance(ds_name="together", dvc_tag="v1", dvc_md5="0" * 32),
        git_commit="0" * 40,
        directory=root,
        manifest=manifest.name,
        class_names=classes,
    )
    return pack_images(version, config.model, quarantined=(), home=folder / "home"), config
