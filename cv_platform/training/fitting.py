"""Fits one network to arrays: compile, seeds, epochs, resuming, and the best weights at the end.

`trainer.train_model` adds what surrounds it: packed datasets, output folders, provenance and MLflow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cv_platform.config import ExperimentConfig, ModelConfig, TrainConfig
from cv_platform.datasets.packing import PackedSplit
from cv_platform.errors import TrainingError
from cv_platform.files import require_free_space
from cv_platform.training.augmentation import Augmenter
from cv_platform.training.batches import ShuffledBatches, as_probabilities, ordered_dataset
from cv_platform.training.calibration import calibrated_cross_entropy
from cv_platform.training.callbacks import (
    POINTS,
    TrainingMonitor,
    TrainingState,
    load_epoch,
    read_state,
    restore_random_state,
    selection_metric,
)
from cv_platform.training.depthwise import with_fast_kernels
from cv_platform.training.devices import devices_of, require_equal_parts, sharing
from cv_platform.training.imbalance import ClassBalance, balance_of, balanced_cross_entropy
from cv_platform.training.mixing import Mixing
from cv_platform.training.network import build_model, resolve_precision
from cv_platform.training.schedules import build_optimizer
from cv_platform.training.transfer import layer_rates, start_head
from cv_platform.training.unknown_labels import known_cross_entropy, known_metrics

if TYPE_CHECKING:
    import keras

    from cv_platform.tracking import MlflowRun
    from cv_platform.training.together import Member

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedModel:
    """A trained network and how it came about.

    Attributes:
        network: uncompiled, float32, without penalties, with the weights of the best epoch.
        history: metric by name, a value per epoch.
        best_epoch: from 1.
        seconds: spent in epochs, those before an interruption included.
        images_per_second: training images per second of an epoch, its validation included; the median over the epochs.
    """

    network: keras.Model
    history: dict[str, list[float]]
    best_epoch: int
    seconds: float
    images_per_second: float


def fit_model(
    config: ExperimentConfig,
    train_split: PackedSplit,
    valid_split: PackedSplit,
    *,
    folder: Path,
    run: MlflowRun | None = None,
    spare_bytes: int | None = None,
) -> FittedModel:
    """Trains a network; the same arguments give the same weights.

    Sets Keras's global seeds to `train.seed`.

    Args:
        config: `model` is the network, `train` the recipe.
        train_split: images and targets; may be memory-mapped.
        valid_split: chooses the best epoch.
        folder: existing; keeps the state of the training. One that finds there what a killed training has left goes on
            to the weights that it would have had: it must be the same in all that decides the result.
        run: MLflow run that gets each epoch's metrics.
        spare_bytes: see `files.require_free_space`.

    Raises:
        TrainingError: the network cannot be built, the data cannot be read, no label of a split is known, or the loss
            is not finite.
        DiskSpaceError: the state of the training would fill the disk.
        TrackingError: MLflow is away at the end; another call with the same folder trains no epoch again.
    """
    network, monitor = _train(config, train_split, valid_split, folder, run=run, spare_bytes=spare_bytes)
    monitor.deliver()
    return _best(network, config.model, monitor)


def fit_share(
    config: ExperimentConfig, train_split: PackedSplit, valid_split: PackedSplit, *, folder: Path, member: Member
) -> None:
    """Trains a network together with other processes, which call the same; see `fit_model`, which finds the result.

    The same weights as by one process, but for rounding, if nothing is drawn at random in a step; batch normalisation
    sees the share's images, and its averages are the means of all. Where labels are unknown, the loss is the mean of
    the shares' means over their known labels.
    """
    _train(config, train_split, valid_split, folder, member=member)


def _train(
    config: ExperimentConfig,
    train_split: PackedSplit,
    valid_split: PackedSplit,
    folder: Path,
    *,
    run: MlflowRun | None = None,
    spare_bytes: int | None = None,
    member: Member | None = None,
) -> tuple[keras.Model, TrainingMonitor]:
    model, train, transfer = config.model, config.train, config.transfer
    devices = devices_of(train)
    shared = sharing(devices)
    with shared():
        network = _network(config)
    # Weights and two moments of the optimizer, of this epoch, the last two and the best; and the finished model.
    state_bytes = 13 * 4 * network.count_params()
    require_free_space(folder, state_bytes, purpose=f"training {model.architecture}", spare_bytes=spare_bytes)
    train_split = _chosen(train_split, train)
    balance = balance_of(train, train_split.targets, len(model.classes))
    batches = _batches(config, train_split, balance)
    require_equal_parts(devices, batch_size=batches.batch_size, valid_images=len(valid_split.images))
    epochs = epochs_of(train, batches.images_per_epoch)
    with shared():
        is_open = _has_unknown(train_split, valid_split)
        _compile(network, config, balance, total_steps=epochs * batches.steps, has_unknown=is_open)
    if not devices:
        _compile_steps(network)
    if member is not None:
        batches.share = member.index, member.count
        member.share_steps(network)
    monitor = TrainingMonitor(
        network,
        folder,
        train=train,
        epochs=epochs + (transfer is not None),
        images_per_epoch=batches.images_per_epoch,
        state=_resume(network, folder, run),
        run=run,
        member=member,
    )
    logger.info(
        "training %s (%d parameters) on %d images of %d×%d, %d valid; %d epochs of %d steps of %d, %s%s",
        model.architecture,
        network.count_params(),
        len(train_split.images),
        *model.image_size,
        len(valid_split.images),
        monitor.epochs,
        batches.steps,
        batches.batch_size,
        resolve_precision(train.precision),
        f", on {len(devices)} devices" if devices else "",
    )
    validate = _validation(network, valid_split, batches, len(devices))
    with _memory_errors(train.batch_size):
        if transfer is not None and monitor.state is None:
            _fit_head(network, config, (train_split, valid_split), balance, monitor, validate)
        if not (monitor.state and _is_finished(monitor.state, monitor)):
            _run_epochs(network, batches, monitor, validate)
    return network, monitor


def _best(network: keras.Model, model: ModelConfig, monitor: TrainingMonitor) -> FittedModel:
    """Returns the best epoch's weights in a network for evaluation, reference data and serving.

    They must compute alike, on CPUs without bfloat16 and in ONNX too: always float32.
    """
    reached = monitor.state
    assert reached is not None
    load_epoch(network, monitor.folder / reached.best_weights)
    metric = selection_metric(reached.history)
    logger.info(
        "trained %d epochs in %.1f s; the best is epoch %d with %s %.4f",
        reached.epochs_done,
        reached.seconds,
        reached.best_epoch + 1,
        metric,
        reached.history[metric][reached.best_epoch],
    )
    final = build_model(model.model_copy(update={"weights": None}), seed=monitor.train.seed)
    final.set_weights(network.get_weights())
    return FittedModel(
        network=final,
        history=reached.history,
        best_epoch=reached.best_epoch + 1,
        seconds=reached.seconds,
        images_per_second=float(np.median(reached.history["images_per_second"])),
    )


def epochs_of(train: TrainConfig, images_per_epoch: int) -> int:
    """Returns how many epochs a recipe has, without the one that fits a head: fewer where a set is large."""
    if train.max_images_shown is None:
        return train.epochs
    return min(train.epochs, max(1, train.max_images_shown // images_per_epoch))


def _chosen(split: PackedSplit, train: TrainConfig) -> PackedSplit:
    """Returns `train.max_images` of a split, by the seed; all, where it has no more."""
    if train.max_images is None or len(split.targets) <= train.max_images:
        return split
    rng = np.random.default_rng(train.seed)
    rows = np.sort(rng.choice(len(split.targets), train.max_images, replace=False))
    paths, sha256 = ([names[row] for row in rows] for names in (split.paths, split.sha256))
    larger = None if split.larger is None else np.asarray(split.larger[rows])
    return PackedSplit(np.asarray(split.images[rows]), np.asarray(split.targets[rows]), paths, sha256, larger)


def _network(config: ExperimentConfig) -> keras.Model:
    train = config.train
    penalty = 0.0 if train.optimizer == "adamw" else train.weight_decay
    precision = resolve_precision(train.precision)
    return with_fast_kernels(build_model(config.model, weight_decay=penalty, seed=train.seed, precision=precision))


def _batches(config: ExperimentConfig, split: PackedSplit, balance: ClassBalance) -> ShuffledBatches:
    return ShuffledBatches(
        split.stored,
        split.targets,
        classes=len(config.model.classes),
        batch_size=config.train.batch_size,
        augmenter=Augmenter(config.train.augment, seed=config.train.seed, image_size=config.model.image_size),
        draws=balance.draws,
        mixing=Mixing.of(config.train),
    )


def _has_unknown(*splits: PackedSplit) -> bool:
    """Says whether labels of training or validation are unknown.

    Raises:
        TrainingError: all of a split are.
    """
    unknown = [np.isnan(split.targets) for split in splits if split.targets.ndim == 2 and len(split.targets)]
    if any(of_split.all() for of_split in unknown):
        raise TrainingError(
            "Expected known labels in train and in valid. Received: a split of which no label is known. Give labels to "
            "some of its images, or import the dataset with --unknown negative."
        )
    return any(bool(of_split.any()) for of_split in unknown)


def _compile(
    network: keras.Model, config: ExperimentConfig, balance: ClassBalance, *, total_steps: int, has_unknown: bool
) -> None:
    import keras

    model, train, transfer = config.model, config.train, config.transfer
    rates = None if transfer is None else layer_rates(network, model.architecture, transfer)
    loss: Any
    if model.classifier_type == "multi-class":
        loss = keras.losses.CategoricalCrossentropy(label_smoothing=train.label_smoothing)
        if balance.changes_loss:
            loss = balanced_cross_entropy(balance, train.label_smoothing)
        metrics: list[keras.metrics.Metric] = [
            keras.metrics.CategoricalAccuracy(name="accuracy"),
            keras.metrics.CategoricalCrossentropy(name="cross_entropy"),
        ]
    elif has_unknown:
        loss, metrics = known_cross_entropy(train.label_smoothing), known_metrics(model.threshold)
    else:
        loss = keras.losses.BinaryCrossentropy(label_smoothing=train.label_smoothing)
        metrics = [
            keras.metrics.BinaryAccuracy(name="accuracy", threshold=model.threshold),
            keras.metrics.BinaryCrossentropy(name="cross_entropy"),
        ]
    if train.temperature_scaling:
        metrics.append(calibrated_cross_entropy(model.classifier_type))
    network.compile(
        optimizer=build_optimizer(train, total_steps=total_steps, rates=rates),  # pyright: ignore[reportArgumentType] -- inferred from Keras's default, "rmsprop".
        loss=loss,
        metrics=metrics,
        # XLA on the CPU was measured 1.7 times slower.
        jit_compile=False,  # pyright: ignore[reportArgumentType] -- inferred from Keras's default, "auto".
    )
    network.optimizer.build(network.trainable_variables)


def _compile_steps(network: Any) -> None:
    """Gives a compiled network a function of TensorFlow's for several steps, which draws their batches itself.

    Keras's own takes one step and answers an Optional, in case the iterator ends, of which Python asks twice: a step
    leaves nothing of Python in the caches, and what it does between steps costs small networks percents of their time.
    """
    import tensorflow as tf

    @tf.function(reduce_retracing=True)
    def steps(iterator: Any, count: Any) -> Any:
        for _ in tf.range(count):
            network.train_step(next(iterator))
        return network.get_metrics_result()

    network.train_function = steps
    # Metrics have no variables before they have seen something, and then nothing would be reset.
    nothing = tf.zeros((1, network.output_shape[-1]))
    network.compute_metrics(None, nothing, nothing)
    network.reset_metrics = tf.function(network.reset_metrics)


def _validation(
    network: keras.Model, valid: PackedSplit, batches: ShuffledBatches, devices: int
) -> Callable[[], dict[str, Any]]:
    """Returns what computes the metrics on `valid`, by name with `val_` before it."""
    import tensorflow as tf

    net: Any = network
    if devices:
        dataset = ordered_dataset(
            valid.images,
            valid.targets,
            classes=batches.classes,
            batch_size=batches.batch_size * -(-256 // batches.batch_size),
            multiple_of=devices,
        )
        return lambda: _of_valid(net.evaluate(dataset, verbose=0, return_dict=True))
    size = max(256, batches.batch_size)
    shapes = (None, *valid.images.shape[1:]), (None, batches.classes)

    @tf.function(input_signature=[tf.TensorSpec(shapes[0], tf.uint8), tf.TensorSpec(shapes[1], tf.float32)])
    def step(images: Any, targets: Any) -> Any:
        return net.test_step((images, targets))

    # Without Keras's `evaluate`, which makes two iterators each time: a tenth of a second where there are few images.
    def validate() -> dict[str, Any]:
        network.reset_metrics()
        found: dict[str, Any] = {}
        for start in range(0, len(valid.images), size):
            targets = as_probabilities(np.asarray(valid.targets[start : start + size]), batches.classes)
            found = step(tf.constant(np.asarray(valid.images[start : start + size])), tf.constant(targets))
        return _of_valid(found)

    return validate


def _of_valid(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"val_{name}": value for name, value in metrics.items()}


def _resume(network: keras.Model, folder: Path, run: MlflowRun | None) -> TrainingState | None:
    """Loads weights, optimizer and random state of a killed training, and ends its run."""
    state = read_state(folder)
    if state is None:
        return None
    load_epoch(network, folder / state.last_weights)
    restore_random_state(network, state.random_state)
    logger.info("going on after epoch %d", state.epochs_done)
    if run is not None and state.mlflow_run_id not in (None, run.run_id):
        run.end_killed(state.mlflow_run_id)
    return state


def _fit_head(
    network: keras.Model,
    config: ExperimentConfig,
    splits: tuple[PackedSplit, PackedSplit],
    balance: ClassBalance,
    monitor: TrainingMonitor,
    validate: Callable[[], dict[str, Any]],
) -> None:
    """Gives the network its head, as the first epoch."""
    monitor.begin_epoch(0)
    head = start_head(network, *splits, config, balance)
    valid = validate()
    metrics = {"loss": head.loss, "accuracy": head.accuracy, "cross_entropy": head.loss}
    if "val_calibrated_cross_entropy" in valid:
        metrics["calibrated_cross_entropy"] = head.loss
    monitor.end_epoch(0, metrics | valid)


def _is_finished(state: TrainingState, monitor: TrainingMonitor) -> bool:
    patience = monitor.train.early_stopping_patience
    return (
        state.epochs_done >= monitor.epochs
        or monitor.is_out_of_time
        or (patience is not None and state.epochs_done - 1 - state.best_epoch >= patience)
    )


def _run_epochs(
    network: Any, batches: ShuffledBatches, monitor: TrainingMonitor, validate: Callable[[], dict[str, Any]]
) -> None:
    """Trains the epochs that are left: Keras's `fit` without what it does for other needs at each step and epoch."""
    first = monitor.state.epochs_done if monitor.state else 0
    at_once = min(batches.together, max(1, batches.steps // POINTS))
    dataset, take_steps = batches.dataset(first, monitor.epochs), network.train_function
    if monitor.member is not None:
        at_once = 1  # They meet in each step.
    if take_steps is None:  # Several devices share a step of Keras's own.
        network.make_train_function()
        at_once, take_steps = 1, lambda iterator, count: network.train_function(iterator)
        dataset = network.distribute_strategy.experimental_distribute_dataset(dataset)
    iterator = iter(dataset)
    try:
        for epoch in range(first, monitor.epochs):
            monitor.begin_epoch(epoch)
            network.reset_metrics()
            metrics: dict[str, Any] = {}
            for done in range(0, batches.steps, at_once):
                count = min(at_once, batches.steps - done)
                metrics = take_steps(iterator, np.int64(count))
                monitor.check_loss(done + count, float(metrics["loss"]))
            # Now: they are the network's own, which validation begins anew.
            metrics = {name: float(value) for name, value in metrics.items()}
            monitor.take_average(True)
            monitor.end_epoch(epoch, metrics | validate())
            if monitor.is_stopped:
                break
    except Exception as err:
        if isinstance(batches.error, MemoryError):
            raise batches.error from err
        if batches.error is not None:
            raise TrainingError(f"Expected a batch of training images. Received: {batches.error}.") from batches.error
        raise
    finally:
        monitor.close_bar()


@contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    """Says which settings to lower where memory runs out, the machine's or a GPU's."""
    try:
        yield
    except Exception as err:
        if isinstance(err, MemoryError) or type(err).__name__ == "ResourceExhaustedError":
            received = str(err).partition("\n")[0] or type(err).__name__
            raise TrainingError(
                f"Expected enough memory for batches of {batch_size}. Received: {received:.300}. "
                "Lower train.batch_size or model.input_size."
            ) from err
        raise
