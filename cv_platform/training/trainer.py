"""Trains the model of an experiment on a packed dataset version, and keeps it with its provenance.

A training's folder, `<directory>/<model_name>/<version>/`, appears at once, complete:

    <model_name>.keras      the network: uncompiled, float32, weights of the best epoch, its temperature in them
    history.json            metric by name, a value per epoch
    config.json             the effective config
    learning_curves.png
    trained_model.json      this module's `TrainedModel`

The work under way is beside it in `.training-…` and is what a killed training resumes from. The fit itself is
`fitting.fit_model`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cv_platform.config import ExperimentConfig
from cv_platform.datasets.packing import PackedImages, open_split
from cv_platform.errors import TrainingError
from cv_platform.images import preprocessing_hash
from cv_platform.storage import new_version
from cv_platform.training.calibration import calibrate
from cv_platform.training.callbacks import write_history
from cv_platform.training.fitting import FittedModel, fit_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cv_platform.tracking import MlflowRun

logger = logging.getLogger(__name__)


class TrainedModel(BaseModel):
    """A trained model: where it is and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name: str
    version: str
    directory: Path
    keras_path: Path
    dvc_md5: str
    dvc_tag: str
    ds_name: str
    preprocessing_hash: str
    pack: str
    """Name of the packed images' folder: data version, preprocessing, splits and quarantine in one."""
    class_names: tuple[str, ...]
    classifier_type: Literal["multi-class", "multi-label"]
    image_size: tuple[int, int] = Field(description="(height, width) in pixels")
    epochs_run: int
    best_epoch: int = Field(description="from 1: the epoch whose weights are kept")
    temperature: float = Field(
        default=1.0, description="by which the logits were divided, in the weights: see calibration"
    )
    history: dict[str, list[float]] = Field(description="metric by name, a value per epoch")
    seconds: float
    images_per_second: float
    mlflow_run_id: str | None = None
    git_commit: str | None = None
    effective_config: dict[str, Any]


def train_model(
    packed: PackedImages,
    config: ExperimentConfig,
    *,
    directory: Path,
    run: MlflowRun | None = None,
    git_commit: str | None = None,
    resume_key: str | None = None,
    spare_bytes: int | None = None,
) -> TrainedModel:
    """Trains `config.model` with `config.train` on the split `train`.

    The split `valid` chooses the best epoch, and the temperature of its confidences.

    Same config, same pixels, same machine: same weights.

    Args:
        packed: the pixels.
        config: the experiment.
        directory: parent of all models' folders.
        run: active MLflow run; gets parameters, metrics, files, and the registered model version.
        git_commit: of the code and configs, for the record.
        resume_key: names this training. When a training with the same key, config and data was killed, this one goes on
            after its last complete epoch and ends with the weights that it would have had. None starts afresh.
        spare_bytes: see `disk_space.require_free_space`.

    Returns:
        The trained model, whose folder exists.

    Raises:
        TrainingError: data and config do not belong together (all mismatches are listed), the same key is being
            trained already, the network cannot be built, or the loss diverges.
        TrackingError: MLflow refuses the parameters at the start, or the files at the end; with a `resume_key` a retry
            then trains no epoch again.
    """
    _check(packed, config)
    model_name = config.model.model_name
    fingerprint = _fingerprint(packed, config)
    train, valid = open_split(packed, "train"), open_split(packed, "valid")
    if run is not None:
        run.set_tags(_provenance(packed, git_commit))
        run.log_params(config.model_dump(mode="json", include={"model", "dataset", "train"}))
    parent = directory / model_name
    parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(parent, resume_key) as work:
        fitted = fit_model(
            config.model,
            config.train,
            train_images=train.images,
            train_targets=train.targets,
            valid_images=valid.images,
            valid_targets=valid.targets,
            folder=work,
            fingerprint=fingerprint,
            run=run,
            spare_bytes=spare_bytes,
        )
        # On a network that was only just read from the work folder, which a retry finds as it was: never twice.
        temperature = (
            calibrate(fitted.network, valid.images, valid.targets, config.model.classifier_type)
            if config.train.temperature_scaling
            else 1.0
        )
        trained = _publish(fitted, temperature, packed, config, parent=parent, run=run, git_commit=git_commit)
        logger.info("wrote %s", trained.directory)
        if run is not None:
            # Inside: when MLflow is away, the work folder stays, and a retry finds a finished training in it.
            _log(run, trained)
    return trained


def _check(packed: PackedImages, config: ExperimentConfig) -> None:
    model = config.model
    pairs = [
        ("model.classes", tuple(model.classes), tuple(packed.class_names)),
        ("model.classifier_type", model.classifier_type, packed.classifier_type),
        ("model.input_size (height, width)", model.image_size, tuple(packed.image_size)),
        ("preprocessing", preprocessing_hash(model.image_size), packed.preprocessing_hash),
        ("dataset.ds_name", config.dataset.ds_name, packed.ds_name),
    ]
    wrong = [
        f"  {name}: config has {mine}, packed images have {theirs}" for name, mine, theirs in pairs if mine != theirs
    ]
    wrong += [
        f"  split {split}: expected at least one image, packed images have none"
        for split in ("train", "valid")
        if packed.counts.get(split, 0) == 0
    ]
    if wrong:
        raise TrainingError(
            "Expected packed images that belong to this config. Received:\n"
            + "\n".join(wrong)
            + "\nMaterialise packed_images again with this config."
        )


def _fingerprint(packed: PackedImages, config: ExperimentConfig) -> str:
    """Of everything that decides the weights: two trainings with the same one are the same training."""
    import keras
    import tensorflow as tf

    train = config.train.model_dump(mode="json", exclude={"mlflow"})
    parts = {
        "model": config.model.model_dump(mode="json", exclude={"drift_detection"}),
        "train": train,
        # Named after the data version and everything else that decides a pixel or target, the quarantine included.
        "pack": packed.directory.name,
        "versions": [keras.__version__, tf.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _provenance(packed: PackedImages, git_commit: str | None) -> dict[str, str]:
    return {
        "ds_name": packed.ds_name,
        "dvc_tag": packed.dvc_tag,
        "dvc_md5": packed.dvc_md5,
        "preprocessing_hash": packed.preprocessing_hash,
        **({"git_commit": git_commit} if git_commit else {}),
    }


@contextmanager
def _work_folder(parent: Path, resume_key: str | None) -> Iterator[Path]:
    """Yields the folder of the work under way: kept when the training stops early and has a key, removed otherwise."""
    if resume_key is None:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".training-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    from filelock import FileLock, Timeout

    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", resume_key)[:40]
    folder = parent / f".training-{readable}-{hashlib.sha256(resume_key.encode()).hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as err:
        raise TrainingError(
            f"Expected one training with the key {resume_key}. Received: a second, while the first still runs. "
            "Wait for it, or stop it."
        ) from err
    try:
        folder.mkdir(exist_ok=True)  # Another training may have finished, and removed it, before the lock was ours.
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()


def _publish(
    fitted: FittedModel,
    temperature: float,
    packed: PackedImages,
    config: ExperimentConfig,
    *,
    parent: Path,
    run: MlflowRun | None,
    git_commit: str | None,
) -> TrainedModel:
    """Writes the folder beside its place and renames it, so that it is there completely or not at all."""
    version = new_version()
    model_name = config.model.model_name
    directory = parent / version
    trained = TrainedModel(
        model_name=model_name,
        version=version,
        directory=directory,
        keras_path=directory / f"{model_name}.keras",
        dvc_md5=packed.dvc_md5,
        dvc_tag=packed.dvc_tag,
        ds_name=packed.ds_name,
        preprocessing_hash=packed.preprocessing_hash,
        pack=packed.directory.name,
        class_names=tuple(packed.class_names),
        classifier_type=config.model.classifier_type,
        image_size=config.model.image_size,
        epochs_run=len(fitted.history["loss"]),
        best_epoch=fitted.best_epoch,
        temperature=temperature,
        history=fitted.history,
        seconds=fitted.seconds,
        images_per_second=fitted.images_per_second,
        mlflow_run_id=None if run is None else run.run_id,
        git_commit=git_commit,
        effective_config=config.model_dump(mode="json"),
    )
    with tempfile.TemporaryDirectory(dir=parent, prefix=".writing-", ignore_cleanup_errors=True) as scratch:
        beside = Path(scratch) / version
        beside.mkdir()
        fitted.network.save(beside / trained.keras_path.name)
        write_history(beside / "history.json", fitted.history)
        (beside / "config.json").write_text(
            json.dumps(trained.effective_config, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        learning_curves(fitted.history, best_epoch=fitted.best_epoch).savefig(beside / "learning_curves.png")
        (beside / "trained_model.json").write_text(trained.model_dump_json(indent=1), encoding="utf-8")
        beside.replace(directory)
    return trained


def learning_curves(history: dict[str, list[float]], *, best_epoch: int) -> Figure:
    """Draws cross-entropy and accuracy over the epochs, of training and validation, with the kept epoch marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)  # Without pyplot: no global state, and no window system.
    epochs = range(1, len(history["loss"]) + 1)
    for axes, metric, title in zip(
        figure.subplots(1, 2), ("cross_entropy", "accuracy"), ("cross-entropy", "accuracy"), strict=True
    ):
        axes.plot(epochs, history[metric], marker=".", label="train (augmented)")
        axes.plot(epochs, history[f"val_{metric}"], marker=".", label="valid")
        axes.axvline(best_epoch, color="grey", linestyle=":", label=f"kept: epoch {best_epoch}")
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def _log(run: MlflowRun, trained: TrainedModel) -> None:
    best = trained.best_epoch - 1
    run.log_metrics(
        {
            "best_epoch": trained.best_epoch,
            "best_val_cross_entropy": trained.history["val_cross_entropy"][best],
            "best_val_accuracy": trained.history["val_accuracy"][best],
            "training_seconds": trained.seconds,
            "temperature": trained.temperature,
        },
        step=trained.epochs_run,
    )
    for name in ("config.json", "history.json", "learning_curves.png", "trained_model.json"):
        run.log_artifact(trained.directory / name, "training")
    artifact_path = run.log_artifact(trained.keras_path, "model")
    run.set_tags({"version": trained.version, "model_name": trained.model_name})
    run.register_model_version(
        trained.model_name,
        trained.version,
        artifact_path=artifact_path,
        tags={
            "ds_name": trained.ds_name,
            "dvc_tag": trained.dvc_tag,
            "dvc_md5": trained.dvc_md5,
            "preprocessing_hash": trained.preprocessing_hash,
        },
    )
