"""Training: what it writes, that it can be repeated and resumed, and how it refuses."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from cv_platform.datasets.packing import open_split
from cv_platform.drift.extraction import load_model
from cv_platform.errors import DiskSpaceError, TrackingError, TrainingError
from cv_platform.records import PackedImages, Provenance, TrainedModel
from cv_platform.storage import VERSION_PATTERN
from cv_platform.tracking import start_run
from cv_platform.training.calibration import scale_logits
from cv_platform.training.callbacks import TrainingMonitor, read_state
from cv_platform.training.fitting import _memory_errors
from cv_platform.training.network import build_model
from cv_platform.training.trainer import _recipe, _work_folder, train_model, with_own_weights
from cv_platform_tests.support.processor import needs_bfloat16
from cv_platform_tests.support.tiny_training import experiment
from cv_platform_tests.support.waiting import wait_until

# One worker: each would train the module's model anew.
pytestmark = pytest.mark.xdist_group("training")


class Interrupted(Exception):
    """Stands for the kill of a process."""


class Lines(logging.Handler):
    """Keeps messages."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture(scope="module")
def progress() -> list[str]:
    """What `trained` logs."""
    return []


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow database."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        yield f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
        mlflow.set_tracking_uri("")


@pytest.fixture(scope="module")
def trained(
    tiny_packed: PackedImages, tracking_uri: str, progress: list[str], tmp_path_factory: pytest.TempPathFactory
) -> TrainedModel:
    """The one complete training that most tests look at."""
    log, handler = logging.getLogger("cv_platform.training"), Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with start_run(
            tracking_uri, "tiny", run_name="tiny model", artifact_root=tmp_path_factory.mktemp("mlruns")
        ) as run:
            trained = train_model(
                tiny_packed,
                experiment(),
                directory=tmp_path_factory.mktemp("models"),
                run=run,
                git_commit="c0ffee",
            )
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    progress.extend(handler.messages)
    return trained


@pytest.fixture(scope="module")
def unsure(tiny_packed: PackedImages, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A training that ends less sure than it may be, so that it gets a temperature."""
    return train_model(tiny_packed, experiment(train__label_smoothing=0.3), directory=tmp_path_factory.mktemp("unsure"))


def weights_of(trained: TrainedModel) -> list[np.ndarray]:

    return load_model(trained.keras_path).get_weights()


def assert_same_weights(first: TrainedModel, second: TrainedModel) -> None:
    # Sums over several threads may end in another last bit, which each step enlarges.
    for mine, theirs in zip(weights_of(first), weights_of(second), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def interrupt_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes trainings die when `epochs` are on disk."""
    log = TrainingMonitor._log

    def dying(self: TrainingMonitor, epoch: int, metrics: dict[str, float]) -> None:
        log(self, epoch, metrics)
        if epoch + 1 == epochs:
            raise Interrupted

    monkeypatch.setattr(TrainingMonitor, "_log", dying)


def started_threads() -> list[str]:
    """Returns the names of what Python has started; TensorFlow's own threads are dummies once they have called it."""
    return sorted(t.name for t in threading.enumerate() if not t.name.startswith("Dummy"))


def test_writes_a_complete_folder(trained: TrainedModel) -> None:
    names = {path.name for path in trained.directory.iterdir()}

    assert names == {
        "tiny_model.keras",
        "history.json",
        "config.json",
        "learning_curves.png",
        "augmented_images.png",
        "trained_model.json",
    }
    assert trained.directory.name == trained.model.version
    assert trained.directory.parent.name == "tiny_model"
    assert [path.name for path in trained.directory.parent.iterdir() if path.is_dir()] == [trained.model.version]
    assert json.loads((trained.directory / "config.json").read_text()) == experiment().model_dump(mode="json")
    assert json.loads((trained.directory / "history.json").read_text()) == trained.history
    assert (trained.directory / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_says_what_was_trained_and_on_what(trained: TrainedModel, tiny_packed: PackedImages) -> None:
    written = json.loads((trained.directory / "trained_model.json").read_text())
    assert TrainedModel(**written, directory=trained.directory) == trained
    assert re.match(VERSION_PATTERN, trained.model.version)
    assert trained.provenance == Provenance(ds_name="tiny", dvc_tag="v1", dvc_md5="0" * 32 + ".dir")
    assert trained.task == tiny_packed.task
    assert (trained.task.class_names, trained.task.classifier_type) == (("blue", "green", "red"), "multi-class")
    assert (trained.git_commit, trained.epochs_run) == ("c0ffee", 3)
    expected = {"loss", "accuracy", "cross_entropy", "val_loss", "val_accuracy", "val_cross_entropy"}
    expected |= {"calibrated_cross_entropy", "val_calibrated_cross_entropy"}
    assert set(trained.history) == expected | {"learning_rate", "images_per_second"}
    assert {len(values) for values in trained.history.values()} == {3}


def test_mlflow_has_settings_curves_files_and_a_registered_version(trained: TrainedModel, tracking_uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri)
    assert trained.mlflow_run_id is not None
    run = client.get_run(trained.mlflow_run_id)
    curve = client.get_metric_history(trained.mlflow_run_id, "val_accuracy")
    folders = {file.path for folder in ("training", "model") for file in client.list_artifacts(run.info.run_id, folder)}
    version = client.get_model_version("tiny_model", "1")

    assert (run.data.params["train.augment.flip_horizontal"], run.data.params["model.input_size.h"]) == ("0.5", "16")
    assert run.data.tags["dvc_md5"] == trained.provenance.dvc_md5
    assert run.data.tags["version"] == trained.model.version
    assert [point.step for point in curve] == [1, 2, 3]
    assert [point.value for point in curve] == pytest.approx(trained.history["val_accuracy"])
    assert folders == {
        "training/config.json",
        "training/history.json",
        "training/learning_curves.png",
        "training/augmented_images.png",
        "training/trained_model.json",
        "model/tiny_model.keras",
    }
    assert version.source == f"runs:/{run.info.run_id}/model/tiny_model.keras"
    assert client.get_model_version_by_alias("tiny_model", "challenger").version == version.version
    steps = [point.step for point in client.get_metric_history(trained.mlflow_run_id, "loss_so_far")]
    assert steps[0] == 1
    assert steps == sorted(set(steps))
    assert len(steps) > 3
    assert len(run.data.tags["requirements_sha256"]) == 64
    assert version.tags["cv_platform.version"] == trained.model.version


def test_it_learns_and_keeps_the_weights_of_the_best_epoch(trained: TrainedModel, tiny_packed: PackedImages) -> None:

    network = load_model(trained.keras_path)
    scale_logits(network, 1 / trained.temperature)  # The epochs knew no temperature.
    valid = open_split(tiny_packed, "valid")
    probabilities = network(np.asarray(valid.images)).numpy()

    accuracy = float((probabilities.argmax(axis=1) == valid.targets).mean())
    cross_entropy = float(-np.log(probabilities[np.arange(len(valid.targets)), valid.targets]).mean())
    best = int(np.argmin(trained.history["val_calibrated_cross_entropy"]))
    assert trained.best_epoch == best + 1
    assert cross_entropy == pytest.approx(trained.history["val_cross_entropy"][best], abs=1e-5)
    assert accuracy == pytest.approx(trained.history["val_accuracy"][best])
    assert trained.history["loss"][-1] < trained.history["loss"][0]


def test_the_saved_network_is_plain_float32_without_penalties(trained: TrainedModel) -> None:
    import keras

    network: Any = keras.models.load_model(trained.keras_path)

    assert network.losses == []
    assert {layer.compute_dtype for layer in network.layers if layer.weights} == {"float32"}
    assert not network.compiled


def test_the_same_seed_gives_the_same_weights(trained: TrainedModel, tiny_packed: PackedImages, tmp_path: Path) -> None:
    again = train_model(tiny_packed, experiment(), directory=tmp_path)

    assert again.model.version != trained.model.version
    assert_same_weights(trained, again)
    assert again.content_version() == trained.content_version()
    mine, others = (build_model(experiment().model, seed=seed).get_weights() for seed in (3, 4))
    assert any((one != other).any() for one, other in zip(mine, others, strict=True))


def test_a_killed_training_resumes_to_the_weights_it_would_have_had(
    trained: TrainedModel, tiny_packed: PackedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The MLflow run that goes on has all epochs, and ends the killed one."""
    first, second = ForgetfulRun(is_away=False, run_id="killed"), ForgetfulRun(is_away=False, run_id="next")
    threads = started_threads()
    with monkeypatch.context() as patched:
        interrupt_after(1, patched)
        with pytest.raises(Interrupted):
            train_model(tiny_packed, experiment(), directory=tmp_path, run=cast(Any, first))
    assert started_threads() == threads
    assert not list((tmp_path / "tiny_model").glob("2*"))

    started: list[int] = []
    begin = TrainingMonitor.begin_epoch

    def noting(self: TrainingMonitor, epoch: int) -> None:
        started.append(epoch)
        begin(self, epoch)

    monkeypatch.setattr(TrainingMonitor, "begin_epoch", noting)
    resumed = train_model(tiny_packed, experiment(), directory=tmp_path, run=cast(Any, second))

    assert started == [1, 2]
    assert (first.epochs, second.epochs, second.ended) == (1, 3, ["killed"])
    assert resumed.epochs_run == 3
    assert resumed.temperature == pytest.approx(trained.temperature, rel=1e-3)
    assert resumed.history["val_loss"] == pytest.approx(trained.history["val_loss"], abs=1e-4)
    assert_same_weights(trained, resumed)
    assert not list((tmp_path / "tiny_model").glob(".training-*/*"))


def test_weights_may_be_those_of_a_version_that_was_trained_here(trained: TrainedModel) -> None:
    models, version = trained.directory.parent.parent, trained.model.version
    named = with_own_weights(experiment(model__weights=f"tiny_model/{version}"), models)
    assert named.model.weights == str(trained.keras_path)
    started = build_model(named.model, seed=9)
    for mine, theirs in zip(started.get_weights(), weights_of(trained), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    other = f"{version[:-1]}{'0' if version[-1] != '0' else '1'}"
    with pytest.raises(TrainingError, match=rf"Received: tiny_model/{other}.*Of tiny_model there is .*{version}"):
        with_own_weights(experiment(model__weights=f"tiny_model/{other}"), models)


def test_what_decides_the_weights_decides_what_may_be_resumed(tiny_packed: PackedImages, tmp_path: Path) -> None:
    base = _recipe(tiny_packed, experiment())

    assert _recipe(tiny_packed, experiment(name="other", model__drift_detection={"uae_seed": 8})) == base
    assert _recipe(tiny_packed, experiment(train__seed=5)) != base
    assert _recipe(tiny_packed, experiment(model__dropout=0.3)) != base
    requarantined = tiny_packed.model_copy(update={"directory": tiny_packed.directory.with_name("other")})
    assert _recipe(requarantined, experiment()) != base
    weights = tmp_path / "a.weights.h5"
    weights.write_bytes(b"one")
    started = experiment(model__weights=str(weights))
    first = _recipe(tiny_packed, started)
    weights.write_bytes(b"two")
    assert _recipe(tiny_packed, started) != first


@pytest.mark.parametrize(
    ("changes", "requarantined", "reason"),
    [
        ({"train__epochs": 4}, False, "train.epochs is 4 instead of 3"),
        (
            {"model__dropout": 0.3, "train__seed": 5, "train__batch_size": 8, "train__init_lr": 0.1},
            False,
            "model.dropout is 0.3 instead of 0.2, train.batch_size is 8 instead of 16, train.init_lr is 0.1 instead "
            "of 0.003, and 1 more",
        ),
        ({}, True, "the packed images changed"),
    ],
)
def test_another_training_starts_anew_and_says_why(
    tiny_packed: PackedImages,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    requarantined: bool,
    reason: str,
) -> None:
    killed = _recipe(tiny_packed, experiment())
    with suppress(Interrupted), _work_folder(tmp_path, killed) as folder:
        (folder / "epoch-00001.json").touch()
        raise Interrupted
    packed = tiny_packed.model_copy(update={"directory": tiny_packed.directory.with_name("x")} if requarantined else {})
    with (
        caplog.at_level(logging.INFO, "cv_platform"),
        _work_folder(tmp_path, _recipe(packed, experiment(**changes))) as work,
    ):
        assert [path.name for path in work.iterdir()] == ["recipe.json"]
    assert [line.partition("not the same: ")[2] for line in caplog.messages] == [reason]
    assert all(line.startswith("starting at epoch 1: an unfinished training of") for line in caplog.messages)
    caplog.clear()
    with caplog.at_level(logging.INFO, "cv_platform"), _work_folder(tmp_path, killed) as same:
        assert same == folder
    assert caplog.messages == []


def test_a_training_that_would_fill_the_disk_is_not_begun(tiny_packed: PackedImages, tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match="for training "):
        train_model(tiny_packed, experiment(), directory=tmp_path, spare_bytes=10**15)
    assert list(tmp_path.rglob("epoch-*")) == []


def test_two_trainings_of_one_recipe_do_not_mix(tiny_packed: PackedImages, tmp_path: Path) -> None:
    parent = tmp_path / "tiny_model"
    parent.mkdir()

    with _work_folder(parent, _recipe(tiny_packed, experiment())), pytest.raises(TrainingError, match="a second"):
        train_model(tiny_packed, experiment(), directory=tmp_path)
    with _work_folder(parent, {"a": "1"}) as first, _work_folder(parent, {"a": "2"}) as second:
        assert first != second


def test_early_stopping_ends_when_validation_stops_improving(tiny_packed: PackedImages, tmp_path: Path) -> None:
    config = experiment(
        train__epochs=20, train__early_stopping_patience=2, train__init_lr=0.05, train__schedule="constant"
    )

    stopped = train_model(tiny_packed, config, directory=tmp_path)

    losses = stopped.history["val_calibrated_cross_entropy"]
    assert stopped.epochs_run < 30
    assert stopped.epochs_run - stopped.best_epoch == 2
    assert min(losses) == losses[stopped.best_epoch - 1]


def test_a_diverging_loss_says_what_to_try(tiny_packed: PackedImages, tmp_path: Path) -> None:
    config = experiment(
        train__optimizer="sgd", train__init_lr=10.0, train__schedule="constant", train__weight_decay=1.0
    )

    with pytest.raises(TrainingError, match=r"finite loss.*Lower train.init_lr \(now 10, try 1\)"):
        train_model(tiny_packed, config, directory=tmp_path)

    assert not list((tmp_path / "tiny_model").glob("2*"))


@needs_bfloat16
def test_bfloat16_trains_a_float32_model(tiny_packed: PackedImages, tmp_path: Path) -> None:
    import keras

    trained = train_model(tiny_packed, experiment(train__precision="bfloat16", train__epochs=1), directory=tmp_path)

    network: Any = keras.models.load_model(trained.keras_path)
    assert {layer.compute_dtype for layer in network.layers if layer.weights} == {"float32"}
    assert np.isfinite(trained.history["loss"]).all()


def test_all_mismatches_between_data_and_config_are_named(tiny_packed: PackedImages, tmp_path: Path) -> None:
    task = tiny_packed.task.model_copy(
        update={"class_names": ("red", "green", "blue"), "classifier_type": "multi-label"}
    )
    packed = tiny_packed.model_copy(update={"task": task, "counts": {"train": 3, "valid": 0}})

    config = experiment(model__input_size={"h": 8, "w": 16}, train__pack_scale=1.25)
    with pytest.raises(TrainingError) as caught:
        train_model(packed, config, directory=tmp_path)

    message = str(caught.value)
    for part in (
        "model.classes: config has ('blue', 'green', 'red'), packed images have ('red', 'green', 'blue')",
        "model.classifier_type: config has multi-class, packed images have multi-label",
        "model.input_size (height, width): config has (8, 16), packed images have (16, 16)",
        "train.pack_scale: config has 1.25, packed images have 1.0",
        "split valid: expected at least one image",
        "Materialise packed_images again",
    ):
        assert part in message
    assert "split train" not in message


def test_progress_has_a_line_for_each_epoch(trained: TrainedModel, progress: list[str]) -> None:
    lines = [line for line in progress if line.startswith("epoch ")]

    assert [line.split(":")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    for word in ("loss", "accuracy", "val_loss", "val_accuracy", "images/s", "left"):
        assert word in lines[0]


class RecordingRun:
    """Takes the place of `tracking.MlflowRun`, whose own tests use a real MLflow."""

    run_id = "r1"

    def __init__(self, *, failing: bool = False) -> None:
        self.failing = failing
        self.attempts = 0
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], *, step: int = 0) -> None:
        self.attempts += 1
        if self.failing:
            raise TrackingError("server gone")
        self.metrics.append((step, dict(metrics)))


def monitor_with(run: Any, folder: Path) -> TrainingMonitor:
    network = build_model(experiment().model, seed=1)
    network.compile(optimizer="sgd", loss="categorical_crossentropy")
    return TrainingMonitor(
        network,
        folder,
        train=experiment(train__epochs=3, train__init_lr=0.1).train,
        epochs=3,
        images_per_epoch=10,
        state=None,
        run=run,
    )


LOGS = {
    "loss": 1.0,
    "accuracy": 0.5,
    "cross_entropy": 1.0,
    "val_loss": 1.0,
    "val_accuracy": 0.5,
    "val_cross_entropy": 1.0,
}


def test_metrics_reach_mlflow_once_per_epoch_counted_from_one(tmp_path: Path) -> None:
    run = RecordingRun()
    monitor = monitor_with(run, tmp_path)

    monitor.end_epoch(0, LOGS)
    monitor.end_epoch(1, {**LOGS, "val_cross_entropy": 0.5})

    assert [step for step, _ in run.metrics] == [1, 2]
    assert run.metrics[1][1]["val_cross_entropy"] == 0.5


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "is_drawn"), [(Terminal, True), (io.StringIO, False)])
def test_an_epoch_has_a_bar_in_a_terminal_and_none_in_a_log(
    kind: type[io.StringIO], is_drawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = kind()
    monkeypatch.setattr("sys.stderr", shown)
    monitor = monitor_with(None, tmp_path)
    monitor.check_loss(1, 0.25)
    monitor.end_epoch(0, LOGS)

    assert ("epoch 1/3" in shown.getvalue()) is is_drawn
    # It is taken away again: what is left of the line is blank.
    assert shown.getvalue().rpartition("\r")[2] == ""


@pytest.mark.parametrize("kind", ["TensorFlow", "NumPy"])
def test_where_memory_runs_out_the_error_says_what_to_lower(kind: str) -> None:
    import tensorflow as tf

    def work() -> None:
        if kind == "TensorFlow":
            tf.zeros([2**46])
        else:
            np.zeros(2**46)

    said = r"batches of 24\. Received: .+Lower train.batch_size or model.input_size"
    with pytest.raises(TrainingError, match=said), _memory_errors(24):
        work()


def test_a_tracking_server_that_goes_away_does_not_stop_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RecordingRun(failing=True)
    monitor = monitor_with(run, tmp_path)

    monitor.end_epoch(0, LOGS)
    monitor.end_epoch(1, LOGS)

    assert run.attempts == 1  # Each attempt may wait for minutes.
    assert "server gone" in caplog.text
    assert monitor.state is not None
    assert monitor.state.epochs_done == 2

    run.failing = False
    monitor.deliver()
    monitor.deliver()
    assert [step for step, _ in run.metrics] == [1, 2]
    assert read_state(tmp_path) == monitor.state


def test_a_real_mlflow_that_breaks_in_the_middle_gets_its_epochs_when_it_is_back(
    tracking_uri: str, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    database = Path(tracking_uri.removeprefix("sqlite:///"))
    with start_run(tracking_uri, "breaks", run_name="model", artifact_root=tmp_path / "artifacts") as run:
        monitor = monitor_with(run, tmp_path)
        monitor.end_epoch(0, LOGS)
        content = database.read_bytes()
        database.write_bytes(b"no database " * 1000)
        monitor.end_epoch(1, {**LOGS, "val_cross_entropy": 0.5})
        database.write_bytes(content)
        monitor.deliver()

    found = MlflowClient(tracking_uri).get_metric_history(run.run_id, "val_cross_entropy")
    assert [(metric.step, metric.value) for metric in found] == [(1, 1.0), (2, 0.5)]


def test_the_last_two_epochs_and_the_best_weights_are_kept_and_no_more(tmp_path: Path) -> None:
    monitor = monitor_with(None, tmp_path)
    for epoch, loss in enumerate((1.0, 0.4, 0.6, 0.4)):
        monitor.end_epoch(epoch, {**LOGS, "val_cross_entropy": loss})

    state = read_state(tmp_path)
    assert state == monitor.state
    assert state is not None
    assert (state.last_weights, state.best_weights) == ("epoch-00004.npz", "epoch-00002.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-00002.npz",
        "epoch-00003.json",
        "epoch-00003.npz",
        "epoch-00004.json",
        "epoch-00004.npz",
    ]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"truncated": content[:-1], "halved": content[: len(content) // 2], "empty": b"", "garbage": b"\xff" * 64}[how]
    )


@pytest.mark.parametrize("name", ["epoch-00002.npz", "epoch-00002.json"])
@pytest.mark.parametrize("how", ["truncated", "halved", "empty", "garbage", "missing"])
def test_a_damaged_newest_epoch_costs_that_epoch_alone(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = monitor_with(None, tmp_path)
    monitor.end_epoch(0, LOGS)
    first = monitor.state
    monitor.end_epoch(1, {**LOGS, "val_cross_entropy": 0.5})
    if how == "missing":
        (tmp_path / name).unlink()
    else:
        damage(tmp_path / name, how)

    assert read_state(tmp_path) == first
    if (name, how) != ("epoch-00002.json", "missing"):
        assert str(tmp_path / "epoch-00002.json") in caplog.text
        assert "damaged" in caplog.text


def test_where_no_epoch_is_whole_training_starts_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = monitor_with(None, tmp_path)
    monitor.end_epoch(0, {**LOGS, "val_cross_entropy": 0.1})
    monitor.end_epoch(1, LOGS)
    damage(tmp_path / "epoch-00001.npz", "halved")  # The best weights of both.

    assert read_state(tmp_path) is None
    assert "No epoch in" in caplog.text


def test_a_training_whose_newest_checkpoint_is_damaged_ends_with_the_same_weights(
    trained: TrainedModel,
    tiny_packed: PackedImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patched:
        interrupt_after(2, patched)
        with pytest.raises(Interrupted):
            train_model(tiny_packed, experiment(), directory=tmp_path)
    (newest,) = tmp_path.glob("tiny_model/.training-*/epoch-00002.npz")
    damage(newest, "halved")

    with caplog.at_level(logging.INFO, "cv_platform"):
        resumed = train_model(tiny_packed, experiment(), directory=tmp_path)

    assert "going on after epoch 1" in caplog.messages
    assert resumed.epochs_run == 3
    assert_same_weights(trained, resumed)


KILLED = """
import sys
from pathlib import Path
from cv_platform.config import parse_experiment
from cv_platform.records import PackedImages
from cv_platform.training.trainer import train_model

packed, config, directory = sys.argv[1:]
train_model(
    PackedImages.model_validate_json(packed, context={"home": "/"}),
    parse_experiment(__import__("json").loads(config), origin="test"),
    directory=Path(directory),
)
"""


@pytest.mark.timeout(600)  # Another process loads TensorFlow first.
def test_a_training_goes_on_after_its_process_was_killed(
    tiny_packed: PackedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long, packed = experiment(train__epochs=1000), tiny_packed.model_dump_json(context={"home": "/"})
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, packed, long.model_dump_json(), str(tmp_path)],
        stderr=subprocess.PIPE,
    )
    try:
        epochs = "tiny_model/.training-*/epoch-*[2-9].json"
        wait_until(lambda: list(tmp_path.glob(epochs)), seconds=300, process=process)
    finally:
        process.kill()
        process.communicate()
    (folder,) = (path.parent for path in tmp_path.glob("tiny_model/.training-*/recipe.json"))
    done = read_state(folder)
    assert done is not None
    assert done.epochs_done < 1000

    goes_on: list[int] = []

    def stop(self: TrainingMonitor, epoch: int) -> None:
        goes_on.append(epoch)
        raise Interrupted

    monkeypatch.setattr(TrainingMonitor, "begin_epoch", stop)
    with caplog.at_level(logging.INFO, "cv_platform"), pytest.raises(Interrupted):
        train_model(tiny_packed, long, directory=tmp_path)
    assert goes_on == [done.epochs_done]
    assert f"going on after epoch {done.epochs_done}" in caplog.messages


class ForgetfulRun:
    """An MLflow run whose server is away when the files are to be logged; the next attempt finds it."""

    def __init__(self, *, is_away: bool, run_id: str = "r1") -> None:
        self.is_away = is_away
        self.run_id = run_id
        self.epochs = 0
        self.ended: list[str] = []

    def end_killed(self, run_id: str) -> None:
        self.ended.append(run_id)

    def set_tags(self, tags: dict[str, Any]) -> None: ...

    def log_params(self, params: dict[str, Any]) -> None: ...

    def log_metrics(self, metrics: dict[str, float], *, step: int = 0) -> None:
        self.epochs += "loss" in metrics

    def log_artifact(self, path: Path, folder: str | None = None) -> str:
        if self.is_away:
            raise TrackingError("server gone")
        return path.name

    def log_curve(self, name: str, points: dict[int, float]) -> None: ...

    def register_model_version(self, model_name: str, version: str, **options: Any) -> str:
        return "1"

    def set_alias(self, model_name: str, alias: str, version: str) -> None: ...


def test_a_server_that_is_away_at_the_end_costs_no_training_and_the_next_has_its_temperature_once(
    unsure: TrainedModel, tiny_packed: PackedImages, tmp_path: Path
) -> None:
    config = experiment(train__label_smoothing=0.3)
    first, second, third = (ForgetfulRun(is_away=is_away) for is_away in (True, True, False))
    for away in (first, second):
        with pytest.raises(TrackingError):
            train_model(tiny_packed, config, directory=tmp_path, run=cast(Any, away))
    again = train_model(tiny_packed, config, directory=tmp_path, run=cast(Any, third))

    assert first.epochs == again.epochs_run == 3
    assert (second.epochs, third.epochs, third.ended) == (0, 0, [])
    assert again.pack == tiny_packed.directory.name
    assert unsure.temperature != 1.0
    assert again.temperature == pytest.approx(unsure.temperature, rel=1e-3)
    assert_same_weights(unsure, again)


def test_the_temperature_is_in_the_saved_weights_and_changes_no_answer(
    unsure: TrainedModel, tiny_packed: PackedImages, tmp_path: Path
) -> None:

    config = experiment(train__label_smoothing=0.3, train__temperature_scaling=False)
    plain = train_model(tiny_packed, config, directory=tmp_path)
    calibrated = load_model(unsure.keras_path)
    uncalibrated = load_model(plain.keras_path)
    kernel, bias = (np.asarray(w) for w in calibrated.get_layer("logits").get_weights())
    valid = open_split(tiny_packed, "valid")
    ours, theirs = calibrated(valid.images).numpy(), uncalibrated(valid.images).numpy()

    assert plain.temperature == 1.0
    assert kernel.dtype == bias.dtype == np.float32
    np.testing.assert_allclose(kernel * unsure.temperature, uncalibrated.get_layer("logits").get_weights()[0], 1e-6)
    np.testing.assert_array_equal(ours.argmax(axis=1), theirs.argmax(axis=1))
    true = (np.arange(len(valid.targets)), valid.targets)
    assert np.log(ours[true]).mean() > np.log(theirs[true]).mean()
    # By the definition: the softmax of log p / T.
    powered = theirs.astype(np.float64) ** (1 / unsure.temperature)
    np.testing.assert_allclose(ours, powered / powered.sum(axis=1, keepdims=True), atol=1e-5)
