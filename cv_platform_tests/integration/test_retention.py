"""Retention on a real PostgreSQL: what goes, what stays, and that it may be stopped, repeated and run beside others."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import dagster as dg
import numpy as np
import pytest
import yaml
from sqlalchemy import Engine, Table, event, func, insert, select

from cv_platform.cli import main
from cv_platform.config import parse_experiment
from cv_platform.database.binary_copy import CopyStream, real_arrays, row_encoder, written_columns
from cv_platform.database.retention import Retention, delete_expired
from cv_platform.database.schema import api_log, deletions, drift_reports, feedback, images, predictions
from cv_platform.defs.io_managers import RecordIOManager
from cv_platform.defs.resources import Installation
from cv_platform.defs.retention import retention_definitions
from cv_platform.errors import DatabaseError
from cv_platform.monitoring.window import monitored_since
from cv_platform.serving.log.deletion import delete_from_database

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def days_ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


def upload(engine: Engine, sha256: str, days: float) -> str:
    row = {"sha256": sha256, "content": b"12345", "bytes": 5, "media_type": "image/png", "created_on": days_ago(days)}
    with engine.begin() as connection:
        connection.execute(insert(images), row)
    return sha256


def prediction_row(days: float, sha256: str | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "prediction_id": uuid4(),
        "model_name": "pets",
        "model_version": "v1",
        "predicted_class": "cat",
        "prediction_json": {},
        "uae_feats": [1.0],
        "bbsd_feats": [1.0],
        "features": [1.0],
        "properties": [1.0],
        "image_sha256": sha256,
        "raw_hm": None,
        "hm_height": None,
        "hm_width": None,
        "created_on": days_ago(days),
        **changes,
    }


def request_row(prediction: dict[str, Any] | None, days: float) -> dict[str, Any]:
    return {
        "entry_id": uuid4(),
        "request_method": "POST",
        "request_url": "/predict",
        "response_status_code": 200 if prediction else 415,
        "response_message": "ok",
        "timespan": 0.1,
        "prediction_id": prediction["prediction_id"] if prediction else None,
        "model_version": "v1",
        "client_error": None,
        "created_on": days_ago(days),
    }


def predict(engine: Engine, days: float, sha256: str | None = None, **changes: Any) -> UUID:
    row = prediction_row(days, sha256, **changes)
    with engine.begin() as connection:
        connection.execute(insert(predictions), row)
        connection.execute(insert(api_log), request_row(row, days))
    return row["prediction_id"]


def say(engine: Engine, prediction_id: UUID, days: float) -> None:
    row = {"entry_id": uuid4(), "prediction_id": prediction_id, "true_class": "dog", "source": "page"}
    with engine.begin() as connection:
        connection.execute(insert(feedback), {**row, "created_on": days_ago(days)})


def count(engine: Engine, table: Table) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def uploads_of(engine: Engine) -> dict[UUID, str | None]:
    with engine.connect() as connection:
        rows = connection.execute(select(predictions.c.prediction_id, predictions.c.image_sha256))
        return {row.prediction_id: row.image_sha256 for row in rows}


def uploads(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        return set(connection.execute(select(images.c.sha256)).scalars())


def expire(engine: Engine, **changes: Any) -> Retention:
    """Keeps the log 30 days and uploads 10, unless told otherwise; the dry run must have said the same."""
    arguments: dict[str, Any] = {"log_retention_days": 30, "image_retention_days": 10, "windows": {}, **changes}
    foretold = delete_expired(engine, now=NOW, is_dry_run=True, **arguments)
    done = delete_expired(engine, now=NOW, **arguments)
    assert foretold.counts() == done.counts()
    return done


def test_deletes_the_old_with_all_that_belongs_to_it_and_keeps_the_rest(engine: Engine) -> None:
    upload(engine, "old", 31)
    upload(engine, "middle", 20)
    upload(engine, "new", 1)
    old, middle = predict(engine, 31, "old"), predict(engine, 20, "middle")
    new, edge = predict(engine, 1, "new"), predict(engine, 30)
    say(engine, old, 1)
    say(engine, middle, 19)

    done = expire(engine)

    assert uploads_of(engine) == {middle: None, new: "new", edge: None}  # Half-open: 30 days to the moment stay.
    assert uploads(engine) == {"new"}
    assert (count(engine, api_log), count(engine, feedback)) == (3, 1)
    assert done.counts() == {
        "requests": 1,
        "predictions": 1,
        "feedback": 1,
        "images": 2,
        "image_bytes": 10,
        "released_uploads": 1,
    }
    assert "Deleted 1 requests, 1 predictions" in done.summary()


def test_an_upload_that_was_sent_again_lives_as_long_as_its_latest_prediction(engine: Engine) -> None:
    upload(engine, "shared", 40)
    first, second, latest = (predict(engine, days, "shared") for days in (40, 20, 2))

    expire(engine)

    assert uploads_of(engine) == {second: None, latest: "shared"}
    assert first not in uploads_of(engine)
    assert uploads(engine) == {"shared"}


@pytest.mark.parametrize(
    ("log_days", "image_days", "kept_uploads", "kept_predictions"),
    [
        (None, None, {"a", "b", "c"}, 3),
        (None, 10, {"c"}, 3),
        (30, None, {"b", "c"}, 2),
        (10, 30, {"c"}, 1),  # An upload is of no use without its prediction.
    ],
)
def test_each_setting_may_be_for_ever(
    engine: Engine, log_days: int | None, image_days: int | None, kept_uploads: set[str], kept_predictions: int
) -> None:
    for sha256, days in (("a", 40), ("b", 20), ("c", 2)):
        predict(engine, days, upload(engine, sha256, days))

    expire(engine, log_retention_days=log_days, image_retention_days=image_days)

    assert uploads(engine) == kept_uploads
    assert count(engine, predictions) == kept_predictions


def test_never_touches_the_window_of_a_monitor_and_says_why(engine: Engine) -> None:
    def experiment(name: str, days: float, cron: str = "0 6 * * 1"):
        content = {
            "name": name,
            "model": {"model_name": name, "classes": ["a", "b"], "input_size": {"h": 8, "w": 8}},
            "dataset": {"ds_name": name, "dvc_tag": "v1"},
            "monitor": {"window_days": days, "schedule_cron": cron},
        }
        return parse_experiment(content, origin="test")

    monthly = monitored_since([experiment("monthly", 7, "@monthly")], NOW)
    assert monthly == {"monthly": days_ago(31)}
    windows = monitored_since([experiment("weekly", 7), experiment("quarterly", 60)], NOW)
    for sha256, days in (("outside", 61), ("inside", 59)):
        predict(engine, days, upload(engine, sha256, days))

    done = expire(engine, windows=windows)

    assert (uploads(engine), count(engine, predictions), count(engine, api_log)) == ({"inside"}, 1, 1)
    assert (done.log_before_utc, done.images_before_utc) == (days_ago(60), days_ago(60))
    assert len(done.warnings) == 2
    assert done.warnings[0].startswith(
        "CV_LOG_RETENTION_DAYS is 30, but the monitor of quarterly judges requests since"
    )


def test_feedback_without_its_prediction_goes_when_it_is_old(engine: Engine) -> None:
    say(engine, uuid4(), 31)
    say(engine, uuid4(), 29)  # Its prediction may still wait in a spool.

    assert expire(engine).feedback == 1
    assert count(engine, feedback) == 1


def test_deletions_are_remembered_as_long_as_what_they_keep_away(engine: Engine) -> None:
    with engine.begin() as connection:
        for days in (31, 29):
            connection.execute(insert(deletions), {"prediction_id": uuid4(), "created_on": days_ago(days)})
    expire(engine)
    assert count(engine, deletions) == 1


def test_refused_requests_go_and_drift_reports_stay(engine: Engine) -> None:
    report = {"experiment": "e", "model_name": "pets", "model_version": "v1", "rows": 1, "verdict": "drift"}
    bounds = {"window_start_utc": days_ago(90), "window_end_utc": days_ago(80), "created_on": days_ago(80)}
    details = {"top_images": [{"image_sha256": "gone"}]}
    with engine.begin() as connection:
        connection.execute(insert(api_log), request_row(None, 31))
        connection.execute(
            insert(drift_reports), {"report_id": uuid4(), **report, **bounds, "details": details, "report_url": "u"}
        )

    assert expire(engine).requests == 1
    assert (count(engine, api_log), count(engine, drift_reports)) == (0, 1)


def test_an_upload_that_a_replica_is_about_to_use_stays(engine: Engine) -> None:
    upload(engine, "again", 40)
    with engine.begin() as replica:  # As `serving.log_tables` does it, between looking and inserting.
        replica.exec_driver_sql("SELECT sha256 FROM images WHERE sha256 = 'again' FOR KEY SHARE")
        done = delete_expired(engine, now=NOW, log_retention_days=30, image_retention_days=10, windows={})
        replica.execute(insert(predictions), prediction_row(0.1, "again"))

    assert done.images == 0
    assert uploads(engine) == {"again"}


def test_the_rows_of_each_version_are_deleted(engine: Engine) -> None:
    for model_name, model_version in (("b", "1"), ("a", "2"), ("a", "1"), ("a", "2")):
        predict(engine, 40, model_name=model_name, model_version=model_version)
    assert expire(engine).predictions == 4


def test_a_second_run_beside_the_first_is_refused(engine: Engine) -> None:
    predict(engine, 40)
    refused: list[str] = []

    def run_another(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM api_log") and not refused:
            with pytest.raises(DatabaseError, match="one retention run at a time") as caught:
                delete_expired(engine, now=NOW, log_retention_days=1, image_retention_days=1, windows={})
            refused.append(str(caught.value))

    event.listen(engine, "before_cursor_execute", run_another)
    delete_expired(engine, now=NOW, log_retention_days=30, image_retention_days=10, windows={})
    event.remove(engine, "before_cursor_execute", run_another)

    assert len(refused) == 1
    assert expire(engine).counts()["predictions"] == 0  # The lock is free again.


def copy_in(engine: Engine, table: Table, rows: Iterable[dict[str, Any]]) -> None:
    columns = written_columns(table)
    encode = row_encoder(table, columns)
    connection = engine.raw_connection()
    try:
        with closing(connection.cursor()) as cursor:
            stream = CopyStream(map(encode, rows))
            cast(Any, cursor).copy_expert(
                f"COPY {table.name} ({', '.join(columns)}) FROM STDIN WITH (FORMAT binary)", stream
            )
        connection.commit()
    finally:
        connection.close()


@pytest.fixture
def large(engine: Engine) -> list[dict[str, Any]]:
    """20,000 predictions over 400 days by two versions, an upload for every two of them, feedback for every tenth."""
    (vector,) = real_arrays(np.ones(2, "<f4").tobytes(), [2])
    vectors = dict.fromkeys(("uae_feats", "bbsd_feats", "features", "properties"), vector)
    rows = [
        prediction_row(
            400 * (i + 0.5) / 20_000, f"{i // 2:064}", model_version=f"v{i % 2}", prediction_json="{}", **vectors
        )
        for i in range(20_000)
    ]
    pictures = [
        {
            "sha256": row["image_sha256"],
            "content": b"0123456789",
            "bytes": 10,
            "media_type": "image/png",
            "created_on": row["created_on"],
        }
        for row in rows[1::2]
    ]
    copy_in(engine, images, pictures)
    copy_in(engine, predictions, rows)
    copy_in(engine, api_log, [request_row(row, 0) | {"created_on": row["created_on"]} for row in rows])
    said = [
        {"entry_id": uuid4(), "prediction_id": row["prediction_id"], "true_class": "dog", "source": "page"}
        | {"created_on": row["created_on"]}
        for row in rows[::10]
    ]
    copy_in(engine, feedback, said)
    return rows


def test_twenty_thousand_rows_go_in_bounded_batches(engine: Engine, large: list[dict[str, Any]]) -> None:
    deleted: list[int] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(("DELETE", "UPDATE")):
            deleted.append(cursor.rowcount)

    event.listen(engine, "after_cursor_execute", note)
    done = expire(engine, log_retention_days=300, image_retention_days=100)

    # Rows are spread evenly over 400 days: 50 a day.
    assert (done.requests, done.predictions, done.feedback) == (5_000, 5_000, 500)
    assert (done.images, done.image_bytes, done.released_uploads) == (7_500, 75_000, 10_000)
    assert max(deleted) <= 1000
    kept = [row["prediction_id"] for row in large[:15_000]]
    with_upload = {row["prediction_id"]: row["image_sha256"] for row in large[:5_000]}
    assert uploads_of(engine) == {prediction_id: with_upload.get(prediction_id) for prediction_id in kept}
    assert (count(engine, api_log), count(engine, feedback), count(engine, images)) == (15_000, 1_500, 2_500)
    assert set(expire(engine, log_retention_days=300, image_retention_days=100).counts().values()) == {0}


def test_more_rows_of_one_time_than_a_batch_has_go_together(engine: Engine) -> None:
    for days in (40, *[35] * 5, 34, 33, 20):
        predict(engine, days)
    done = expire(engine, batch_rows=2)
    assert (done.requests, done.predictions, count(engine, predictions)) == (8, 8, 1)


@pytest.mark.parametrize("statement_number", [2, 9, 16, 30])
def test_a_run_that_is_stopped_anywhere_is_completed_by_the_next(
    engine: Engine, large: list[dict[str, Any]], statement_number: int
) -> None:
    seen = 0

    def stop(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        nonlocal seen
        seen += statement.startswith(("DELETE", "UPDATE"))
        if seen == statement_number:
            raise KeyboardInterrupt

    limits: dict[str, Any] = {"log_retention_days": 300, "image_retention_days": 100, "windows": {}}
    event.listen(engine, "after_cursor_execute", stop)
    with pytest.raises(KeyboardInterrupt):
        delete_expired(engine, now=NOW, **limits)
    event.remove(engine, "after_cursor_execute", stop)

    delete_expired(engine, now=NOW, **limits)

    counts = [count(engine, table) for table in (api_log, predictions, feedback, images)]
    assert counts == [15_000, 15_000, 1_500, 2_500]


def test_deleting_one_prediction_by_hand_meets_no_lock_of_it(engine: Engine, large: list[dict[str, Any]]) -> None:
    old = large[-1]["prediction_id"]
    answered: list[bool] = []

    def by_hand(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        # Between two transactions of the run: the first one has deleted requests only.
        if statement.startswith("WITH RECURSIVE found") and not answered:
            answered.append(delete_from_database(engine, old))

    event.listen(engine, "before_cursor_execute", by_hand)
    done = delete_expired(engine, now=NOW, log_retention_days=300, image_retention_days=100, windows={})
    event.remove(engine, "before_cursor_execute", by_hand)

    assert answered == [True]
    assert (done.predictions, count(engine, predictions)) == (4_999, 15_000)


def definitions() -> dg.Definitions:
    own = dg.Definitions(
        resources={"installation": Installation(), "io_manager": RecordIOManager()}, executor=dg.in_process_executor
    )
    return dg.Definitions.merge(own, retention_definitions([], []))


def retention_job() -> dg.JobDefinition:
    return definitions().resolve_job_def("log_retention")


def test_the_job_deletes_and_reports_and_its_schedule_runs_every_day(
    engine: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("CV_LOG_RETENTION_DAYS", "1")
    predict(engine, 1)
    with engine.begin() as connection:
        connection.execute(predictions.update().values(created_on=datetime(2020, 1, 1, tzinfo=UTC)))
        connection.execute(api_log.update().values(created_on=datetime(2020, 1, 1, tzinfo=UTC)))
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))

    # As a schedule runs it, with the installation's own I/O manager.
    with dg.instance_for_test() as instance:
        result = dg.execute_job(dg.reconstructable(retention_job), instance=instance)

    assert result.success
    (event_of_output,) = [e for e in result.all_node_events if e.event_type_value == "STEP_OUTPUT"]
    metadata = event_of_output.step_output_data.metadata
    assert (metadata["requests"].value, metadata["predictions"].value) == (1, 1)
    assert count(engine, predictions) == 0
    assert "cv_log_retention_timestamp_seconds" in (tmp_path / "home" / "metrics" / "log_retention.prom").read_text()
    schedule = definitions().get_repository_def().get_schedule_def("daily_log_retention")
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 3 * * *", "UTC")


def test_the_job_deletes_nothing_while_a_config_cannot_be_read(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    broken = dg.Definitions.merge(
        dg.Definitions(resources={"installation": Installation()}), retention_definitions([], ["broken.yaml"])
    )
    job = broken.resolve_job_def("log_retention")

    result = job.execute_in_process(raise_on_error=False)

    assert not result.success
    failure = result.failure_data_for_node("delete_expired_log")
    assert failure is not None
    assert "Received: broken.yaml" in str(failure.error)


def test_the_command_counts_before_it_deletes(
    engine: Engine,
    database_url: str,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "configs").mkdir()
    for name, value in {
        "DATABASE_URL": database_url,
        "CV_HOME": str(tmp_path / "home"),
        "CV_CONFIGS": str(tmp_path / "configs"),
        "CV_LOG_RETENTION_DAYS": "0",
        "CV_IMAGE_RETENTION_DAYS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    upload(engine, "old", 3650)

    assert main(["retention", "--dry-run"]) == 0
    assert "Would delete 0 requests, 0 predictions, 0 statements of feedback and 1 uploads" in capsys.readouterr().out
    assert uploads(engine) == {"old"}
    assert main(["retention"]) == 0
    assert "Deleted 0 requests" in capsys.readouterr().out
    assert uploads(engine) == set()


def test_the_command_deletes_nothing_while_a_config_is_broken_and_counts_without_it(
    engine: Engine,
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configs = tmp_path / "configs"
    configs.mkdir()
    for name, value in {
        "DATABASE_URL": database_url,
        "CV_HOME": str(tmp_path / "home"),
        "CV_CONFIGS": str(configs),
        "CV_LOG_RETENTION_DAYS": "0",
        "CV_IMAGE_RETENTION_DAYS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    content = {
        "name": "cats",
        "model": {"model_name": "cats", "classes": ["cat", "dog"], "input_size": {"h": 32, "w": 32}},
        "dataset": {"ds_name": "cats", "dvc_tag": "v1.0.0"},
        # Protects the younger of the two uploads.
        "monitor": {"window_start_utc": "2020-01-01T00:00:00Z"},
    }
    (configs / "cats.yaml").write_text(yaml.safe_dump(content))
    (configs / "broken.yaml").write_text("name: [")
    upload(engine, "kept", (NOW - datetime(2021, 1, 1, tzinfo=UTC)).days)
    upload(engine, "old", 3650)

    assert main(["retention", "--dry-run"]) == 1
    captured = capsys.readouterr()
    assert "and 1 uploads" in captured.out
    first, *_, last = captured.err.splitlines()
    assert first.startswith(f"error: {configs / 'broken.yaml'}: expected a readable YAML file")
    assert last.startswith("error: broken.yaml cannot be loaded, and their monitors may keep more")

    assert main(["retention"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "broken.yaml. Nothing was deleted" in captured.err
    assert uploads(engine) == {"kept", "old"}

    # Two files of one name: the window of one must not hide the other's.
    (configs / "broken.yaml").write_text(yaml.safe_dump({**content, "monitor": {"window_days": 1}}))
    assert main(["retention"]) == 1
    assert "broken.yaml, cats.yaml" in capsys.readouterr().err
    assert uploads(engine) == {"kept", "old"}
    (configs / "broken.yaml").unlink()
    assert main(["retention"]) == 0
    assert uploads(engine) == {"kept"}
