"""Deletions and feedback against a real PostgreSQL: nothing that is deleted comes back, nothing else goes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import Engine, text

from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.entry import FeedbackEntry
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.spool import Spool, SpoolRow
from cv_platform_tests.support.log_entries import answered, append_to, wait_until_drained
from cv_platform_tests.support.postgres import count, scalar
from cv_platform_tests.support.waiting import WAIT_SECONDS, wait_until


def said_of(prediction_id: UUID) -> FeedbackEntry:
    return FeedbackEntry(prediction_id=prediction_id, true_class="four", source="page")


def drained(spool: Spool, database_url: str) -> None:
    drainer = Drainer(spool, database_url, adopt=False)
    drainer.start()
    wait_until_drained(drainer)
    drainer.close()


def test_a_deletion_takes_feedback_that_is_being_committed_along(
    log: RequestLog, tmp_path: Path, database_url: str, engine: Engine
) -> None:
    entry = answered()
    prediction_id = entry.prediction_id
    assert prediction_id is not None
    deletions: list[bool] = []
    deletion = threading.Thread(target=lambda: deletions.append(log.delete_prediction(prediction_id)))

    class DeletedWhileCommitting(Spool):
        def still_holds(self, rows: Sequence[SpoolRow]) -> bool:
            is_unchanged = super().still_holds(rows)
            deletion.start()  # The rows are written, and are to be committed next.
            wait_until(
                lambda: scalar(engine, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
            )
            assert is_unchanged
            return is_unchanged

    append_to(log, entry)
    wait_until_drained(log)
    living = DeletedWhileCommitting(tmp_path / "spool")
    append_to(living, said_of(prediction_id))
    drained(living, database_url)
    living.close()
    deletion.join(WAIT_SECONDS)
    assert deletions == [True]
    assert (count(engine, "predictions"), count(engine, "feedback")) == (0, 0)


def test_feedback_that_comes_after_the_deletion_is_dropped(
    log: RequestLog, tmp_path: Path, database_url: str, engine: Engine
) -> None:
    deleted, kept = answered(), answered()
    assert deleted.prediction_id is not None
    assert kept.prediction_id is not None
    for entry in (deleted, kept):
        append_to(log, entry)
    wait_until_drained(log)
    assert log.delete_prediction(deleted.prediction_id)
    late = Spool(tmp_path / "spool")  # Another replica's, which had looked the predictions up before.
    unseen = uuid4()
    for prediction_id in (deleted.prediction_id, kept.prediction_id):
        append_to(late, said_of(prediction_id))
    append_to(late, said_of(unseen))
    drained(late, database_url)
    assert late.depth() == len(late.rejected()) == 0
    late.close()
    with engine.connect() as connection:
        stored = connection.execute(text("SELECT prediction_id FROM feedback")).scalars().all()
    assert set(stored) == {kept.prediction_id, unseen}


def test_a_deletion_takes_feedback_out_of_the_spools(log: RequestLog, tmp_path: Path, engine: Engine) -> None:
    entry = answered()
    assert entry.prediction_id is not None
    append_to(log, entry)
    wait_until_drained(log)
    waiting = Spool(tmp_path / "spool")  # Nobody drains it.
    append_to(waiting, said_of(entry.prediction_id))
    assert log.delete_prediction(entry.prediction_id)
    assert waiting.depth() == 0
    waiting.close()


def test_steady_feedback_does_not_hold_a_deletion_up(log: RequestLog, engine: Engine) -> None:
    entry = answered()
    assert entry.prediction_id is not None
    append_to(log, entry)
    wait_until_drained(log)
    is_over = threading.Event()

    def say_on() -> None:
        while not is_over.is_set():
            assert entry.prediction_id is not None
            append_to(log, said_of(entry.prediction_id))

    said = threading.Thread(target=say_on)
    said.start()
    try:
        wait_until(lambda: count(engine, "feedback"))
        assert log.delete_prediction(entry.prediction_id)
        assert said.is_alive()  # A deletion that waits until nobody says anything never comes back.
    finally:
        is_over.set()
        said.join()
    wait_until_drained(log)
    assert (count(engine, "predictions"), count(engine, "feedback")) == (0, 0)


def test_feedback_that_is_drained_before_its_prediction_is_kept(
    tmp_path: Path, database_url: str, engine: Engine
) -> None:
    entry = answered()
    assert entry.prediction_id is not None
    late, early = Spool(tmp_path), Spool(tmp_path)
    append_to(late, entry)
    append_to(early, said_of(entry.prediction_id))
    drained(early, database_url)
    assert (count(engine, "predictions"), count(engine, "feedback")) == (0, 1)
    drained(late, database_url)
    assert (count(engine, "predictions"), count(engine, "feedback")) == (1, 1)
    late.close()
    early.close()


def test_what_another_host_still_has_does_not_arrive_after_its_deletion(
    log: RequestLog, tmp_path: Path, database_url: str, engine: Engine
) -> None:
    elsewhere = Spool(tmp_path / "another host")  # Cannot be seen from here.
    deleted, kept = answered(image=b"a face"), answered(image=b"a cat")
    assert deleted.prediction_id is not None
    for entry in (deleted, kept):
        append_to(elsewhere, entry)
    append_to(elsewhere, said_of(deleted.prediction_id))
    assert not log.delete_prediction(deleted.prediction_id), "there is none here, which a 404 says"
    drained(elsewhere, database_url)
    elsewhere.close()
    with engine.connect() as connection:
        stored = connection.execute(text("SELECT prediction_id FROM predictions")).scalars().all()
        uploads = connection.execute(text("SELECT content FROM images")).scalars().all()
        logged = connection.execute(text("SELECT prediction_id FROM api_log ORDER BY id")).scalars().all()
    assert stored == [kept.prediction_id]
    assert [bytes(content) for content in uploads] == [b"a cat"]
    assert logged == [None, kept.prediction_id], "that somebody asked is not what is deleted"
    assert count(engine, "feedback") == 0


def test_a_queue_that_stands_still_does_not_hold_a_deletion_up(
    log: RequestLog, tmp_path: Path, database_url: str, engine: Engine
) -> None:
    entry = answered(image=b"a face")
    assert entry.prediction_id is not None
    stuck = Spool(tmp_path / "spool")  # Another worker's, which drains nothing now.
    append_to(stuck, entry)
    assert log.delete_prediction(entry.prediction_id)
    assert log.find_prediction(entry.prediction_id) is None
    drained(stuck, database_url)
    stuck.close()
    assert (count(engine, "predictions"), count(engine, "images"), count(engine, "api_log")) == (0, 0, 1)
