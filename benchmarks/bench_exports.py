"""What the exports of a model lose, weigh and cost beside its ONNX file, and the graph in 8 bits that may be served.

`efficientnet_lite0` gets its head only, then a short fine-tuning, `small_cnn` a short training: what 8 bits lose
depends on the weights, what they cost does not. Of the 359 digits of the test split the standard error of what is lost
can be as large as the point that is permitted; an archive with 2,000 test images says more.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

import numpy as np

from benchmarks.bench_input_pipeline import archive_experiment
from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import Options
from cv_platform.config import DeployConfig, ExperimentConfig, ExportFormat, InputSize, ModelConfig, TransferConfig
from cv_platform.evaluation.latency import milliseconds
from cv_platform.records import Export, PackedImages

NETWORKS = {
    "efficientnet_lite0, head": ("efficientnet_lite0", 96, 0),
    "efficientnet_lite0, fine-tuned": ("efficientnet_lite0", 96, 12),
    "small_cnn": ("small_cnn", 48, 4),
}
"""Architecture, side in pixels, and epochs after the head, where there is one."""
MOST_SHOWN = 27_000
"""Images of all epochs: a few CPU-minutes of fine-tuning, however many images an archive has."""
MOST_LOSS, MOST_SIZE, MOST_LATENCY = 0.01, 0.35, 0.7
_TURNS = 5
"""Times that both graphs are measured in turns; each beside the Keras network it was 0.6 to 0.7 in place of 0.55."""
LIBRARIES = ("onnxruntime", "tensorflow", "keras", "numpy")


def run(options: Options) -> Report:
    """Trains each network on the digits or on the images of `options.archive`, and exports it in every format."""
    clock = Stopwatch()
    notes, checks = list[str](), list[Check]()
    with tempfile.TemporaryDirectory(prefix="cv-bench-exports-") as folder:
        experiment = archive_experiment(options.archive, Path(folder))
        for name, (architecture, side, epochs) in NETWORKS.items():
            options.say(f"training {name} at {side} px …")
            made, latency = _exports(experiment, Path(folder), architecture, side, epochs)
            found = {export.format: export for export in made}
            notes += [f"{name}: {_line(export)}" for export in found.values()]
            checks += _judge(name, found["onnx"], found["onnx_int8"], latency)
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


def _exports(
    experiment: ExperimentConfig, home: Path, name: str, side: int, epochs: int
) -> tuple[tuple[Export, ...], float]:
    """Returns what was measured of all formats, and the CPU time of 8 bits over that of 32, measured in turns."""
    from cv_platform.datasets.packing import open_split, pack_images
    from cv_platform.datasets.versions import checkout_version
    from cv_platform.deployment.exports import open_onnx, write_exports
    from cv_platform.training.trainer import train_model

    size = InputSize(h=side, w=side)
    model: ModelConfig = experiment.model.model_copy(update={"architecture": name, "input_size": size})
    recipe = {"epochs": epochs, "optimizer": "adam", "init_lr": 1e-3, "batch_size": 32, "max_images_shown": MOST_SHOWN}
    train = experiment.train.model_copy(update=recipe)
    if name == "efficientnet_lite0":
        train = train.model_copy(update={"transfer": TransferConfig(freeze_until=3)})
    changed = experiment.model_copy(update={"model": model, "train": train, "deploy": DeployConfig()})
    packed: PackedImages = pack_images(
        checkout_version(changed.dataset, model, home=home), model, quarantined=(), home=home
    )
    trained = train_model(packed, changed, directory=home / "models")
    # All are measured: what is lost is for the checks.
    deploy = DeployConfig(exports=get_args(ExportFormat), max_export_loss=1.0)
    test, calibration = (open_split(packed, split, beside=trained) for split in ("test", "train"))
    made = write_exports(trained, deploy, test=test, train=calibration, threshold=model.threshold)
    files = {export.format: trained.exports_directory / export.file for export in made if export.file}
    if not {"onnx", "onnx_int8"} <= set(files):
        return made, float("nan")
    answers = [open_onnx(files[kind]) for kind in ("onnx", "onnx_int8")]
    whole, int8 = np.median([milliseconds(answers, np.asarray(test.images[:8])) for _ in range(_TURNS)], axis=0)
    return made, float(int8 / whole)


def _line(export: Export) -> str:
    if export.refused or export.accuracy is None or export.model_accuracy is None:
        return f"{export.format}: {export.refused}"
    return (
        f"{export.format}: {export.accuracy:.4f} of {export.images} right, Keras {export.model_accuracy:.4f}, "
        f"standard error of what is lost {export.loss_error:.4f}, "
        f"agreement {export.agreement:.4f}, largest difference {export.largest_difference:.2g}; "
        f"{export.cpu_ms:.2f} CPU-ms, Keras {export.model_cpu_ms:.2f}; {export.megabytes:.2f} MB"
    )


def _judge(name: str, whole: Export, int8: Export, latency: float) -> list[Check]:
    lost = (int8.model_accuracy or 0.0) - (int8.accuracy or 0.0)
    size = (int8.megabytes or 0.0) / (whole.megabytes or 1.0)
    error = f", standard error {int8.loss_error or 0.0:.4f}, of {int8.images}"
    return [
        Check(
            what=f"{name}: {what}, onnx_int8",
            expected=f"≤ {most:g}",
            received=f"{value:.4f}{more}",
            held=int8.accuracy is not None and value <= most + 1e-9,
        )
        for what, most, value, more in (
            ("share of right images lost", MOST_LOSS, lost, error),
            ("size / onnx", MOST_SIZE, size, ""),
            ("CPU time / onnx", MOST_LATENCY, latency, ""),
        )
    ]
