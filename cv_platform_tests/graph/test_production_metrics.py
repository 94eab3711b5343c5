"""The asset `production_metrics`, materialised by Dagster on a real request log."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import dagster as dg
import pytest
from sqlalchemy import Engine, insert

from cv_platform.database.schema import feedback, predictions
from cv_platform.definitions import build_defs
from cv_platform.defs import branch
from cv_platform.defs.materialize import RunStory, run_assets
from cv_platform.local.http import free_port
from cv_platform.record_store import RecordStore
from cv_platform.records import ProductionMetrics

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
KEY = dg.AssetKey(["digits", "production_metrics"])


@pytest.mark.xdist_group("tracking")
def test_says_that_there_is_no_feedback_then_measures_it_and_notes_what_was_overridden(
    engine: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = build_defs(DIGITS).resolve_job_def("digits_drift_report")

    empty = job.execute_in_process(asset_selection=[KEY])
    empty_tags = empty.asset_materializations_for_node("digits__production_metrics")[0].tags or {}
    (check,) = empty.get_asset_check_evaluations()
    assert check.passed
    assert (check.description or "").startswith("Insufficient feedback: 0 of 0 predictions")
    assert not (tmp_path / "home" / "mlflow").exists()

    yesterday = datetime.now(UTC) - timedelta(days=1)
    say(engine, add_prediction(engine, yesterday, yesterday), yesterday)
    override = {"resources": {"digits_config": {"config": {"monitor": {"min_feedback": 11}}}}}
    measured = job.execute_in_process(override, asset_selection=[KEY])

    (materialization,) = measured.asset_materializations_for_node("digits__production_metrics")
    assert materialization.metadata["with_feedback"].value == 1
    assert Path(str(materialization.metadata["accuracy"].value)).read_bytes().startswith(b"\x89PNG")
    as_the_yaml = build_defs(DIGITS).resolve_asset_graph().get(KEY).code_version
    assert empty_tags["dagster/code_version"] == as_the_yaml
    tags = materialization.tags or {}
    assert tags["dagster/code_version"] not in {None, as_the_yaml}
    assert tags["dagster/data_version"] != empty_tags["dagster/data_version"]
    record = RecordStore(tmp_path / "home", "digits").latest(ProductionMetrics)
    assert record is not None
    assert (record.versions[0].right_share, record.versions[0].verdict) == (0.0, "insufficient feedback")


@pytest.fixture
def log(engine: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    return engine


@pytest.mark.xdist_group("tracking")
def test_what_people_said_is_kept_while_mlflow_is_away(
    log: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yesterday = datetime.now(UTC) - timedelta(days=1)
    say(log, add_prediction(log, yesterday, yesterday), yesterday)
    with dg.DagsterInstance.ephemeral() as instance:
        record = measure(instance, tmp_path, None, {})
        said = [entry.user_message for run in instance.get_runs() for entry in instance.all_logs(run.run_id)]
    assert record.versions[0].right_share == 0.0
    assert any(text.startswith("These figures are not in MLflow: ") for text in said)


def say(engine: Engine, prediction_id: UUID, created_on: datetime) -> None:
    said = {"entry_id": uuid4(), "prediction_id": prediction_id, "true_class": "5", "source": "page"}
    with engine.begin() as connection:
        connection.execute(insert(feedback), {**said, "created_on": created_on})


def add_prediction(engine: Engine, created_on: datetime, logged_on: datetime) -> UUID:
    prediction_id = uuid4()
    row = {"model_name": "digits_classifier", "model_version": "v1", "predicted_class": "3"}
    vectors = {name: [] for name in ("uae_feats", "bbsd_feats", "features", "properties")}
    times = {"prediction_id": prediction_id, "created_on": created_on, "logged_on": logged_on}
    with engine.begin() as connection:
        connection.execute(insert(predictions), {**row, **vectors, **times, "prediction_json": {}})
    return prediction_id


def measure(instance: dg.DagsterInstance, tmp_path: Path, config: Any, tags: dict[str, str]) -> ProductionMetrics:
    job = build_defs(DIGITS).resolve_job_def("digits_drift_report")
    assert job.execute_in_process(config, asset_selection=[KEY], instance=instance, tags=tags).success
    record = RecordStore(tmp_path / "home", "digits").latest(ProductionMetrics)
    assert record is not None
    return record


class Scheduled:
    """The digits' own schedule and job, as Dagster's daemon runs them on an instance."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        repository = build_defs(DIGITS).get_repository_def()
        self.schedule = repository.get_schedule_def("digits_weekly_drift_report")
        self.job = repository.get_job(self.schedule.job_name)

    def tick(self, moment: datetime) -> str | None:
        """Runs what the schedule asks for; returns the id of a run that failed."""
        context = dg.build_schedule_context(instance=self.instance, scheduled_execution_time=moment)
        (request,) = self.schedule.evaluate_tick(context).run_requests or []
        tags = {"dagster/schedule_name": self.schedule.name, "dagster/run_key": request.run_key or ""}
        return self.run(request.run_config, {**request.tags, **tags})

    def retry(self, run_id: str) -> str | None:
        """Runs a failed run again with its config and tags, and those that `run_retries` gives it."""
        failed = self.instance.get_run_by_id(run_id)
        assert failed is not None
        lineage = {"dagster/parent_run_id": run_id, "dagster/root_run_id": run_id, "dagster/retry_number": "1"}
        return self.run(failed.run_config, {**failed.tags, **lineage})

    def run(self, config: Any, tags: dict[str, str]) -> str | None:
        done = self.job.execute_in_process(
            config, asset_selection=[KEY], instance=self.instance, tags=tags, raise_on_error=False
        )
        return None if done.success else done.run_id


def test_a_tick_whose_run_fails_has_its_window_at_the_retry_and_a_late_row_is_in_that_of_the_next_tick(
    log: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch, "_RETRIES", dg.RetryPolicy(max_retries=0))
    store = RecordStore(tmp_path / "home", "digits")

    def measured() -> tuple[datetime, datetime, int, int]:
        record = store.latest(ProductionMetrics)
        assert record is not None
        return record.window_start_utc, record.window_end_utc, record.predictions, record.late_rows

    start, hour, week = datetime(2026, 1, 26, 6, tzinfo=UTC), timedelta(hours=1), timedelta(days=7)
    first, second = start + week, start + 2 * week
    add_prediction(log, start, start)
    with dg.instance_for_test() as instance:
        scheduled = Scheduled(instance)
        monkeypatch.setenv("DATABASE_URL", "postgresql://user:word@127.0.0.1:1/none")
        failed = scheduled.tick(first)
        assert failed is not None
        assert store.latest(ProductionMetrics) is None
        monkeypatch.setenv("DATABASE_URL", database_url)
        add_prediction(log, first - hour, first + hour)  # Answered before the tick; it comes while the run has failed.
        assert scheduled.retry(failed) is None
        assert measured() == (start, first, 1, 0)
        assert scheduled.tick(second) is None
        assert measured() == (first, second, 1, 1)


def test_a_retry_of_a_run_by_hand_has_the_window_of_the_first_attempt(log: Engine, tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        first = measure(instance, tmp_path, None, {})
        (run,) = instance.get_runs()
        lineage = {"dagster/parent_run_id": run.run_id, "dagster/root_run_id": run.run_id, "dagster/retry_number": "1"}
        assert measure(instance, tmp_path, None, lineage).window_end_utc == first.window_end_utc
        assert measure(instance, tmp_path, None, {}).window_end_utc > first.window_end_utc


@pytest.mark.parametrize(
    ("monitor", "address", "retries", "reason"),
    [
        ({}, "postgresql://user:word@127.0.0.1:1/none", 2, "127.0.0.1"),
        ({"window_start_utc": "2026-01-02T00:00:00Z", "window_end_utc": "2026-01-01T00:00:00Z"}, None, 0, "before"),
    ],
    ids=["a server that is away", "a wrong window"],
)
def test_what_may_pass_by_itself_is_tried_again_and_nothing_else(
    log: Engine,
    monkeypatch: pytest.MonkeyPatch,
    monitor: dict[str, str],
    address: str | None,
    retries: int,
    reason: str,
) -> None:
    if address:
        monkeypatch.setenv("DATABASE_URL", address)
    monkeypatch.setattr(branch, "_RETRIES", dg.RetryPolicy(max_retries=2))
    definitions, story = build_defs(DIGITS), RunStory(lambda line: None)
    config = {"resources": {"digits_config": {"config": {"monitor": monitor}}}}
    with dg.instance_for_test() as instance:
        assert not run_assets(definitions, "key:digits/production_metrics", config, instance, story)
        (run,) = instance.get_runs()
        assert len(instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_UP_FOR_RETRY)) == retries
    failure = story.failure()
    assert failure.startswith("digits/production_metrics: ")
    assert reason in failure
    assert "does not expect" not in failure
