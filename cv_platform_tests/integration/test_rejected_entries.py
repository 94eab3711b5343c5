"""Entries that a real PostgreSQL refuses: they are shown, put back when it is mended, and then go in as they were."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from cv_platform import cli
from cv_platform.errors import DatabaseUnavailableError, ServiceError
from cv_platform.serving.log.entry import LogEntry
from cv_platform.serving.log.rejected_entries import find_rejected, requeue
from cv_platform.serving.log.request_log import RequestLog
from cv_platform_tests.support.log_entries import answered, append_to, wait_until_drained
from cv_platform_tests.support.postgres import count, scalar
from cv_platform_tests.support.waiting import wait_until

MENDED = "ALTER TABLE api_log DROP CONSTRAINT lacks"


def lack_something(engine: Engine, condition: str) -> None:
    """Makes a schema that has no place for some rows."""
    with engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE api_log ADD CONSTRAINT lacks CHECK ({condition})"))


def mend(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(MENDED))


def rejected_one(log: RequestLog, engine: Engine) -> LogEntry:
    lack_something(engine, "request_url <> '/new'")
    entry = answered(request_url="/new", image=b"an upload of its own", media_type="image/webp")
    append_to(log, entry)
    wait_until(lambda: log.status().rejected == 1)
    return entry


def test_a_refused_row_is_shown_and_goes_in_once_the_schema_is_mended(
    tmp_path: Path,
    database_url: str,
    engine: Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path))
    assert cli.main(["log", "rejected"]) == 0
    assert "refused none" in capsys.readouterr().out
    with RequestLog(tmp_path / "spool", database_url) as log:
        entry = rejected_one(log, engine)
        assert entry.prediction_id is not None
        assert cli.main(["log", "rejected"]) == 0
        shown = capsys.readouterr().out
        assert str(entry.entry_id) in shown
        assert 'violates check constraint "lacks"' in shown
        assert "--requeue" in shown
        mend(engine)
        assert cli.main(["log", "rejected", "--requeue", "another-id"]) == 0
        assert "0 log entries" in capsys.readouterr().out
        assert log.status().rejected == 1
        assert cli.main(["log", "rejected", "--requeue"]) == 0
        assert "1 log entries wait for the database again" in capsys.readouterr().out
        wait_until(lambda: count(engine, "predictions") == 1)
        wait_until_drained(log)
        assert (log.status().rejected, log.status().depth) == (0, 0)
        found = log.find_prediction(entry.prediction_id)
    assert found is not None
    assert (found.image, found.media_type) == (b"an upload of its own", "image/webp")
    assert scalar(engine, "SELECT request_url FROM api_log JOIN predictions USING (prediction_id)") == "/new"


def test_what_is_refused_again_is_put_aside_again(log: RequestLog, tmp_path: Path, engine: Engine) -> None:
    rejected_one(log, engine)
    spools = tmp_path / "spool"
    (first,) = find_rejected(spools)
    assert requeue(spools) == 1
    wait_until(lambda: log.status().rejected == 1 and find_rejected(spools)[0].rejected_on > first.rejected_on)
    mend(engine)
    assert requeue(spools) == 1
    wait_until(lambda: count(engine, "predictions") == 1)


def test_a_spool_that_cannot_be_read_is_named_and_one_that_is_just_made_is_passed_by(tmp_path: Path) -> None:
    (tmp_path / "a.sqlite").write_bytes(b"")
    assert find_rejected(tmp_path) == []
    (tmp_path / "b.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ServiceError, match=r"b\.sqlite\. Received: file is not a database"):
        requeue(tmp_path)


def test_a_backlog_that_is_refused_as_a_whole_stays_in_the_queue(log: RequestLog, engine: Engine) -> None:
    lack_something(engine, "response_status_code <> 200")
    entries = [answered() for _ in range(30)]
    for entry in entries:
        log.spool.submit(entry)
    wait_until(lambda: "take at least one of 10 log entries" in (log.status().last_error or ""))
    status = log.status()
    assert (status.database, status.rejected, count(engine, "api_log")) == ("schema mismatch", 0, 0)
    mend(engine)
    wait_until_drained(log)
    assert (log.status().rejected, count(engine, "predictions")) == (0, 30)


def test_our_own_mistake_rejects_no_backlog(log: RequestLog, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    are_all_there = threading.Event()

    def read_record(*_: object) -> object:
        if not are_all_there.is_set():  # A backlog is what comes together, not one by one.
            raise DatabaseUnavailableError("Expected a database. Received: none yet.")
        return {}["entry_id"]

    with monkeypatch.context() as mistaken:
        mistaken.setattr("cv_platform.serving.log.tables.read_record", read_record)
        for _ in range(30):
            log.spool.submit(answered())
        are_all_there.set()
        wait_until(lambda: "KeyError" in (log.status().last_error or ""))
        assert log.status().rejected == 0
    wait_until_drained(log)
    assert (log.status().rejected, count(engine, "predictions")) == (0, 30)
