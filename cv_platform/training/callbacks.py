"""Between the epochs of a training: progress, best weights, early stopping, divergence, resuming, metrics to MLflow.

`TrainingMonitor` is plain Python, driven by `fitting`, so that importing this module does not import Keras. It decides
from the history alone: what a killed training has written to disk is all that its successor needs.

On disk, in the training's own folder, for each of the last two epochs: `epoch-N.npz` with the weights and the
optimizer's state, and `epoch-N.json` with the history, the random state, and the names and checksums of the last and
the best weights. The record is written last, when the weights have reached the disk; only then is what neither epoch
names deleted. An epoch with a damaged file counts as not trained, and the one before it is there. Keras's
`BackupAndRestore` keeps neither history, best weights nor dropout's random state, and writes in place; its
`save_weights` takes 0.2 CPU seconds for the arrays of `resnet9s`, NumPy 0.02.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from cv_platform.config import TrainConfig
from cv_platform.errors import TrackingError, TrainingError
from cv_platform.files import file_sha256, whole_file, write_file

if TYPE_CHECKING:
    import keras

    from cv_platform.tracking import MlflowRun
    from cv_platform.training.together import Member

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""After a failed attempt MLflow is left alone for so long at least, and for ten times as long as the attempt took."""
POINTS = 20
"""Of the loss within an epoch."""


def selection_metric(history: Mapping[str, list[float]]) -> str:
    """Returns what chooses the best epoch: the loss on `valid` without the weight penalty, which shrinks on its own.

    At the best temperature, where the model that is kept gets one: see `calibration.calibrated_cross_entropy`.
    """
    calibrated = "val_calibrated_cross_entropy"
    return calibrated if calibrated in history else "val_cross_entropy"


class TrainingState(BaseModel):
    """What a training had reached after an epoch: `epoch-N.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    epochs_done: int
    seconds: float
    history: dict[str, list[float]]
    last_weights: str
    best_weights: str
    sha256: dict[str, str]
    """By file: of the last and the best weights."""
    random_state: dict[str, list[int]]
    mlflow_run_id: str | None = None
    mlflow_epochs: int = 0
    """How many of the epochs that run has."""

    @property
    def best_epoch(self) -> int:
        """The epoch (from 0) with the lowest `selection_metric`; the first of equals."""
        losses = self.history[selection_metric(self.history)]
        return losses.index(min(losses))


class Epoch(NamedTuple):
    """What an epoch has left, for who keeps it elsewhere.

    Attributes:
        state: its record.
        weights: the content of its `last_weights`; those of a better epoch were there before.
    """

    state: TrainingState
    weights: bytes


def read_state(folder: Path) -> TrainingState | None:
    """Returns the last epoch in `folder` whose files are all whole, or None to start afresh."""
    found = sorted(folder.glob("epoch-*.json"), reverse=True)
    for path in found:
        try:
            state = TrainingState.model_validate_json(path.read_bytes())
            damaged = [name for name, sha256 in state.sha256.items() if file_sha256(folder / name) != sha256]
        except (ValidationError, OSError) as err:
            logger.warning("left out, as it is damaged: %s: %s", path, err)
            continue
        if not damaged:
            return state
        logger.warning("left out, as its weights are damaged (%s): %s", ", ".join(damaged), path)
    if found:
        logger.warning("No epoch in %s is whole, so training starts at epoch 1.", folder)
    return None


class TrainingMonitor:
    """Follows one training.

    Args:
        model: the compiled model.
        folder: the training's own folder, existing.
        train: the recipe: patience, and the learning rate for the advice when the loss diverges.
        epochs: of the whole training; where a head is fitted first, that is one of them.
        images_per_epoch: for images per second.
        state: what an earlier, killed training has reached.
        run: MLflow run that gets each epoch's metrics.
        member: this process's place among several that train together, of which the first one writes; None: alone.
    """

    def __init__(
        self,
        model: keras.Model,
        folder: Path,
        *,
        train: TrainConfig,
        epochs: int,
        images_per_epoch: int,
        state: TrainingState | None,
        run: MlflowRun | None,
        member: Member | None = None,
    ) -> None:
        self.model = model
        self.folder = folder
        self.train = train
        self.epochs = epochs
        self.images_per_epoch = images_per_epoch
        self.steps = max(1, images_per_epoch // train.batch_size)
        self.state = state
        self.run = run
        self.member = member
        self.is_stopped = False
        """Whether no other epoch should follow."""
        self._epoch_started = time.perf_counter()
        self._try_again = -math.inf
        """Time before which MLflow, which was away, is not asked."""
        self._bar: Any = None
        """Of the batches of this epoch, in a terminal; in a log each epoch is a line."""
        self._within_epoch: dict[int, float] = {}
        """Loss by step, for MLflow."""
        self._has_average = state is not None and train.ema_decay > 0
        """Whether the model has the average of its weights now, and the optimizer's average the weights."""

    def begin_epoch(self, epoch: int) -> None:
        """Begins an epoch (from 0)."""
        self._epoch_started = time.perf_counter()
        self.take_average(False)

    def take_average(self, is_wanted: bool) -> None:
        """Changes the trained weights for their moving average, which the optimizer keeps, or back.

        By values: Keras's `SwapEMAWeights` adds and subtracts, which leaves a rounding error behind each time.
        """
        optimizer: Any = self.model.optimizer
        if self.train.ema_decay == 0:
            return
        if not int(optimizer.iterations.numpy()):  # Nothing but a head is there, which has no average.
            self._has_average = False
            return
        if is_wanted == self._has_average:
            return
        pairs = zip(self.model.trainable_variables, optimizer._model_variables_moving_average, strict=True)
        for variable, average in pairs:
            weights = variable.numpy()
            variable.assign(average.numpy())
            average.assign(weights)
        self._has_average = is_wanted

    def check_loss(self, batches: int, loss: float) -> None:
        """Takes the mean loss of an epoch so far, and of how many batches that is.

        Raises:
            TrainingError: it is no number.
        """
        self._draw(batches, loss)
        epochs = self.state.epochs_done if self.state else 0
        if not math.isfinite(loss):
            raise TrainingError(self._divergence(f"{loss} after batch {batches} of epoch {epochs + 1}"))
        step, last = epochs * self.steps + batches, next(reversed(self._within_epoch), -math.inf)
        if self.run is not None and step - last >= self.steps // POINTS:
            self._within_epoch[step] = loss

    def _draw(self, batches: int, loss: float) -> None:
        if self._bar is None:
            epoch = self.state.epochs_done + 1 if self.state else 1
            # None: drawn where it goes to a terminal.
            self._bar = tqdm(
                total=self.steps, desc=f"epoch {epoch}/{self.epochs}", unit="batch", leave=False, disable=None
            )
        if self._bar.disable:
            return
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update(batches - self._bar.n)

    def close_bar(self) -> None:
        """Takes the bar of an epoch out of the terminal, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _divergence(self, received: str) -> str:
        return (
            f"Expected a finite loss. Received: {received}. "
            f"Lower train.init_lr (now {self.train.init_lr:g}, try {self.train.init_lr / 10:g}), "
            "let it warm up (train.schedule: one_cycle), or compute in full precision (train.precision: float32)."
        )

    def end_epoch(self, epoch: int, logs: Mapping[str, Any]) -> None:
        """Keeps what an epoch (from 0) has reached, with its metrics by name, those of `valid` included.

        Raises:
            TrainingError: one of them is no number.
        """
        self.close_bar()
        metrics = {name: float(value) for name, value in logs.items()}
        wrong = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
        if wrong:
            raise TrainingError(self._divergence(f"{', '.join(wrong)} after epoch {epoch + 1}"))
        metrics["learning_rate"] = float(self.model.optimizer.learning_rate)
        metrics["images_per_second"] = self.images_per_epoch / (time.perf_counter() - self._epoch_started)
        if self.member is not None:
            metrics = self.member.agree(metrics)
        seconds = self.images_per_epoch / metrics["images_per_second"]
        before = self.state
        history = {name: [*(before.history[name] if before else []), value] for name, value in metrics.items()}
        self._save(epoch, history, seconds=seconds + (before.seconds if before else 0.0))
        self._log(epoch, metrics)
        assert self.state is not None
        patience = self.train.early_stopping_patience
        if patience is not None and epoch - self.state.best_epoch >= patience:
            logger.info("early stopping: no better %s for %d epochs", selection_metric(history), patience)
            self.is_stopped = True
        if self.is_out_of_time and epoch + 1 < self.epochs:
            logger.info("stopping after epoch %d: another would end after train.max_seconds", epoch + 1)
            self.is_stopped = True

    @property
    def is_out_of_time(self) -> bool:
        """Whether another epoch, as slow as the slowest so far, would end after `train.max_seconds`."""
        if self.train.max_seconds is None or self.state is None:
            return False
        slowest = self.images_per_epoch / min(self.state.history["images_per_second"])
        return self.state.seconds + slowest > self.train.max_seconds

    def _save(self, epoch: int, history: dict[str, list[float]], *, seconds: float) -> None:
        before, last = self.state, f"epoch-{epoch + 1:05d}.npz"
        is_writer = self.member is None or self.member.index == 0
        if is_writer:
            with whole_file(self.folder / last, suffix=".npz") as partial:
                np.savez(partial, *(variable.numpy() for variable in _kept(self.model)))
        state = TrainingState(
            epochs_done=epoch + 1,
            seconds=seconds,
            history=history,
            last_weights=last,
            best_weights=last,
            sha256={last: file_sha256(self.folder / last) if is_writer else ""},
            random_state=read_random_state(self.model),
            mlflow_run_id=before.mlflow_run_id if before else None,
            mlflow_epochs=before.mlflow_epochs if before else 0,
        )
        if before is not None and state.best_epoch != epoch:
            best = before.best_weights
            sha256 = {**state.sha256, best: before.sha256[best]}
            state = state.model_copy(update={"best_weights": best, "sha256": sha256})
        self.state = state
        if is_writer:
            keep_epoch(self.folder, state, before)
        if is_writer and self.member is not None and self.member.report is not None:
            self.member.report(Epoch(state, (self.folder / last).read_bytes()))

    def _log(self, epoch: int, metrics: dict[str, float]) -> None:
        assert self.state is not None
        remaining = (self.epochs - epoch - 1) * self.state.seconds / (epoch + 1)
        logger.info(
            "epoch %d/%d: loss %.4f, accuracy %.4f, val_loss %.4f, val_accuracy %.4f, %.0f images/s, %s left",
            epoch + 1,
            self.epochs,
            metrics["loss"],
            metrics["accuracy"],
            metrics["val_loss"],
            metrics["val_accuracy"],
            metrics["images_per_second"],
            _duration(remaining),
        )
        if time.perf_counter() < self._try_again:
            return
        started = time.perf_counter()
        try:
            self.deliver()
        except TrackingError as err:
            # A tracking server that goes away must not cost hours of training: the history is on disk as well.
            ended = time.perf_counter()
            self._try_again = ended + max(PATIENCE_SECONDS, 10 * (ended - started))
            logger.warning("training goes on, and MLflow gets its metrics later: %s", err)

    def deliver(self) -> None:
        """Gives MLflow the epochs that it lacks.

        Raises:
            TrackingError: it is away, or refuses them.
        """
        if self.run is None or self.state is None:
            return
        is_known = self.run.run_id == self.state.mlflow_run_id
        for epoch in range(self.state.mlflow_epochs if is_known else 0, self.state.epochs_done):
            self.run.log_metrics({name: values[epoch] for name, values in self.state.history.items()}, step=epoch + 1)
            self.state = self.state.model_copy(update={"mlflow_epochs": epoch + 1, "mlflow_run_id": self.run.run_id})
            write_file(self.folder / record_name(self.state), self.state.model_dump_json())
        if self._within_epoch:
            self.run.log_curve("loss_so_far", self._within_epoch)
            self._within_epoch = {}


def keep_epoch(folder: Path, state: TrainingState, before: TrainingState | None) -> None:
    """Writes the record of an epoch whose weights are there, and deletes what neither it nor the one before names."""
    write_file(folder / record_name(state), state.model_dump_json())
    needed = {name for kept in (before, state) if kept for name in (*kept.sha256, record_name(kept))}
    for path in folder.glob("epoch-*"):
        if path.name not in needed:
            path.unlink()


def _kept(model: Any) -> list[Any]:
    return [*model.weights, *model.optimizer.variables]


def load_epoch(model: keras.Model, path: Path) -> None:
    """Gives a compiled model the weights and the optimizer's state of `epoch-N.npz`."""
    variables = _kept(model)
    with np.load(path) as arrays:
        for index, variable in enumerate(variables):
            variable.assign(arrays[f"arr_{index}"])


def record_name(state: TrainingState) -> str:
    """Returns the name of an epoch's record."""
    return f"epoch-{state.epochs_done:05d}.json"


def read_random_state(model: keras.Model) -> dict[str, list[int]]:
    """Returns the state of each layer that draws random numbers; weight files do not hold it."""
    return {
        layer.name: [int(part) for part in layer.seed_generator.state.numpy()]
        for layer in model.layers
        if getattr(layer, "seed_generator", None) is not None
    }


def restore_random_state(model: keras.Model, state: dict[str, list[int]]) -> None:
    """Undoes what layers have drawn since `read_random_state`."""
    for name, parts in state.items():
        model.get_layer(name).seed_generator.state.assign(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def write_history(path: Path, history: dict[str, list[float]]) -> None:
    """Writes `{metric: [value per epoch]}` as JSON."""
    path.write_text(json.dumps(history, indent=1), encoding="utf-8")
