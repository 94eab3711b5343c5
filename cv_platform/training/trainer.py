"""Trains the model of an experiment on a packed dataset version, and keeps it with its provenance.

A training's folder, `<directory>/<model_name>/<version>/`, appears at once, complete:

    <model_name>.keras      the network: uncompiled, float32, weights of the best epoch, its temperature in them
    history.json            metric by name, a value per epoch
    config.json             the effective config
    learning_curves.png
    augmented_images.png    an image of each class, as it is and as epochs show it
    trained_model.json      the record, see `records.TrainedModel`

The work under way is beside it in `.training-<recipe>`, and is what a killed training goes on from: the folder is named
after everything that decides the weights, and `recipe.json` in it says what that was. The fit itself is
`fitting.fit_model`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import cv2

from cv_platform import encoders, training
from cv_platform.config import ExperimentConfig
from cv_platform.datasets.packing import open_split
from cv_platform.errors import LockHeldError, TrainingError
from cv_platform.files import exclusive, file_sha256, whole_directory, write_file
from cv_platform.images import Preprocessing, preprocessing_hash
from cv_platform.records import ModelIdentity, PackedImages, TrainedModel
from cv_platform.storage import VERSION_PATTERN, new_version
from cv_platform.tracking import CHALLENGER, flatten
from cv_platform.training.architectures._users import find_source
from cv_platform.training.augmentation import Augmenter, augmented_sheet
from cv_platform.training.calibration import calibrate
from cv_platform.training.callbacks import write_history
from cv_platform.training.devices import devices_of
from cv_platform.training.fitting import FittedModel, fit_model
from cv_platform.training.network import resolve_precision
from cv_platform.training.together import train_elsewhere, train_together

if TYPE_CHECKING:
    import keras
    from matplotlib.figure import Figure

    from cv_platform.compute.engine import Engine
    from cv_platform.tracking import MlflowRun

logger = logging.getLogger(__name__)

_LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"
RECIPE = "recipe.json"
"""In the folder of the work under way: what decides the weights, by name."""
AUGMENTED_IMAGES = "augmented_images.png"
"""In a model's folder; models of earlier releases have none."""


def train_model(
    packed: PackedImages,
    config: ExperimentConfig,
    *,
    directory: Path,
    run: MlflowRun | None = None,
    git_commit: str | None = None,
    spare_bytes: int | None = None,
    engine: Engine | None = None,
    launch: Callable[[Path], None] | None = None,
) -> TrainedModel:
    """Trains `config.model` with `config.train` on the split `train`.

    The split `valid` chooses the best epoch, and the temperature of its confidences.

    Same config, same pixels, same machine: same weights. When such a training was killed, this one goes on after its
    last whole epoch, to the weights that it would have had; otherwise a line in the log says what has changed.

    Args:
        packed: the pixels.
        config: the experiment.
        directory: parent of all models' folders.
        run: active MLflow run; gets parameters, metrics, files, and the registered model version.
        git_commit: of the code and configs, for the record.
        spare_bytes: see `files.require_free_space`.
        engine: of `train.workers`, see `together.train_together`.
        launch: of `train.job_gpus`, see `together.train_elsewhere`.

    Returns:
        The trained model, whose folder exists.

    Raises:
        TrainingError: data and config do not belong together (all mismatches are listed), the same training is under
            way already, the network cannot be built, or the loss diverges.
        TrackingError: MLflow refuses the parameters at the start, or the files at the end; another attempt then trains
            no epoch again.
    """
    _check(packed, config)
    resolved = with_own_weights(config, directory)
    model_name = config.model.model_name
    train, valid = open_split(packed, "train"), open_split(packed, "valid")
    if run is not None:
        run.set_tags({**_tags(packed), **_code_tags(git_commit)})
        run.log_params(config.model_dump(mode="json", include={"model", "dataset", "train"}))
    parent = directory / model_name
    parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(parent, _recipe(packed, resolved)) as work:
        if launch is not None:
            train_elsewhere(packed, resolved, work, launch)
        elif resolved.train.workers > 1:
            train_together(packed, resolved, work, engine=engine)
        fitted = fit_model(resolved, train, valid, folder=work, run=run, spare_bytes=spare_bytes)
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


def mismatches(packed: PackedImages, config: ExperimentConfig) -> list[str]:
    """Returns what keeps packed images and a config from belonging together, a line each."""
    model, task = config.model, packed.task
    pairs = [
        ("model.classes", model.classes, task.class_names),
        ("model.classifier_type", model.classifier_type, task.classifier_type),
        ("model.input_size (height, width)", model.image_size, task.image_size),
        ("preprocessing", preprocessing_hash(model.image_size, Preprocessing.of(model)), task.preprocessing_hash),
        ("train.pack_scale", config.train.pack_scale, packed.pack_scale),
        ("dataset.ds_name", config.dataset.ds_name, packed.provenance.ds_name),
    ]
    wrong = [
        f"  {name}: config has {mine}, packed images have {theirs}" for name, mine, theirs in pairs if mine != theirs
    ]
    wrong += [
        f"  split {split}: expected at least one image, packed images have none"
        for split in ("train", "valid")
        if packed.counts.get(split, 0) == 0
    ]
    return wrong


def _check(packed: PackedImages, config: ExperimentConfig) -> None:
    if wrong := mismatches(packed, config):
        raise TrainingError(
            "Expected packed images that belong to this config. Received:\n"
            + "\n".join(wrong)
            + "\nMaterialise packed_images again with this config."
        )


def with_own_weights(config: ExperimentConfig, directory: Path) -> ExperimentConfig:
    """Returns the config with the file of `model.weights`, where that names a model trained here.

    Raises:
        TrainingError: there is no such model in `directory`.
    """
    weights = config.model.weights
    if (
        weights is None
        or Path(weights).exists()
        or not re.fullmatch(rf"[\w.-]+/{VERSION_PATTERN.strip('^$')}", weights)
    ):
        return config
    model_name, version = weights.split("/")
    file = directory / model_name / version / f"{model_name}.keras"
    if not file.is_file():
        trained = sorted(path.parent.name for path in (directory / model_name).glob(f"[0-9]*/{model_name}.keras"))
        raise TrainingError(
            f"model.weights: expected a model that was trained here. Received: {weights}, which is not in "
            f"{directory}. Of {model_name} there is {', '.join(trained[-5:]) or 'none'}."
        )
    return config.model_copy(update={"model": config.model.model_copy(update={"weights": str(file)})})


def _recipe(packed: PackedImages, config: ExperimentConfig) -> dict[str, str]:
    """Returns everything that decides the weights, by name: two trainings with the same recipe are the same."""
    import tensorflow as tf

    sections = {
        "model": config.model.model_dump(mode="json", exclude={"drift_detection"}),
        "train": config.train.model_dump(mode="json", exclude={"mlflow", "job_gpus"}),
    }
    code = hashlib.sha256()
    for folder in (training, encoders):
        for path in sorted(Path(folder.__path__[0]).rglob("*.py")):
            code.update(path.read_bytes())
    recipe = {name: json.dumps(value) for name, value in flatten(sections).items()}
    if config.model.weights and Path(config.model.weights).is_file():
        recipe["the content of model.weights"] = file_sha256(Path(config.model.weights))
    if ":" in config.model.architecture:
        source = find_source(config.model.architecture)
        recipe["the code of model.architecture"] = "" if source is None else file_sha256(source)
    return {
        **recipe,
        "what train.precision auto means on this machine": resolve_precision("auto"),
        "the devices that share a batch": ", ".join(devices_of(config.train)) or "none",
        # Named after the data version and everything else that decides a pixel or target, the quarantine included.
        "the packed images": packed.directory.name,
        "the code in cv_platform/training and cv_platform/encoders": code.hexdigest()[:12],
        **{f"the version of {name}": metadata.version(name) for name in ("keras", "imgaug", "numpy")},
        "the version of opencv": cv2.__version__,
        "the version of tensorflow": tf.__version__,  # Its package has other names on some machines.
    }


def _tags(made_from: PackedImages | TrainedModel) -> dict[str, str]:
    """Returns what MLflow shows of the data, of a run and of a registered version."""
    return {**made_from.provenance.model_dump(), "preprocessing_hash": made_from.task.preprocessing_hash}


def _code_tags(git_commit: str | None) -> dict[str, str]:
    """Returns what MLflow shows of the code: its commit, and the digest of the versions that it is installed with."""
    found = {"git_commit": git_commit} if git_commit else {}
    return found | ({"requirements_sha256": file_sha256(_LOCK)} if _LOCK.is_file() else {})


@contextmanager
def _work_folder(parent: Path, recipe: dict[str, str]) -> Iterator[Path]:
    """Yields the folder of the work under way: kept when the training stops early, removed when it ends."""
    content = json.dumps(recipe, sort_keys=True, indent=1)
    folder = parent / f".training-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    lock = folder.with_name(f"{folder.name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(lock, timeout_seconds=0.0))
        except LockHeldError as err:
            raise TrainingError(
                f"Expected one training of {parent.name} with this config and data. Received: a second, while the "
                f"first still runs (it holds {lock}). Wait for it, or stop it; then this one goes on from there."
            ) from err
        if not folder.exists():
            _say_why_not(parent, recipe)
        write_file(folder / RECIPE, content)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def _say_why_not(parent: Path, recipe: dict[str, str]) -> None:
    """Says in a line why this training does not go on with the latest that was killed, if there is one."""
    # With an epoch: others have nothing to go on with.
    killed = {path.parent for path in parent.glob(".training-*/epoch-*.json")}
    for folder in sorted(killed, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            theirs = json.loads((folder / RECIPE).read_bytes())
            changed = [_change(name, theirs.get(name), recipe.get(name)) for name in {**theirs, **recipe}]
        except (OSError, ValueError, AttributeError):
            continue  # Without its recipe nobody can go on with it, and garbage collection will take it.
        shown = [change for change in changed if change]
        more = f", and {len(shown) - 3} more" if len(shown) > 3 else ""
        logger.info(
            "starting at epoch 1: an unfinished training of %s is there, but not the same: %s%s",
            parent.name,
            ", ".join(shown[:3]),
            more,
        )
        return


def _change(name: str, before: str | None, now: str | None) -> str | None:
    if before == now:
        return None
    if not name.startswith(("model.", "train.")):
        return f"{name} changed"
    return f"{name} is {now or 'no more'} instead of {before or 'not given'}"


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
    """Writes the folder of the finished training."""
    model = ModelIdentity(model_name=config.model.model_name, version=new_version())
    trained = TrainedModel(
        model=model,
        provenance=packed.provenance,
        task=packed.task,
        pack=packed.directory.name,
        directory=parent / model.version,
        best_epoch=fitted.best_epoch,
        temperature=temperature,
        history=fitted.history,
        seconds=fitted.seconds,
        images_per_second=fitted.images_per_second,
        mlflow_run_id=None if run is None else run.run_id,
        git_commit=git_commit,
        effective_config=config.model_dump(mode="json"),
        weights_sha256=weights_sha256(fitted.network),
    )
    with whole_directory(trained.directory) as beside:
        fitted.network.save(beside / trained.keras_path.name)
        write_history(beside / "history.json", fitted.history)
        (beside / "config.json").write_text(
            json.dumps(trained.effective_config, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        learning_curves(fitted.history, best_epoch=fitted.best_epoch).savefig(beside / "learning_curves.png")
        augmenter = Augmenter(config.train.augment, seed=config.train.seed, image_size=packed.task.image_size)
        sheet = augmented_sheet(open_split(packed, "train"), packed.task.class_names, augmenter)
        (beside / AUGMENTED_IMAGES).write_bytes(sheet)
        (beside / "trained_model.json").write_text(trained.local_json(), encoding="utf-8")
    return trained


def weights_sha256(network: keras.Model) -> str:
    """Returns a digest of a network's weights in their order, which no name or time of a file enters."""
    digest = hashlib.sha256()
    for weight in network.get_weights():
        digest.update(f"{weight.dtype} {weight.shape}".encode() + weight.tobytes())
    return digest.hexdigest()


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
    for name in ("config.json", "history.json", "learning_curves.png", AUGMENTED_IMAGES, "trained_model.json"):
        run.log_artifact(trained.directory / name, "training")
    artifact_path = run.log_artifact(trained.keras_path, "model")
    run.set_tags(trained.model.model_dump())
    model_name, version = trained.model.model_name, trained.model.version
    run.register_model_version(model_name, version, artifact_path=artifact_path, tags=_tags(trained))
    run.set_alias(model_name, CHALLENGER, version)
