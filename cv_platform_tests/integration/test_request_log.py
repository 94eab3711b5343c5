"""The request log against a real PostgreSQL: nothing is lost, nothing arrives twice, nothing blocks for ever."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import psycopg2
import pytest
from sqlalchemy import Engine, make_url, text

from cv_platform.database.cluster import Cluster
from cv_platform.database.connection import make_engine
from cv_platform.database.embedded import embedded_database
from cv_platform.database.migrate import migrate
from cv_platform.errors import DatabaseUnavailableError
from cv_platform.serving.log import drainer as drainer_module
from cv_platform.serving.log.database import LogDatabase
from cv_platform.serving.log.deletion import delete_from_database, delete_from_spools
from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.entry import FeedbackEntry, LogEntry, StoredPrediction
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.spool import Spool, SpoolBatch, SpoolRow
from cv_platform.serving.log.tables import RequestRows, find_prediction, make_requests
from cv_platform_tests.support.log_entries import answered, append_to, wait_until_drained
from cv_platform_tests.support.postgres import count, scalar
from cv_platform_tests.support.waiting import WAIT_SECONDS, wait_until


def entry_ids(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return sorted(str(row.entry_id) for row in connection.execute(text("SELECT entry_id FROM api_log")))


def start_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def assert_same_prediction(found: StoredPrediction | None, entry: LogEntry) -> None:
    assert found is not None
    assert found.prediction_id == entry.prediction_id
    assert (found.model_name, found.model_version) == (entry.model_name, entry.model_version)
    assert (found.predicted_class, found.prediction_json) == (entry.predicted_class, entry.prediction_json)
    assert (found.image, found.media_type) == (entry.image, entry.media_type)
    assert found.created_on == entry.created_on
    for name in ("uae_feats", "bbsd_feats", "features", "properties", "raw_hm"):
        np.testing.assert_array_equal(getattr(found, name), getattr(entry, name))
        assert getattr(found, name).dtype == np.float32


def test_a_prediction_is_the_same_from_the_spool_and_from_the_database(log: RequestLog, engine: Engine) -> None:
    random = np.random.default_rng(0)
    entry = answered(
        uae_feats=random.standard_normal(32).astype(np.float32),
        features=np.array([np.nan, np.inf, -np.inf, 1e-40], dtype=np.float32),
        image=random.bytes(10_000),
    )
    assert entry.prediction_id is not None
    append_to(log, entry)
    assert_same_prediction(log.find_prediction(entry.prediction_id), entry)
    wait_until_drained(log)
    assert_same_prediction(log.find_prediction(entry.prediction_id), entry)
    assert_same_prediction(find_prediction(engine, entry.prediction_id), entry)
    assert log.find_prediction(uuid4()) is None
    with engine.connect() as connection:
        (row,) = connection.execute(
            text("SELECT l.*, p.model_name FROM api_log l JOIN predictions p USING (prediction_id)")
        ).mappings()
    assert (row["entry_id"], row["request_method"], row["request_url"]) == (entry.entry_id, "POST", entry.request_url)
    assert (row["response_status_code"], row["response_message"], row["timespan"]) == (200, "ok", 0.25)
    assert (row["created_on"], row["model_name"], row["client_error"]) == (entry.created_on, "digits", None)
    status = log.status()
    assert (status.database, status.depth, status.drained_rows, status.rejected) == ("ok", 0, 1, 0)


def test_a_prediction_without_image_and_heat_map_has_nulls(log: RequestLog, engine: Engine) -> None:
    entry = answered(image=None, raw_hm=None, features=np.array([], dtype=np.float32))
    append_to(log, entry)
    wait_until_drained(log)
    assert entry.prediction_id is not None
    found = find_prediction(engine, entry.prediction_id)
    assert found is not None
    assert (found.image, found.image_sha256, found.raw_hm, found.features.size) == (None, None, None, 0)


def test_refused_requests_are_logged_without_a_prediction(log: RequestLog, engine: Engine) -> None:
    append_to(
        log,
        LogEntry(
            request_method="POST",
            request_url="/predict?\0",
            response_status_code=415,
            response_message="not an image \ud83d",
            client_error="UnsupportedImageError",
            image=b"GIF?",
        ),
    )
    wait_until_drained(log)
    assert scalar(engine, "SELECT response_status_code FROM api_log WHERE prediction_id IS NULL") == 415
    assert scalar(engine, "SELECT request_url || response_message FROM api_log") == "/predict?\ufffdnot an image ?"
    assert (count(engine, "predictions"), count(engine, "images")) == (0, 0)


def test_the_same_upload_is_stored_once(log: RequestLog, engine: Engine) -> None:
    for content in (b"one", b"two", b"one"):
        append_to(log, answered(image=content))
    wait_until_drained(log)
    append_to(log, answered(image=b"two"))
    wait_until_drained(log)
    assert (count(engine, "images"), count(engine, "predictions"), count(engine, "api_log")) == (2, 4, 4)
    assert scalar(engine, "SELECT string_agg(encode(content, 'escape'), ',' ORDER BY content) FROM images") == "one,two"


def test_entries_that_come_one_by_one_share_transactions(log: RequestLog, engine: Engine) -> None:
    begin = time.monotonic()
    for _ in range(60):
        append_to(log, answered(image=None))
        time.sleep(0.02)
    wait_until_drained(log)
    seconds = time.monotonic() - begin
    assert count(engine, "api_log") == 60
    # At most one each half second, however long the entries took; before, nearly as many as entries.
    transactions = scalar(engine, "SELECT count(DISTINCT xmin::text) FROM api_log")
    assert isinstance(transactions, int)
    assert transactions <= seconds / 0.5 + 2


def test_feedback_keeps_its_history_and_may_arrive_before_its_prediction(log: RequestLog, engine: Engine) -> None:
    entry = answered()
    assert entry.prediction_id is not None
    for true_class in ("four", "three", "four"):
        append_to(log, FeedbackEntry(prediction_id=entry.prediction_id, true_class=true_class, source="page"))
    wait_until_drained(log)
    append_to(log, entry)
    wait_until_drained(log)
    history = "SELECT string_agg(true_class, ',' ORDER BY f.created_on, id) FROM feedback f"
    assert scalar(engine, f"{history} JOIN predictions USING (prediction_id)") == "four,three,four"


def test_a_row_that_the_database_refuses_is_put_aside_and_blocks_nobody(
    tmp_path: Path, database_url: str, engine: Engine
) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE api_log ADD CHECK (request_url <> '/poison')"))
    spool = Spool(tmp_path)
    good = [answered() for _ in range(20)]
    poison = [answered(request_url="/poison"), answered(response_status_code=10**12)]
    for entry in (*good[:7], poison[0], *good[7:11], poison[1], *good[11:]):
        append_to(spool, entry)
    drainer = Drainer(spool, database_url)
    drainer.start()
    wait_until_drained(drainer)
    assert entry_ids(engine) == sorted(str(entry.entry_id) for entry in good)
    assert count(engine, "predictions") == 20
    assert [(r.entry_id, r.kind) for r in spool.rejected()] == [(str(entry.entry_id), "request") for entry in poison]
    assert "violates check constraint" in spool.rejected()[0].reason
    assert spool.rejected()[1].reason.startswith("error: ")  # struct.error: the number does not fit the column.
    status = drainer.status()
    assert (status.rejected, status.depth, status.drained_rows, status.database) == (2, 0, 20, "ok")
    drainer.close()
    spool.close()


def test_a_batch_that_was_read_ahead_is_read_again_when_the_one_before_fails_or_it_has_changed(
    tmp_path: Path, database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drainer_module, "_BATCH_ROWS", 3)
    spool = Spool(tmp_path)
    entries = [answered() for _ in range(10)]
    for entry in entries:
        append_to(spool, entry)
    drainer, write, written = Drainer(spool, database_url), LogDatabase.write, list[list[str]]()
    was_made = list[int]()
    gone = entries[4].prediction_id
    assert gone is not None

    def write_with_trouble(
        database: LogDatabase, spool: Spool, rows: Sequence[SpoolRow], made: RequestRows | None
    ) -> None:
        assert spool in drainer._ahead or len(rows) < 3
        if made is not None:
            was_made.append(len(made.predictions))
            assert make_requests(rows) == made
        written.append([row.entry_id for row in rows])
        if len(written) == 1:  # The next three have been read, one of them is deleted then.
            assert len(drainer._ahead[spool].result().rows) == 3
            assert delete_from_spools(tmp_path, gone)
        if len(written) == 4:
            raise psycopg2.OperationalError("the connection is gone")
        write(database, spool, rows, made)

    monkeypatch.setattr(LogDatabase, "write", write_with_trouble)
    drainer.start()
    wait_until_drained(drainer)
    ids = [str(entry.entry_id) for entry in entries]
    # The second batch twice, as it had changed; the third again, after the connection was lost.
    assert written == [ids[:3], ids[3:6], ids[3:6], ids[6:9], ids[6:9], ids[9:]]
    assert was_made == [3, 3, 1], "what was read ahead: the second batch, the third, and the last"
    assert entry_ids(engine) == sorted(ids)
    assert (count(engine, "predictions"), drainer.status().drained_rows) == (9, 10)
    drainer.close()
    spool.close()


def test_rows_that_were_made_ahead_are_made_again_without_a_deleted_prediction_and_name_a_damaged_record(
    tmp_path: Path, database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drainer_module, "_BATCH_ROWS", 2)
    spool = Spool(tmp_path)
    entries = [answered() for _ in range(6)]
    for entry in entries:
        append_to(spool, entry)
    gone = entries[3].prediction_id
    assert gone is not None
    delete_from_database(engine, gone)  # As on another host: this spool still has it.
    damage = "UPDATE entries SET record = '{' WHERE id = 5"
    spool._writer.submit(lambda connection: connection.execute(damage)).result(10)
    drainer = Drainer(spool, database_url)
    drainer.start()
    wait_until_drained(drainer)
    stored = [find_prediction(engine, entry.prediction_id) for entry in entries if entry.prediction_id is not None]
    assert [found is not None for found in stored] == [True, True, True, False, False, True]
    assert count(engine, "api_log") == 5
    assert [entry.entry_id for entry in spool.rejected()] == [str(entries[4].entry_id)]
    drainer.close()
    spool.close()


def test_each_spool_is_read_ahead_by_itself_and_none_is_blamed_for_another(
    tmp_path: Path, database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drainer_module, "_BATCH_ROWS", 3)
    left = Spool(tmp_path)
    for _ in range(12):
        append_to(left, answered())
    left.close()
    own, read_batch, read = Spool(tmp_path), Spool.read_batch, Counter[str]()
    for _ in range(6):
        append_to(own, answered())

    def read_batch_with_trouble(spool: Spool, *limits: int, after: int = 0) -> SpoolBatch:
        read[spool.path.name] += 1
        if spool is own and after and read[own.path.name] == 2:
            raise sqlite3.DatabaseError("database disk image is malformed")
        return read_batch(spool, *limits, after=after)

    monkeypatch.setattr(Spool, "read_batch", read_batch_with_trouble)
    drainer = Drainer(own, database_url)
    drainer.start()
    wait_until(lambda: drainer.status().drained_rows == 18)
    assert not list(tmp_path.glob("*.damaged*"))
    assert count(engine, "api_log") == 18
    # Four batches of the other's twelve entries, each read once.
    assert read[left.path.name] == 4
    drainer.close()
    own.close()


def test_a_damaged_record_is_put_aside(tmp_path: Path, database_url: str, engine: Engine) -> None:
    spool = Spool(tmp_path)
    append_to(spool, answered())
    append_to(spool, answered())
    spool._writer.submit(lambda connection: connection.execute("UPDATE entries SET record = '{' WHERE id = 1")).result(
        10
    )
    drainer = Drainer(spool, database_url)
    drainer.start()
    wait_until_drained(drainer)
    assert count(engine, "predictions") == 1
    assert "DecodeError" in spool.rejected()[0].reason
    drainer.close()
    spool.close()


def test_another_schema_keeps_everything_in_the_spool_until_it_is_migrated(tmp_path: Path, unmigrated_url: str) -> None:
    with RequestLog(tmp_path, unmigrated_url) as log:
        append_to(log, answered())
        wait_until(lambda: log.status().database == "schema mismatch")
        assert "cv-platform migrate" in (log.status().last_error or "")
        assert log.status().depth == 1
        migrate(unmigrated_url)
        wait_until_drained(log)
        assert (log.status().database, log.status().last_error) == ("ok", None)
        # The other way round: somebody migrates to a newer version while this one drains.
        engine = make_engine(unmigrated_url)
        with engine.begin() as migrator:
            migrator.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        append_to(log, answered())
        wait_until(lambda: log.status().database == "schema mismatch")
        assert "newer" in (log.status().last_error or "")
        assert count(engine, "predictions") == 1
        engine.dispose()


def test_the_state_of_the_database_and_its_reason_change_together(
    tmp_path: Path, unmigrated_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str | None]] = []
    opened: list[RequestLog] = []
    is_open = threading.Event()

    class Looking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            """Looks at the status in the very moment in which the drainer takes note of a failure."""
            assert is_open.wait(60)
            status = opened[0].status()
            seen.append((status.database, status.last_error))

    # Before the log: the drainer may note the failure at once, and notes each one once.
    monkeypatch.setattr(logging.getLogger("cv_platform.serving.log.drainer"), "handlers", [Looking()])
    with RequestLog(tmp_path, unmigrated_url) as log:
        opened.append(log)
        is_open.set()
        wait_until(lambda: seen)
    assert (seen[0][0], "cv-platform migrate" in (seen[0][1] or "")) == ("schema mismatch", True)


APPEND_FOR_EVER = """
import os, sys
from pathlib import Path
from cv_platform.serving.log.request_log import RequestLog
from cv_platform_tests.support.log_entries import answered, append_to
import threading
log = RequestLog(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
def work():
    while True:
        entry = answered()
        append_to(log, entry)
        os.write(1, f"{entry.entry_id}\\n".encode())  # One call, which the other threads' lines cannot cut.
for _ in range(4):
    threading.Thread(target=work).start()
"""


@pytest.mark.parametrize("is_draining", [False, True], ids=["spooling", "while draining"])
def test_what_a_killed_process_acknowledged_arrives_exactly_once(
    tmp_path: Path, database_url: str, engine: Engine, is_draining: bool
) -> None:
    process = start_python(APPEND_FOR_EVER, str(tmp_path), *([database_url] if is_draining else []))
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(150)]
    process.send_signal(signal.SIGKILL)
    rest, errors = process.communicate(timeout=WAIT_SECONDS)
    assert errors == ""
    # The last line may be cut: a UUID has 36 characters.
    acknowledged += [line for line in rest.splitlines() if len(line) == 36]
    with RequestLog(tmp_path, database_url) as successor:
        wait_until(lambda: len(list(tmp_path.glob("*.sqlite"))) == 1 and successor.status().depth == 0)
    found = entry_ids(engine)
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert count(engine, "predictions") == len(found)
    assert list(tmp_path.iterdir()) == []


KILLED_AFTER_COMMIT = """
import os, signal, sys
from pathlib import Path
from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.spool import Spool
from cv_platform_tests.support.log_entries import answered, append_to, wait_until_drained
from cv_platform.serving.log.entry import FeedbackEntry
class DiesBeforeDeleting(Spool):
    def begin_delete(self, rows):
        os.kill(os.getpid(), signal.SIGKILL)
spool = DiesBeforeDeleting(Path(sys.argv[1]))
for _ in range(5):
    entry = answered()
    append_to(spool, entry)
    append_to(spool, FeedbackEntry(prediction_id=entry.prediction_id, true_class="four", source="page"))
drainer = Drainer(spool, sys.argv[2])
drainer.start()
wait_until_drained(drainer)
"""


def test_a_crash_between_commit_and_deletion_makes_no_duplicate(
    tmp_path: Path, database_url: str, engine: Engine
) -> None:
    process = start_python(KILLED_AFTER_COMMIT, str(tmp_path), database_url)
    process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == -signal.SIGKILL
    assert (count(engine, "api_log"), count(engine, "feedback")) == (5, 5)
    with RequestLog(tmp_path, database_url) as successor:
        wait_until(lambda: len(list(tmp_path.glob("*.sqlite"))) == 1)
        assert successor.status().drained_rows == 10
    tables = ("api_log", "feedback", "predictions", "images")
    assert [count(engine, table) for table in tables] == [5, 5, 5, 1]


def test_another_replicas_spool_is_left_alone_while_it_lives(log: RequestLog, tmp_path: Path, engine: Engine) -> None:
    living = Spool(tmp_path / "spool")
    entry = answered()
    assert entry.prediction_id is not None
    append_to(living, entry)
    append_to(log, answered())
    wait_until_drained(log)
    assert living.depth() == 1
    assert_same_prediction(log.find_prediction(entry.prediction_id), entry)
    assert count(engine, "predictions") == 1
    living.close()


def test_a_damaged_spool_is_put_aside_and_the_next_one_is_adopted(
    tmp_path: Path, database_url: str, engine: Engine
) -> None:
    left = Spool(tmp_path)
    append_to(left, answered())
    left.close()
    damaged = tmp_path / "0000.sqlite"
    damaged.write_bytes(b"no database at all" * 1000)
    with RequestLog(tmp_path, database_url):
        wait_until(lambda: count(engine, "predictions") == 1 and not damaged.exists())
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == ["0000.damaged"]


def test_two_replicas_with_the_same_uploads_do_not_block_each_other(
    tmp_path: Path, database_url: str, engine: Engine
) -> None:
    uploads = [bytes([number]) * 2000 for number in range(40)]
    with RequestLog(tmp_path, database_url) as one, RequestLog(tmp_path, database_url) as two:

        def append(log: RequestLog, contents: list[bytes]) -> None:
            for content in contents:
                append_to(log, answered(image=content))

        threads = [
            threading.Thread(target=append, args=(one, uploads)),
            threading.Thread(target=append, args=(two, uploads[::-1])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until_drained(one)
        wait_until_drained(two)
        assert one.status().rejected + two.status().rejected == 0
    assert (count(engine, "images"), count(engine, "predictions")) == (40, 80)


@pytest.fixture
def private_server() -> Iterator[tuple[Cluster, str]]:
    """A server of this test's own, to stop and start at will."""
    home = Path(tempfile.mkdtemp(prefix="cv-home-"))
    home.chmod(0o711)
    cluster = Cluster(home)
    try:
        with embedded_database(home) as url:
            migrate(url)
            yield cluster, url
    finally:
        cluster.stop()
        shutil.rmtree(home)


def start_again(cluster: Cluster, url: str) -> None:
    assert cluster.start(make_url(url).port or 0)
    assert cluster.wait_until_it_answers(time.monotonic() + WAIT_SECONDS)


def test_nothing_is_lost_while_the_server_stops_and_starts(
    tmp_path: Path, private_server: tuple[Cluster, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cv_platform.serving.log.drainer._LONGEST_WAIT_SECONDS", 0.5)
    cluster, url = private_server
    engine = make_engine(url)
    ids: list[UUID] = []
    is_over = threading.Event()

    def append_for_ever(log: RequestLog) -> None:
        while not is_over.is_set():
            entry = answered()
            append_to(log, entry)
            ids.append(entry.entry_id)

    with RequestLog(tmp_path, url) as log:
        threads = [threading.Thread(target=append_for_ever, args=(log,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for stop in (cluster.stop, lambda: kill(cluster)):
            wait_until(lambda: log.status().drained_rows > 0 and log.status().database == "ok")
            stop()
            wait_until(lambda: log.status().database == "unreachable")
            before = len(ids)
            wait_until(lambda before=before: len(ids) > before + 20)
            assert log.status().depth > 0
            assert "Received" in (log.status().last_error or "")
            with pytest.raises(DatabaseUnavailableError):
                log.find_prediction(uuid4())
            last = answered()
            append_to(log, last)
            ids.append(last.entry_id)
            assert last.prediction_id is not None
            assert_same_prediction(log.find_prediction(last.prediction_id), last)
            start_again(cluster, url)
        wait_until(lambda: log.status().database == "ok")
        is_over.set()
        for thread in threads:
            thread.join(WAIT_SECONDS)
        wait_until_drained(log)
    assert entry_ids(engine) == sorted(map(str, ids))
    assert count(engine, "predictions") == len(ids)
    engine.dispose()


def kill(cluster: Cluster) -> None:
    running = cluster.postmaster()
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    wait_until(lambda: cluster.postmaster() is None)


def test_a_service_that_starts_before_its_database_drains_once_it_is_there(
    tmp_path: Path, private_server: tuple[Cluster, str]
) -> None:
    cluster, url = private_server
    cluster.stop()
    with RequestLog(tmp_path, url) as log:
        append_to(log, answered())
        wait_until(lambda: log.status().database == "unreachable" and log.status().last_error != "not connected yet")
        start_again(cluster, url)
        wait_until_drained(log)
    assert list(tmp_path.iterdir()) == []


def test_rejected_rows_are_in_the_spool_for_a_person_to_look_at(log: RequestLog, engine: Engine) -> None:
    entry = replace(answered(), response_status_code=2**40)
    append_to(log, entry)
    wait_until_drained(log)
    (rejected,) = log.spool.rejected()
    assert rejected.entry_id == str(entry.entry_id)
    assert str(2**40) in rejected.record
    assert count(engine, "api_log") == 0


def test_the_uploads_of_a_spool_are_readable_by_plain_sqlite(tmp_path: Path) -> None:
    """The format is documented by use: an operator can rescue a spool with the sqlite3 command alone."""
    spool = Spool(tmp_path)
    append_to(spool, answered(image=b"rescue me"))
    connection = sqlite3.connect(spool.path)
    row = connection.execute("SELECT content, media_type FROM entries JOIN images ON sha256 = image_sha256").fetchone()
    connection.close()
    assert row == (b"rescue me", "image/png")
    spool.close()
