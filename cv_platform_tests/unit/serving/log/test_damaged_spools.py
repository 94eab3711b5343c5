"""Spools that were put aside: what was deleted does not stay in them, and they do not stay for ever."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest

from cv_platform.serving.log.damaged_spools import delete_from_damaged, put_aside, remove_expired
from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.entry import FeedbackEntry, LogEntry
from cv_platform.serving.log.limits import LogLimits
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.spool import Spool
from cv_platform.settings import Settings
from cv_platform_tests.support.log_entries import answered, append_to

DAY = 86_400


def damage(folder: Path, *entries: LogEntry | FeedbackEntry) -> Path:
    """Leaves a spool with these entries of which one page is overwritten, put aside; returns its file."""
    spool = Spool(folder)
    for entry in entries:
        append_to(spool, entry)
    spool.close()
    with spool.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096)
    put_aside(spool.path, sqlite3.DatabaseError("for a test"))
    return spool.path.with_suffix(".damaged")


def test_a_deletion_removes_the_damaged_spools_that_name_the_prediction(tmp_path: Path) -> None:
    wanted, other = answered(image=b"a face" * 1000), answered()
    assert wanted.prediction_id is not None
    named, unrelated = damage(tmp_path, other, wanted), damage(tmp_path, answered())
    assert b"a face" in named.read_bytes()
    with RequestLog(tmp_path, None) as log:
        assert log.delete_prediction(wanted.prediction_id)
    left = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert unrelated.exists()
    assert not named.exists()
    assert b"a face" not in left
    assert str(wanted.prediction_id).encode() not in left


def test_a_name_in_the_write_ahead_log_counts(tmp_path: Path) -> None:
    prediction_id = uuid4()
    (tmp_path / "x.damaged").write_bytes(b"")
    (tmp_path / "x.damaged-wal").write_bytes(b"before" + str(prediction_id).encode())
    with RequestLog(tmp_path, None) as log:
        assert log.delete_prediction(prediction_id)
    assert not list(tmp_path.glob("x.damaged*"))


@pytest.mark.parametrize("before", [0, 2**20 - 35, 2**20 - 1, 2**20, 2 * 2**20 - 18])
def test_a_name_is_found_wherever_it_lies_in_a_large_file(tmp_path: Path, before: int) -> None:
    prediction_id = uuid4()
    (tmp_path / "x.damaged").write_bytes(bytes(before) + str(prediction_id).encode() + bytes(99))
    assert not delete_from_damaged(tmp_path, uuid4())
    assert delete_from_damaged(tmp_path, prediction_id)


def test_others_go_on_while_a_large_file_is_searched(tmp_path: Path) -> None:
    with (tmp_path / "x.damaged").open("wb") as file:
        file.truncate(2**30)
    searching = threading.Thread(target=delete_from_damaged, args=(tmp_path, uuid4()))
    searching.start()
    turns = 0
    while searching.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 5


def test_damaged_spools_go_when_what_they_hold_may_not_be_kept_longer(tmp_path: Path) -> None:
    old, young = damage(tmp_path, answered()), damage(tmp_path, answered())
    moment = time.time() - 91 * DAY
    os.utime(old, (moment, moment))
    remove_expired(tmp_path, None)
    assert old.exists()
    spool = Spool(tmp_path)
    Drainer(spool, None, LogLimits(keep_days=90))._drain_once()
    spool.close()
    assert not old.exists()
    assert young.exists()


@pytest.mark.parametrize(("keep_days", "left"), [(90, 1), (None, 2)])
def test_what_the_database_refused_goes_too(tmp_path: Path, keep_days: int | None, left: int) -> None:
    spool = Spool(tmp_path)
    for _ in range(2):
        append_to(spool, answered())
        spool.reject(spool.read_batch(1, 10**6).rows[0], "for a test")
    old = (time.time() - 91 * DAY,)
    spool._writer.submit(
        lambda connection: connection.execute("UPDATE rejected SET rejected_on = ? WHERE rowid = 1", old)
    ).result(10)
    Drainer(spool, None, LogLimits(keep_days=keep_days))._drain_once()
    assert spool.rejected_count() == left
    spool.close()


@pytest.mark.parametrize(
    ("log_days", "image_days", "keep_days"), [("365", "90", 90), ("30", "90", 30), ("0", "90", 90), ("0", "0", None)]
)
def test_both_hold_uploads_so_the_shorter_retention_counts(
    tmp_path: Path, log_days: str, image_days: str, keep_days: int | None
) -> None:
    environment = {"CV_HOME": str(tmp_path), "CV_LOG_RETENTION_DAYS": log_days, "CV_IMAGE_RETENTION_DAYS": image_days}
    assert LogLimits.of(Settings.from_environment(environment)).keep_days == keep_days
