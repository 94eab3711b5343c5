"""What the exports of a model lose, weigh and cost beside its ONNX file, and the graph in 8 bits that may be served.

`efficientnet_lite0` gets its head only, `small_cnn` a short training: what 8 bits lose depends on the weights, what
they cost does not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

from benchmarks.bench_input_pipeline import archive_experiment
from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import Options
from cv_platform.config import DeployConfig, ExperimentConfig, ExportFormat, InputSize, ModelConfig
from cv_platform.records import Export, PackedImages

NETWORKS = {"efficientnet_lite0": (96, 0), "small_cnn": (48, 4)}
"""Side in pixels, and epochs after the head, where there is one: two CPU-minutes in all."""
MOST_LOSS, MOST_SIZE, MOST_LATENCY = 0.01, 0.35, 0.7
LIBRARIES = ("onnxruntime", "tensorflow", "keras", "numpy")


def run(options: Options) -> Report:
    """Trains each network on the digits or on the images of `options.archive`, and exports it in every format."""
    clock = Stopwatch()
    notes, checks = list[str](), list[Check]()
    with tempfile.TemporaryDirectory(prefix="cv-bench-exports-") as folder:
        experiment = archive_experiment(options.archive, Path(folder))
        for name, (side, epochs) in NETWORKS.items():
            options.say(f"training {name} at {side} px …")
            found = {export.format: export for export in _exports(experiment, Path(folder), name, side, epochs)}
            notes += [f"{name}: {_line(export)}" for export in found.values()]
            checks += _judge(name, found["onnx"], found["onnx_int8"])
    return Report(
        name="exports",
        title=f"Exports beside the model, {experiment.dataset.ds_name}",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"ds_name": experiment.dataset.ds_name},
        observations={},
        ratios=[],
        checks=checks,
        notes=notes,
    )


def _exports(experiment: ExperimentConfig, home: Path, name: str, side: int, epochs: int) -> tuple[Export, ...]:
    from cv_platform.datasets.packing import open_split, pack_images
    from cv_platform.datasets.versions import checkout_version
    from cv_platform.deployment.exports import write_exports
    from cv_platform.training.trainer import train_model

    size = InputSize(h=side, w=side)
    model: ModelConfig = experiment.model.model_copy(update={"architecture": name, "input_size": size})
    recipe = {"epochs": epochs, "optimizer": "adam", "init_lr": 1e-3, "batch_size": 32}
    changed = experiment.model_copy(
        update={"model": model, "train": experiment.train.model_copy(update=recipe), "deploy": DeployConfig()}
    )
    packed: PackedImages = pack_images(
        checkout_version(changed.dataset, model, home=home), model, quarantined=(), home=home
    )
    trained = train_model(packed, changed, directory=home / "models")
    # All are measured: what is lost is for the checks.
    deploy = DeployConfig(exports=get_args(ExportFormat), max_export_loss=1.0)
    test, train = (open_split(packed, split, beside=trained) for split in ("test", "train"))
    return write_exports(trained, deploy, test=test, train=train, threshold=model.threshold)


def _line(export: Export) -> str:
    if export.refused or export.accuracy is None or export.model_accuracy is None:
        return f"{export.format}: {export.refused}"
    return (
        f"{export.format}: {export.accuracy:.4f} of {export.images} right, Keras {export.model_accuracy:.4f}, "
        f"agreement {export.agreement:.4f}, largest difference {export.largest_difference:.2g}; "
        f"{export.cpu_ms:.2f} CPU-ms, Keras {export.model_cpu_ms:.2f}; {export.megabytes:.2f} MB"
    )


def _judge(name: str, whole: Export, int8: Export) -> list[Check]:
    lost = (whole.accuracy or 0.0) - (int8.accuracy or 0.0)
    size = (int8.megabytes or 0.0) / (whole.megabytes or 1.0)
    latency = (int8.cpu_ms or 0.0) / (whole.cpu_ms or 1.0)
    return [
        Check(what=f"{name}: {what}, onnx_int8", expected=f"≤ {most:g}", received=f"{value:.3f}", held=value <= most)
        for what, most, value in (
            ("share of right images lost", MOST_LOSS, lost),
            ("size / onnx", MOST_SIZE, size),
            ("CPU time / onnx", MOST_LATENCY, latency),
        )
    ]
