"""Sensors and schedules, evaluated with Dagster's own helpers on real databases and repositories."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import cv2
import dagster as dg
import numpy as np
import pytest
import yaml
from sqlalchemy import Engine, text

from cv_platform.config import AlertsConfig, ExperimentConfig, parse_experiment
from cv_platform.datasets.importing import import_dataset
from cv_platform.datasets.versions import list_tags
from cv_platform.definitions import build_defs
from cv_platform.defs.automation import (
    RUN,
    drift_schedule,
    new_dataset_version_sensor,
    new_predictions_sensor,
    pointer_sensor,
    run_failure_sensor,
    service_alerts_sensor,
)
from cv_platform.defs.branch import Branch
from cv_platform.defs.observed import observed_sensor, repository_key, request_log_key
from cv_platform.monitoring.loop import is_trained_on
from cv_platform.record_store import RecordStore
from cv_platform.records import Provenance
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, PointerMove, ProductionPointer
from cv_platform_tests.support.record_samples import trained_model

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


@pytest.fixture
def experiment() -> ExperimentConfig:
    return parse_experiment(
        {
            "name": "cats",
            "model": {"model_name": "cats", "classes": ["a", "b"], "input_size": {"h": 8, "w": 8}},
            "dataset": {"ds_name": "cats", "dvc_tag": "v1.0.0"},
            "monitor": {"new_rows_trigger": 3, "min_samples": 20},
        },
        origin="test",
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def log_predictions(engine: Engine, count: int, model_name: str = "cats") -> None:
    with engine.begin() as connection:
        for _ in range(count):
            values = {"p": uuid4(), "e": uuid4(), "m": model_name, "now": datetime.now(UTC)}
            connection.execute(
                text(
                    "INSERT INTO predictions (prediction_id, model_name, model_version, predicted_class,"
                    " prediction_json, uae_feats, bbsd_feats, features, properties, created_on)"
                    " VALUES (:p, :m, 'v', 'a', '{}', '{}', '{}', '{}', '{}', :now)"
                ),
                values,
            )
            connection.execute(
                text(
                    "INSERT INTO api_log (entry_id, request_method, request_url, response_status_code,"
                    " response_message, timespan, prediction_id, created_on)"
                    " VALUES (:e, 'POST', '/predict', 200, '', 0.1, :p, :now)"
                ),
                values,
            )


class Tick(NamedTuple):
    """What a sensor said in one tick."""

    run_requests: list[dg.RunRequest]
    skip_message: str
    cursor: str | None
    asset_events: list[Any]

    @classmethod
    def of(cls, said: Any) -> Tick:
        return cls(list(said.run_requests or []), said.skip_message or "", said.cursor, list(said.asset_events))


def tick(sensor: dg.SensorDefinition, cursor: str | None = None) -> Tick:
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(instance=instance, cursor=cursor) as context,
    ):
        return Tick.of(sensor.evaluate_tick(context))


def test_new_predictions_ask_for_one_report_per_batch(
    experiment: ExperimentConfig, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    sensor = new_predictions_sensor(Branch(experiment))
    log_predictions(engine, 19)
    log_predictions(engine, 5, model_name="dogs")
    few = tick(sensor)
    assert few.run_requests == []
    assert "19 new predictions; a report is made from 20 on" in few.skip_message
    log_predictions(engine, 1)
    enough = tick(sensor)
    assert len(enough.run_requests) == 1
    again = tick(sensor, cursor=enough.cursor)
    assert again.run_requests == []
    assert "0 new predictions" in again.skip_message


def test_the_report_on_new_predictions_begins_where_the_one_before_ended(
    experiment: ExperimentConfig, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    sensor = new_predictions_sensor(Branch(experiment))
    with dg.DagsterInstance.ephemeral() as instance:
        windows = []
        for cursor in (None, "20"):  # A former release's cursor is the log's number, not a moment.
            log_predictions(engine, 20)
            with dg.build_sensor_context(instance=instance, cursor=cursor) as context:
                (request,) = Tick.of(sensor.evaluate_tick(context)).run_requests
            instance.create_run_for_job(_nothing, tags={**request.tags, "dagster/sensor_name": sensor.name})
            windows.append(request.run_config["resources"]["cats_config"]["config"]["monitor"])
    first, second = windows
    assert second["window_start_utc"] == first["window_end_utc"] < second["window_end_utc"]
    assert first["window_by"] == second["window_by"] == "logged"


def test_a_large_log_is_estimated_and_what_postgresql_does_by_itself_is_no_news(
    experiment: ExperimentConfig, engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setattr("cv_platform.defs.observed.COUNTED_ROWS", 20)
    sensor = observed_sensor(experiment)

    def analyze() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE predictions"))

    log_predictions(engine, 20)
    counted = tick(sensor)
    (seen,) = counted.asset_events
    assert {name: seen.metadata[name].value for name in seen.metadata if name != "last_row"} == {
        "dagster/row_count": 20
    }
    log_predictions(engine, 10)
    analyze()
    estimated = tick(sensor, cursor=counted.cursor)
    (seen,) = estimated.asset_events
    assert set(seen.metadata) == {"estimated_rows", "last_row"}
    assert seen.metadata["estimated_rows"].value == pytest.approx(30, abs=1)
    with engine.begin() as connection:  # Retention, say: the estimate is another.
        connection.execute(
            text(
                "DELETE FROM predictions WHERE prediction_id IN (SELECT prediction_id FROM predictions"
                " ORDER BY created_on LIMIT 5)"
            )
        )
    analyze()
    again = tick(sensor, cursor=estimated.cursor)
    assert again.asset_events == []
    log_predictions(engine, 1)
    (seen,) = tick(sensor, cursor=again.cursor).asset_events
    assert seen.metadata["estimated_rows"].value == pytest.approx(26, abs=1)


def test_without_a_database_the_sensor_says_so(experiment: ExperimentConfig, home: Path) -> None:
    result = tick(new_predictions_sensor(Branch(experiment)))
    assert result.run_requests == []
    assert "make up" in result.skip_message


def test_an_unreachable_database_is_no_failure_of_the_sensor(
    experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:word@127.0.0.1:1/none")
    result = tick(new_predictions_sensor(Branch(experiment)))
    assert result.run_requests == []
    assert "127.0.0.1" in result.skip_message


def test_what_others_write_is_reported_when_it_has_changed(
    experiment: ExperimentConfig,
    engine: Engine,
    database_url: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    sensor = observed_sensor(experiment)
    log_predictions(engine, 2)
    log_predictions(engine, 5, model_name="dogs")
    first = tick(sensor)
    (of_log,) = first.asset_events  # There is no repository yet.
    assert of_log.asset_key == request_log_key("cats")
    assert (of_log.metadata["dagster/row_count"].value, of_log.tags) == (2, {})
    import_dataset(write_images(tmp_path / "one", 1), ds_name="cats", tag="v1.0.0", ds_root=home / "datasets")
    second = tick(sensor, cursor=first.cursor)
    (of_repository,) = second.asset_events
    assert of_repository.asset_key == repository_key("cats")
    md5 = list_tags(experiment.dataset, home=home)["v1.0.0"]
    assert of_repository.tags == {"dagster/data_version": md5}
    assert tick(sensor, cursor=second.cursor).asset_events == []
    log_predictions(engine, 1)
    assert [event.asset_key for event in tick(sensor, cursor=second.cursor).asset_events] == [of_log.asset_key]


def test_the_same_recipe_and_images_are_known_under_any_tag(
    experiment: ExperimentConfig, home: Path, tmp_path: Path
) -> None:
    md5 = import_dataset(write_images(tmp_path / "one", 1), ds_name="cats", tag="v1.0.0", ds_root=home / "datasets")
    provenance = Provenance(ds_name="cats", dvc_tag="v1.0.0", dvc_md5=md5.dvc_md5)
    assert not is_trained_on(experiment, home)
    trained = trained_model(
        home / "models" / "cats", provenance=provenance, effective_config=experiment.model_dump(mode="json")
    )
    RecordStore(home, experiment.name).write("model", trained, run_id="a-run")
    assert is_trained_on(experiment, home)
    assert not is_trained_on(experiment.with_fields({"train.seed": 1}), home)
    import_dataset(write_images(tmp_path / "two", 2), ds_name="cats", tag="v2.0.0", ds_root=home / "datasets")
    assert not is_trained_on(experiment.with_fields({"dataset.dvc_tag": "v2.0.0"}), home)


def test_what_people_do_to_the_pointer_is_shown_once_and_what_runs_do_is_not(
    experiment: ExperimentConfig, home: Path
) -> None:
    sensor = pointer_sensor(Branch(experiment))
    assert tick(sensor).skip_message == "Nobody has moved the pointer since."
    moves = [
        PointerMove(model_name="m", version=version, since_utc=datetime(2026, 1, day, tzinfo=UTC), by=by, because=why)
        for version, day, by, why in (("b", 2, "ada@lab", "it is faster"), ("a", 1, f"{RUN}1234", "passed"))
    ]
    pointer = ProductionPointer(model_name="m", version="b", since_utc=moves[0].since_utc, history=tuple(moves))
    CentralStorage(Settings.from_environment().storage_url).write_pointer(experiment.deploy.service, pointer)
    result = tick(sensor)
    (shown,) = result.asset_events
    assert shown.asset_key == Branch(experiment).key("deployment")
    assert (shown.metadata["by"].value, shown.metadata["because"].value) == ("ada@lab", "it is faster")
    assert not tick(sensor, cursor=result.cursor).asset_events


def write_images(folder: Path, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                image = generator.integers(0, 255, (8, 8, 3), np.uint8)
                cv2.imwrite(str(folder / split / name / f"{number}.png"), image)
    return folder


def test_a_new_tag_asks_for_a_retraining_on_it_once(experiment: ExperimentConfig, home: Path, tmp_path: Path) -> None:
    sensor = new_dataset_version_sensor(Branch(experiment))
    assert "cats" in tick(sensor).skip_message
    import_dataset(write_images(tmp_path / "one", 1), ds_name="cats", tag="v1.0.0", ds_root=home / "datasets")
    first = tick(sensor)
    assert first.run_requests == []
    import_dataset(write_images(tmp_path / "two", 2), ds_name="cats", tag="v1.1.0", ds_root=home / "datasets")
    second = tick(sensor, cursor=first.cursor)
    assert len(second.run_requests) == 1
    config = second.run_requests[0].run_config["resources"]["cats_config"]["config"]
    assert config == {"dataset": {"dvc_tag": "v1.1.0"}}
    assert tick(sensor, cursor=second.cursor).run_requests == []


def test_the_run_of_another_version_shows_what_changed(
    experiment: ExperimentConfig, home: Path, tmp_path: Path
) -> None:
    source, root = write_images(tmp_path / "images", 1), home / "datasets"
    import_dataset(source, ds_name="cats", tag="v1.0.0", ds_root=root)
    (source / "train" / "a" / "0.png").rename(source / "train" / "b" / "from_a.png")
    (source / "train" / "b" / "1.png").unlink()
    import_dataset(source, ds_name="cats", tag="v1.1.0", ds_root=root)
    content = experiment.with_fields({"dataset.valid_fraction": 0.3, "dataset.reference_fraction": 0.3})
    key, shown = dg.AssetKey(["cats", "dataset"]), list[dict[str, Any]]()
    with dg.DagsterInstance.ephemeral() as instance:
        for tag in ("v1.0.0", "v1.0.0", "v1.1.0"):
            path = tmp_path / "cats.yaml"
            path.write_text(yaml.safe_dump(content.with_fields({"dataset.dvc_tag": tag}).model_dump(mode="json")))
            job = build_defs(path).resolve_job_def("cats_experiment")
            made = job.execute_in_process(asset_selection=[key], instance=instance)
            (event,) = made.asset_materializations_for_node("cats__dataset")
            shown.append(dict(event.metadata))
    assert ["changes" in metadata for metadata in shown] == [False, False, True]
    assert shown[2]["changes"].value == (
        "v1.0.0 → v1.1.0: 0 added, 1 removed, 0 changed, 1 relabelled, 0 moved; 10 images are the same."
    )
    rows = {row.data["class"]: row.data for row in shown[2]["changed_classes"].records}
    assert (rows["a"]["lost"], rows["b"]["gained"], rows["b"]["removed"]) == (1, 1, 1)
    assert cv2.imread(shown[2]["changes_sheet"].value) is not None


class Ticks:
    """The schedule of the experiment, ticking on an instance that keeps the runs that it has asked for."""

    def __init__(self, instance: dg.DagsterInstance, cron: str = "0 6 * * 1") -> None:
        self.instance = instance
        self.set_cron(cron)

    def set_cron(self, cron: str) -> None:
        content = yaml.safe_load(DIGITS.read_text())
        content["monitor"] = {**content.get("monitor", {}), "schedule_cron": cron}
        self.branch = Branch(parse_experiment(content, origin="test"))

    def tick(self, moment: datetime) -> tuple[str, str]:
        """Returns the window that the schedule asks for, and keeps the run as Dagster's daemon does: once a run key."""
        schedule = drift_schedule(self.branch)
        context = dg.build_schedule_context(instance=self.instance, scheduled_execution_time=moment)
        (request,) = schedule.evaluate_tick(context).run_requests or []
        window = request.run_config["resources"]["digits_config"]["config"]["monitor"]
        assert window.pop("window_by") == "logged"
        tags = {**request.tags, "dagster/schedule_name": schedule.name, "dagster/run_key": request.run_key or ""}
        if not self.instance.get_runs(dg.RunsFilter(tags={"dagster/run_key": tags["dagster/run_key"]})):
            self.instance.create_run_for_job(_nothing, tags=tags)
        return window["window_start_utc"][:16], window["window_end_utc"][:16]


@dg.job
def _nothing() -> None:
    pass


def at(day: int, hour: int = 6) -> datetime:
    return datetime(2026, 2, day, hour, tzinfo=UTC)


def test_scheduled_windows_touch_and_are_the_same_when_a_tick_comes_again(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        ticks = Ticks(instance)
        first = ticks.tick(at(2))
        assert first == ("2026-01-26T06:00", "2026-02-02T06:00")
        second = ticks.tick(at(9))
        assert second == ("2026-02-02T06:00", "2026-02-09T06:00")
        assert ticks.tick(at(2)) == first
        assert ticks.tick(at(9)) == second
        assert ticks.tick(at(23)) == ("2026-02-09T06:00", "2026-02-23T06:00")  # A tick was missed.
        ticks.set_cron("0 0 * * *")
        assert ticks.tick(at(25, 0)) == ("2026-02-23T06:00", "2026-02-25T00:00")
        assert ticks.tick(at(26, 0)) == ("2026-02-25T00:00", "2026-02-26T00:00")


@pytest.fixture
def alert_server() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An apprise URL of a local HTTP server, and the alerts that it received."""
    received: list[dict[str, str]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"json://127.0.0.1:{server.server_address[1]}", received
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("on_run_failure", "alerts"), [(True, 1), (False, 0)])
def test_a_failed_run_alerts_unless_its_experiment_is_silent(
    experiment: ExperimentConfig,
    home: Path,
    alert_server: tuple[str, list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    on_run_failure: bool,
    alerts: int,
) -> None:
    url, received = alert_server
    monkeypatch.setenv("CV_ALERT_URLS", url)
    config = experiment.model_copy(update={"alerts": AlertsConfig(on_run_failure=on_run_failure)})

    @dg.asset(key_prefix="cats")
    def model() -> None:
        raise RuntimeError("the disk is full")

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([model], instance=instance, raise_on_error=False, selection=[model])
        (run,) = instance.get_runs()
        context = dg.build_run_status_sensor_context(
            sensor_name="run_failure",
            dagster_instance=instance,
            dagster_run=run,
            dagster_event=result.get_run_failure_event(),
        ).for_run_failure()
        run_failure_sensor([config])(context)
    assert len(received) == alerts
    assert all(alert["title"] == "cats: run failed" for alert in received)


class KilledRun:
    """A run whose container is gone, on an instance that retries such runs, and the sensor that looks at it."""

    def __init__(self, instance: dg.DagsterInstance, experiment: ExperimentConfig, tags: dict[str, str]) -> None:
        @dg.job(tags={"experiment": "cats"})
        def killed() -> None:
            pass

        self.instance, self.experiment = instance, experiment
        run = instance.create_run_for_job(killed, status=dg.DagsterRunStatus.STARTED)
        instance.add_run_tags(run.run_id, tags)
        self.run_id = run.run_id
        self.event = instance.report_run_failed(run, "Its container is gone.")

    def look(self) -> int:
        """Lets the sensor look at the run, and returns how often Dagster has been told of its failure."""
        failed = self.instance.get_run_by_id(self.run_id)
        assert failed is not None
        context = dg.build_run_status_sensor_context(
            sensor_name="run_failure", dagster_instance=self.instance, dagster_run=failed, dagster_event=self.event
        ).for_run_failure()
        run_failure_sensor([self.experiment])(context)
        return len(self.instance.all_logs(self.run_id, of_type=dg.DagsterEventType.RUN_FAILURE))


@pytest.fixture
def retrying_instance(home: Path, tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    retries = {"run_retries": {"enabled": True, "max_retries": 1, "retry_on_asset_or_op_failure": False}}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=retries) as instance:
        yield instance


def test_a_run_that_is_retried_alerts_nobody_and_is_not_forgotten(
    experiment: ExperimentConfig,
    retrying_instance: dg.DagsterInstance,
    alert_server: tuple[str, list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, received = alert_server
    monkeypatch.setenv("CV_ALERT_URLS", url)
    run = KilledRun(retrying_instance, experiment, {})
    assert run.look() == 2  # Dagster's daemon has not looked at the first, and is told again.
    retrying_instance.add_run_tags(run.run_id, {"dagster/auto_retry_run_id": "its retry"})
    assert run.look() == 2
    assert received == []


@pytest.mark.parametrize("inherited", [{}, {"cv-platform/retold": "the run that it retries"}])
def test_a_killed_run_that_nobody_retries_alerts_after_dagster_was_told_once_more(
    experiment: ExperimentConfig,
    retrying_instance: dg.DagsterInstance,
    alert_server: tuple[str, list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    inherited: dict[str, str],
) -> None:
    url, received = alert_server
    monkeypatch.setenv("CV_ALERT_URLS", url)
    run = KilledRun(retrying_instance, experiment, inherited)
    for alerts in (0, 1):
        # No third event: this sensor would see it, and go on for ever.
        assert run.look() == 2
        assert len(received) == alerts
    assert "No retry was started" in received[0]["message"]


def test_what_is_wrong_with_the_service_is_told_once_and_when_it_is_over(
    experiment: ExperimentConfig,
    home: Path,
    alert_server: tuple[str, list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, received = alert_server
    rejected = [0]

    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"cv_spool_rejected_entries {rejected[-1]}.0\n".encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("CV_SERVICE_PORT", str(server.server_address[1]))
    sensor = service_alerts_sensor([experiment])
    cursors: list[str | None] = [None]

    def tick() -> str | None:
        found = sensor(dg.build_sensor_context(cursor=cursors[-1]))
        if isinstance(found, dg.SkipReason):
            return found.skip_message
        assert isinstance(found, dg.SensorResult)
        cursors.append(found.cursor)
        return None

    try:
        assert "CV_ALERT_URLS" in (tick() or "")
        monkeypatch.setenv("CV_ALERT_URLS", url)
        for entries in (0, 3, 4, 0):
            rejected.append(entries)
            assert tick() is None
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [alert["title"] for alert in received] == ["LogEntriesRejected", "over: LogEntriesRejected"]
    assert "Expected an answer of http://127.0.0.1" in (tick() or "")
