"""Tracking, against a real MLflow on SQLite: one database, made once for the module."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from cv_platform.errors import TrackingError
from cv_platform.tracking import (
    RUN_KEY_TAG,
    MlflowRun,
    end_leftover_runs,
    flatten,
    head_commit,
    run_url,
    set_alias,
    start_run,
)
from cv_platform_tests.support.waiting import wait_until

# One worker: each would make the module's database anew.
pytestmark = pytest.mark.xdist_group("tracking")

Start = Callable[..., AbstractContextManager[MlflowRun]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def uri(root: Path) -> str:
    return f"sqlite:///{root / 'made on first use' / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves no run, address or telemetry of MLflow's behind."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    yield
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri("")


@pytest.fixture
def start(uri: str, root: Path) -> Start:
    def opened(experiment: str = "digits", **changes: Any) -> AbstractContextManager[MlflowRun]:
        return start_run(
            uri, experiment, **{"run_name": "digits model", "artifact_root": root / "artifacts", **changes}
        )

    return opened


def stored(uri: str, run: MlflowRun) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri).get_run(run.run_id)


def fail_in(block: AbstractContextManager[MlflowRun], act: Callable[[MlflowRun], None]) -> MlflowRun:
    """Acts within a run whose block then raises, and returns the run."""
    runs: list[MlflowRun] = []

    def body() -> None:
        with block as run:
            runs.append(run)
            act(run)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    return runs[0]


def test_a_run_has_what_was_logged(start: Start, uri: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with start(tags={"stage": "model"}, description="**why**", experiment_tags={"team": "cv"}) as run:
        run.log_params({"train": {"epochs": 3, "augment": {"sometimes": 0.8}}, "classes": ("a", "b")})
        run.log_metrics({"loss": 2.0, "accuracy": 0.5}, step=1)
        run.log_metrics({"loss": 1.0}, step=2)
        path = run.log_artifact(tmp_path / "config.json", "training")

    found = stored(uri, run)
    assert path == "training/config.json"
    assert found.data.params == {"train.epochs": "3", "train.augment.sometimes": "0.8", "classes": "('a', 'b')"}
    assert found.data.metrics == {"loss": 1.0, "accuracy": 0.5}
    assert found.data.tags["stage"] == "model"
    assert found.data.tags["mlflow.note.content"] == "**why**"
    assert (found.info.status, found.info.run_name) == ("FINISHED", "digits model")
    assert (root / "artifacts" / "digits" / run.run_id / "artifacts" / path).read_text() == "{}"


def test_a_run_has_mlflows_metrics_of_the_machine(start: Start, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    with start() as run:
        wait_until(lambda: any(name.startswith("system/cpu_") for name in stored(uri, run).data.metrics))

    found = stored(uri, run).data.metrics
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert found["system/system_memory_usage_megabytes"] > 0
    assert "system/disk_usage_percentage" in found


def test_more_than_a_hundred_parameters_and_long_ones_fit(start: Start, uri: str) -> None:
    with start() as run:
        run.log_params({**{f"p{i}": i for i in range(130)}, "long": "x" * 7000})

    params = stored(uri, run).data.params
    assert len(params) == 131
    assert params["long"] == "x" * 6000


def test_a_metric_that_is_not_finite_is_left_out_and_named(
    start: Start, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    with start() as run:
        run.log_metrics({"auc": float("nan"), "accuracy": 1.0})

    assert stored(uri, run).data.metrics == {"accuracy": 1.0}
    assert "not finite: auc" in caplog.text


def test_the_same_key_resumes_the_run_and_another_starts_one(start: Start, uri: str) -> None:
    first = fail_in(start(run_key="dagster-1:digits/model"), lambda run: run.log_params({"epochs": 3}))
    assert stored(uri, first).info.status == "FAILED"

    with start(run_key="dagster-1:digits/model", run_name="ignored") as again:
        again.log_params({"epochs": 3})
        assert stored(uri, again).info.status == "RUNNING"
    with start(run_key="dagster-1:digits/evaluation") as other:
        pass
    with start("another experiment", run_key="dagster-1:digits/model") as elsewhere:
        pass

    assert again.run_id == first.run_id
    assert len({first.run_id, other.run_id, elsewhere.run_id}) == 3
    found = stored(uri, again)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "digits model")
    assert found.data.tags[RUN_KEY_TAG] == "dagster-1:digits/model"


def test_a_run_left_active_by_others_is_ended_and_gets_nothing(start: Start, uri: str) -> None:
    import mlflow

    mlflow.set_tracking_uri(uri)
    leftover = mlflow.start_run()
    with start() as run:
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == run.run_id
        run.log_params({"mine": 1})

    assert mlflow.active_run() is None
    found = mlflow.MlflowClient(uri).get_run(leftover.info.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {}


def test_an_interrupted_run_is_killed(start: Start, uri: str) -> None:
    with pytest.raises(KeyboardInterrupt), start() as run:
        raise KeyboardInterrupt

    assert stored(uri, run).info.status == "KILLED"


def test_a_run_that_somebody_ended_inside_still_gets_its_status(start: Start, uri: str) -> None:
    import mlflow

    run = fail_in(start(), lambda run: mlflow.end_run())

    assert stored(uri, run).info.status == "FAILED"


def test_runs_of_a_dead_dagster_run_are_ended_and_no_others(start: Start, uri: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    with start() as run:
        pass
    mine = client.create_run(run.experiment_id, tags={RUN_KEY_TAG: "d1:digits/model"})
    joined = client.create_run(run.experiment_id, tags={"dagster_run_id": "d1"})
    other = client.create_run(run.experiment_id, tags={RUN_KEY_TAG: "d11:digits/model"})

    ended = end_leftover_runs(uri, dagster_run_id="d1")

    assert ended == 2
    assert client.get_run(joined.info.run_id).info.status == "FAILED"
    assert client.get_run(mine.info.run_id).info.status == "FAILED"
    assert client.get_run(other.info.run_id).info.status == "RUNNING"
    assert end_leftover_runs(uri, dagster_run_id="d1") == 0


def test_a_killed_run_is_ended_and_a_finished_one_stays_as_it_is(start: Start, uri: str) -> None:
    from mlflow import MlflowClient

    with start(run_name="finished") as finished:
        pass
    killed = MlflowClient(uri).create_run(finished.experiment_id)
    with start(run_name="goes on") as run:
        run.end_killed(killed.info.run_id)
        run.end_killed(finished.run_id)
        run.end_killed("0" * 32)  # Somebody has deleted it.
    assert MlflowClient(uri).get_run(killed.info.run_id).info.status == "KILLED"
    assert stored(uri, finished).info.status == "FINISHED"


def test_a_changed_parameter_is_refused(start: Start) -> None:
    with start() as run:
        run.log_params({"epochs": 3})
        with pytest.raises(TrackingError, match="Changing param values is not allowed"):
            run.log_params({"epochs": 4})


def test_an_alias_points_at_our_version_wherever_it_was_before(start: Start, uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (tmp_path / "m.keras").write_bytes(b"weights")
    with start() as run:
        path = run.log_artifact(tmp_path / "m.keras", "model")
        first = run.register_model_version("digits_classifier", "v-a", artifact_path=path, tags={"dvc_tag": "v1"})
        again = run.register_model_version("digits_classifier", "v-a", artifact_path=path)
        second = run.register_model_version("digits_classifier", "v-b", artifact_path=path)
    assert (first, again, second) == ("1", "1", "2")

    set_alias(uri, "digits_classifier", "champion", "v-b")
    set_alias(uri, "digits_classifier", "champion", "v-a")
    set_alias(uri, "digits_classifier", "candidate", "v-b")

    client = MlflowClient(uri, registry_uri=uri)
    champion = client.get_model_version_by_alias("digits_classifier", "champion")
    candidate = client.get_model_version_by_alias("digits_classifier", "candidate")
    assert (str(champion.version), str(candidate.version)) == ("1", "2")
    assert (champion.run_id, champion.source) == (run.run_id, f"runs:/{run.run_id}/model/m.keras")
    assert champion.tags == {"cv_platform.version": "v-a", "dvc_tag": "v1"}
    with pytest.raises(TrackingError, match=r"Expected a registered version of digits_classifier\. Received: v-c"):
        set_alias(uri, "digits_classifier", "champion", "v-c")


def test_a_database_that_cannot_be_opened_is_a_tracking_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with (
        pytest.raises(TrackingError, match="Check MLFLOW_TRACKING_URI"),
        start_run(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", "x", run_name="x"),
    ):
        pytest.fail("started")


def test_addresses_of_runs(start: Start) -> None:
    assert run_url("http://127.0.0.1:5050/", "7", "abc") == "http://127.0.0.1:5050/#/experiments/7/runs/abc"
    with start() as run:
        assert run.url("http://h").endswith(f"/runs/{run.run_id}")


def test_the_head_commit_is_read_where_there_is_one(tmp_path: Path) -> None:
    assert head_commit(tmp_path) is None
    assert head_commit(tmp_path, otherwise="of the image") == "of the image"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert head_commit(tmp_path) is None
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)

    commit = head_commit(tmp_path, otherwise="of the image")

    assert commit is not None
    assert re.fullmatch(r"[0-9a-f]{40}", commit)


def test_nested_settings_become_dotted_names() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": None}, "e": [1, 2]}}) == {"a": 1, "b.c.d": None, "b.e": [1, 2]}
