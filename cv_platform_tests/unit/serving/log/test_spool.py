"""The durable queue, without a database."""

from __future__ import annotations

import fcntl
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from cv_platform.errors import DatabaseUnavailableError, SpoolFullError
from cv_platform.local.http import free_port
from cv_platform.serving.log import group_commit
from cv_platform.serving.log.deletion import delete_from_spools
from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.entry import FeedbackEntry, encode
from cv_platform.serving.log.limits import LogLimits
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.spool import BegunEntry, Spool
from cv_platform.serving.log.spool_file import find_spooled
from cv_platform_tests.support.log_entries import answered, append_to, hold_writer


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool")
    yield spool
    spool.close()


def images_in(spool: Spool) -> int:
    with sqlite3.connect(spool.path) as connection:
        count = connection.execute("SELECT count(*) FROM images").fetchone()[0]
    connection.close()
    return count


def begin_and_wait(spool: Spool, entries: int) -> list[BegunEntry]:
    begun = [spool.begin(answered()) for _ in range(entries)]
    for one in begun:
        one.written.result(10)
    return begun


def count_commits(spool: Spool) -> list[str]:
    """Returns a list that grows by each commit before its entries' futures are done."""
    commits: list[str] = []
    spool._writer._connection.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)
    return commits


def test_an_appended_entry_is_on_disk_for_another_process(spool: Spool) -> None:
    append_to(spool, answered())
    with sqlite3.connect(f"file:{spool.path}?mode=ro", uri=True) as other:
        assert other.execute("SELECT count(*) FROM entries").fetchone() == (1,)
    other.close()
    assert spool.depth() == 1
    assert (spool.oldest_age_seconds() or -1.0) >= 0.0


def test_every_commit_is_synced_to_the_disk(spool: Spool) -> None:
    assert spool._writer._connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert spool._writer._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_log_has_its_length_before_the_first_entry_and_a_copy_of_the_files_has_the_entries(
    spool: Spool, tmp_path: Path
) -> None:
    files = [spool.path.with_name(f"{spool.path.name}{extension}") for extension in ("", "-wal")]
    length = files[1].stat().st_size
    assert length > 15 * 2**20
    entries = [answered() for _ in range(3)]
    for entry in entries:
        append_to(spool, entry)
    assert files[1].stat().st_size == length
    for file in files:  # As a machine that dies leaves them.
        shutil.copy(file, tmp_path)
    left = Spool.adopt(tmp_path / spool.path.name)
    assert left is not None
    assert [row.entry_id for row in left.read_batch(10, 10**9).rows] == [str(entry.entry_id) for entry in entries]
    left.close()


def test_the_log_of_a_spool_with_little_room_grows_as_it_is_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LogLimits(max_bytes=2**20))
    assert spool.path.with_name(f"{spool.path.name}-wal").stat().st_size < 2**20
    spool.close()


def test_a_spool_of_a_former_release_whose_uploads_have_no_row_numbers_is_read_written_and_emptied(
    tmp_path: Path,
) -> None:
    kept = Spool(tmp_path)
    first = answered()
    append_to(kept, first)
    kept.close()
    with sqlite3.connect(kept.path) as connection:
        (made,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'images'").fetchone()
        connection.execute("ALTER TABLE images RENAME TO numbered")
        connection.execute(f"{made} WITHOUT ROWID")
        connection.execute("INSERT INTO images SELECT * FROM numbered")
        connection.execute("DROP TABLE numbered")
    connection.close()
    spool = Spool.adopt(kept.path)
    assert spool is not None
    second = answered(image=b"another")
    append_to(spool, second)
    rows = spool.read_batch(10, 10**9).rows
    assert [row.entry_id for row in rows] == [str(first.entry_id), str(second.entry_id)]
    found = [spool.read_image(row.image_sha256) for row in rows if row.image_sha256 is not None]
    assert [one[0] for one in found if one is not None] == [first.image, second.image]
    spool.delete(rows)
    assert images_in(spool) == 0
    spool.close()


def test_the_folder_of_uploads_is_closed_to_others(spool: Spool) -> None:
    assert spool.path.parent.stat().st_mode & 0o777 == 0o700


def test_concurrent_appends_all_arrive_in_order_of_their_thread(spool: Spool) -> None:
    entries = [[answered(image=None) for _ in range(25)] for _ in range(8)]

    def append_all(part: list) -> None:
        for entry in part:
            append_to(spool, entry)

    threads = [threading.Thread(target=append_all, args=(part,)) for part in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [row.entry_id for row in spool.read_batch(1000, 10**9).rows]
    assert sorted(found) == sorted(str(entry.entry_id) for part in entries for entry in part)
    for part in entries:
        wanted = [str(entry.entry_id) for entry in part]
        assert [entry_id for entry_id in found if entry_id in wanted] == wanted


def test_an_upload_is_kept_once_and_until_its_last_entry_goes(spool: Spool) -> None:
    for _ in range(3):
        append_to(spool, answered(image=b"the same"))
    append_to(spool, answered(image=b"another"))
    assert images_in(spool) == 2
    rows = spool.read_batch(10, 10**9).rows
    spool.delete(rows[:2])
    assert images_in(spool) == 2
    spool.delete(rows[2:3])
    assert images_in(spool) == 1
    spool.delete(rows[3:])
    assert (images_in(spool), spool.depth(), spool.oldest_age_seconds()) == (0, 0, None)


def test_what_is_being_deleted_is_not_read_again(spool: Spool) -> None:
    for _ in range(3):
        append_to(spool, answered())
    first, second, third = spool.read_batch(10, 10**9).rows
    goes_on = hold_writer(spool)
    spool.begin_delete([first, second])
    assert spool.read_batch(10, 10**9).rows == [third]
    goes_on.set()
    spool.finish_delete()
    assert (spool.read_batch(10, 10**9).rows, spool.depth()) == ([third], 1)


def test_a_batch_ends_before_its_uploads_grow_too_large_but_is_never_empty(spool: Spool) -> None:
    for content in (b"a" * 60_000, b"b" * 60_000, b"a" * 60_000, b"c" * 500_000):
        append_to(spool, answered(image=content))
    assert len(spool.read_batch(10, 100_000).rows) == 1
    assert len(spool.read_batch(10, 140_000).rows) == 3  # The third has the first one's upload.
    assert len(spool.read_batch(2, 10**9).rows) == 2
    assert [spool.read_batch(rows, 10**9).are_all for rows in (3, 4, 5)] == [False, True, True]
    assert not spool.read_batch(10, 140_000).are_all
    spool.delete(spool.read_batch(3, 10**9).rows)
    assert len(spool.read_batch(10, 100_000).rows) == 1


def test_a_batch_ends_before_what_a_large_network_leaves_grows_too_large(spool: Spool) -> None:
    for _ in range(4):
        append_to(spool, answered(features=np.zeros(25_000, np.float32), image=None))
    found = spool.read_batch(10, 250_000)
    assert (len(found.rows), found.are_all) == (2, False)


def test_a_full_spool_refuses_and_takes_entries_again_when_it_is_drained(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LogLimits(max_bytes=150_000))
    append_to(spool, answered(image=b"x" * 200_000))
    with pytest.raises(SpoolFullError, match="less than 150000 bytes"):
        append_to(spool, answered())
    assert spool.depth() == 1
    spool.delete(spool.read_batch(1, 10**9).rows)
    append_to(spool, answered())
    assert spool.depth() == 1
    spool.close()


def test_an_entry_that_fails_does_not_take_its_group_down(tmp_path: Path) -> None:
    spool = Spool(tmp_path, LogLimits(max_bytes=400_000))
    gate = hold_writer(spool)
    small, large, late = (spool.submit(answered(image=data)) for data in (b"s", b"l" * 900_000, b"n"))
    gate.set()
    assert small.result(10) is None
    assert large.result(10) is None
    with pytest.raises(SpoolFullError):
        late.result(10)
    assert spool.depth() == 2
    spool.close()


def test_an_entry_that_is_given_up_while_the_disk_does_not_answer_never_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path)
    gate = hold_writer(spool)
    assert spool.submit(answered()).cancel()
    monkeypatch.setattr("cv_platform.serving.log.spool._TRY_SECONDS", 0.1)
    with pytest.raises(SpoolFullError, match=r"within 0\.1 s"):
        spool.try_out()
    gate.set()
    last = answered()
    append_to(spool, last)
    assert [row.entry_id for row in spool.read_batch(10, 10**9).rows] == [str(last.entry_id)]
    spool.close()


def test_too_many_waiting_entries_are_refused_at_once(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    is_held, gate = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        is_held.set()
        gate.wait(60)

    held = spool._writer.submit(hold)
    assert is_held.wait(60)  # Else the writer may take the next one into the same transaction.
    monkeypatch.setattr("cv_platform.serving.log.group_commit.MAX_QUEUED_BYTES", 1000)
    waiting = spool.submit(answered(image=b"x" * 5000))  # A single one may be larger than the limit.
    with pytest.raises(SpoolFullError, match="less than 1000 bytes waiting"):
        spool.submit(answered())
    gate.set()
    held.result(10)
    waiting.result(10)
    append_to(spool, answered())


def test_a_begun_entry_is_on_disk_at_once_and_drained_when_it_is_settled(spool: Spool) -> None:
    entry = answered()
    begun = spool.begin(entry)
    assert begun.written.result(10) is None
    assert spool.depth() == 1
    assert entry.prediction_id is not None
    assert find_spooled(spool.path.parent, entry.prediction_id) is not None
    assert spool.read_batch(10, 10**9) == ([], True)
    begun.settle("No pictures.\0", 1.5)
    assert spool.read_batch(10, 10**9) == ([], True), "not before that is on disk as well"
    spool.write_outcomes()
    (row,) = spool.read_batch(10, 10**9).rows
    expected = encode(replace(entry, response_message="No pictures.\ufffd", timespan=1.5))
    assert json.loads(row.record) == json.loads(expected.record)
    assert row.vectors == expected.vectors
    assert spool.still_holds([row])


def test_settled_entries_pass_those_that_are_not(spool: Spool) -> None:
    first, second = spool.begin(answered()), answered()
    append_to(spool, second)
    assert [row.entry_id for row in spool.read_batch(10, 10**9).rows] == [str(second.entry_id)]
    first.settle("ok", 0.1)
    spool.write_outcomes()
    assert len(spool.read_batch(10, 10**9).rows) == 2


def test_what_is_known_last_of_many_entries_is_written_by_one_transaction(spool: Spool) -> None:
    begun = begin_and_wait(spool, 3)
    commits = count_commits(spool)
    for one in begun:
        one.settle("ok", 0.2)
    assert commits == []
    spool.write_outcomes()
    spool.write_outcomes()
    assert len(commits) == 1
    assert [json.loads(row.record)["timespan"] for row in spool.read_batch(10, 10**9).rows] == [0.2] * 3


def test_outcomes_do_not_gather_while_nobody_drains(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv_platform.serving.log.outcomes._AT_ONCE", 3)
    commits = count_commits(spool)
    begun = begin_and_wait(spool, 7)
    before = len(commits)
    for one in begun:
        one.settle("ok", 0.2)
    spool.try_out()  # Behind what was queued.
    assert len(commits) <= before + 3
    assert len(spool.read_batch(10, 10**9).rows) == 6
    spool.write_outcomes()
    assert [json.loads(row.record)["timespan"] for row in spool.read_batch(10, 10**9).rows] == [0.2] * 7


def test_large_entries_are_deleted_in_parts(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv_platform.serving.log.spool._DELETED_BYTES", 2_000_000)
    for number in range(6):
        append_to(spool, answered(image=bytes([number]) * 1_000_000))
    commits = count_commits(spool)
    spool.delete(spool.read_batch(10, 10**9).rows)
    assert len(commits) == 3
    assert spool.depth() == 0


def test_the_log_is_long_only_while_the_disk_has_room(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def log_pages() -> int:
        return spool._writer._connection.execute("PRAGMA wal_autocheckpoint").fetchone()[0]

    append_to(spool, answered())
    assert log_pages() == 4000
    with monkeypatch.context() as short:
        short.setattr("cv_platform.serving.log.room.MAX_QUEUED_BYTES", 2**60)  # Twice as much has to be free.
        append_to(spool, answered())
        assert log_pages() == 1000
    append_to(spool, answered())
    assert log_pages() == 4000


def test_an_entry_that_is_never_settled_is_drained_by_the_next_owner(tmp_path: Path) -> None:
    spool, entry = Spool(tmp_path), answered()
    spool.begin(entry)
    spool.close()
    adopted = Spool.adopt(spool.path)
    assert adopted is not None
    (row,) = adopted.read_batch(10, 10**9).rows
    assert json.loads(row.record) == json.loads(encode(entry).record)
    adopted.close()


def test_entries_whose_outcomes_the_disk_refuses_are_drained_as_they_began(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun = spool.begin(answered())
    begun.written.result(10)
    monkeypatch.setattr(group_commit, "_MAX_QUEUED", 0)
    begun.settle("too late", 9.0)
    spool.write_outcomes()
    (row,) = spool.read_batch(10, 10**9).rows
    assert json.loads(row.record)["response_message"] == answered().response_message
    assert "keeps message and time of entries as they began (1)" in caplog.text
    with pytest.raises(SpoolFullError):
        spool.begin(answered())
    assert len(spool.read_batch(10, 10**9).rows) == 1


def test_nothing_is_deleted_while_the_database_may_have_it_too(tmp_path: Path) -> None:
    entry = answered()
    assert entry.prediction_id is not None
    with RequestLog(tmp_path, f"postgresql://nobody@127.0.0.1:{free_port()}/none") as log:
        append_to(log, entry)
        with pytest.raises(DatabaseUnavailableError, match="Nothing was deleted"):
            log.delete_prediction(entry.prediction_id)
        assert log.find_prediction(entry.prediction_id) is not None


def test_settling_brings_nothing_back_that_was_deleted_meanwhile(spool: Spool) -> None:
    entry = answered()
    begun = spool.begin(entry)
    begun.written.result(10)
    assert entry.prediction_id is not None
    assert delete_from_spools(spool.path.parent, entry.prediction_id)
    begun.settle("ok", 0.1)
    spool.write_outcomes()
    (row,) = spool.read_batch(10, 10**9).rows
    assert json.loads(row.record)["prediction_id"] is None
    assert json.loads(row.record)["timespan"] == entry.timespan


def test_entries_of_busy_workers_share_one_transaction(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv_platform.serving.log.spool._SHARING_SECONDS", 60.0)
    commits = count_commits(spool)
    patient = [spool.begin(answered(), more_follow=True) for _ in range(2)]
    assert not any(begun.written.done() for begun in patient)
    assert spool.depth() == 0
    spool.begin(answered()).written.result(10)
    assert [begun.written.result(0) for begun in patient] == [None] * 2
    assert len(commits) == 1
    assert spool.depth() == 3


def test_a_patient_entry_that_nobody_follows_is_written_soon(spool: Spool) -> None:
    assert spool.begin(answered(), more_follow=True).written.result(10) is None
    assert spool.depth() == 1


def test_a_spool_that_closes_writes_what_could_have_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv_platform.serving.log.spool._SHARING_SECONDS", 60.0)
    spool = Spool(tmp_path)
    begun = spool.begin(answered(), more_follow=True)
    begun.settle("settled", 2.0)
    spool.close()
    assert begun.written.result(0) is None
    adopted = Spool.adopt(spool.path)
    assert adopted is not None
    assert [json.loads(row.record)["response_message"] for row in adopted.read_batch(10, 10**9).rows] == ["settled"]
    adopted.close()


def test_entries_written_by_many_threads_are_all_there_once(spool: Spool) -> None:
    entries = [answered() for _ in range(400)]

    def write(number: int) -> Future[None]:
        if number % 3 == 0:
            return spool.submit(entries[number])
        begun = spool.begin(entries[number], more_follow=number % 3 == 1)
        begun.settle("ok", float(number))
        return begun.written

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(write, range(400)))
    for future in done:
        assert future.result(10) is None
    spool.write_outcomes()
    rows = spool.read_batch(1000, 10**9).rows
    times = {row.entry_id: json.loads(row.record)["timespan"] for row in rows}
    assert times == {
        str(entry.entry_id): number if number % 3 else entry.timespan for number, entry in enumerate(entries)
    }


def test_a_spool_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Spool(tmp_path / "file" / "spool")


def test_closing_an_empty_spool_leaves_no_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    append_to(spool, answered())
    spool.delete(spool.read_batch(1, 10**9).rows)
    spool.close()
    spool.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SpoolFullError, match="closed"):
        append_to(spool, answered())


def test_what_is_left_is_adopted_by_a_successor(tmp_path: Path) -> None:
    former = Spool(tmp_path)
    entry = answered()
    append_to(former, entry)
    assert Spool.adopt(former.path) is None, "its owner lives"
    former.close()
    adopted = Spool.adopt(former.path)
    assert adopted is not None
    assert [row.entry_id for row in adopted.read_batch(10, 10**9).rows] == [str(entry.entry_id)]
    assert Spool.adopt(former.path) is None, "it has a new owner"
    adopted.delete(adopted.read_batch(10, 10**9).rows)
    adopted.close()
    assert Spool.adopt(former.path) is None, "it is gone"
    assert list(tmp_path.iterdir()) == []


def test_a_rejected_entry_keeps_everything_and_survives_its_spool(tmp_path: Path) -> None:
    former = Spool(tmp_path)
    entry = answered(image=b"kept")
    append_to(former, entry)
    former.reject(former.read_batch(1, 10**9).rows[0], "because")
    assert (former.depth(), former.rejected_count()) == (0, 1)
    former.close()
    adopted, successor = Spool.adopt(former.path), Spool(tmp_path)
    assert adopted is not None
    successor.take_rejected(adopted)
    adopted.close()
    assert not former.path.exists()
    (rejected,) = successor.rejected()
    assert (rejected.entry_id, rejected.kind, rejected.reason) == (str(entry.entry_id), "request", "because")
    with sqlite3.connect(successor.path) as connection:
        assert connection.execute("SELECT image FROM rejected").fetchone() == (b"kept",)
    connection.close()
    successor.close()


def test_a_new_spool_whose_lock_another_replica_looks_at_takes_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at, free = uuid4(), uuid4()
    names = iter((looked_at, free))
    monkeypatch.setattr("cv_platform.serving.log.spool.uuid4", lambda: next(names))
    with (tmp_path / f"{looked_at.hex}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        spool = Spool(tmp_path)
    assert spool.path.stem == free.hex
    spool.close()


def test_a_prediction_is_found_in_any_replicas_spool(tmp_path: Path) -> None:
    mine, other = Spool(tmp_path), Spool(tmp_path)
    entry = answered()
    assert entry.prediction_id is not None
    append_to(other, entry)
    append_to(mine, FeedbackEntry(prediction_id=entry.prediction_id, true_class="four", source="page"))
    assert mine.find(entry.prediction_id) is None
    found = find_spooled(tmp_path, entry.prediction_id)
    assert found is not None
    assert (found.prediction_id, found.image) == (entry.prediction_id, b"an image")
    assert find_spooled(tmp_path, uuid4()) is None
    assert find_spooled(tmp_path / "none", uuid4()) is None
    mine.close()
    other.close()


def test_space_is_given_back_after_an_outage(spool: Spool) -> None:
    for number in range(8):
        append_to(spool, answered(image=bytes([number]) * 1_000_000))
    spool.delete(spool.read_batch(10, 10**9).rows)
    with sqlite3.connect(spool.path) as connection:
        before = connection.execute("PRAGMA page_count").fetchone()[0]
        spool.shrink()
        freed = before - connection.execute("PRAGMA page_count").fetchone()[0]
        assert 1000 <= freed <= 1002  # SQLite's own map of pages has one page for every 819 others.
    connection.close()


def test_without_a_database_entries_stay_and_the_status_says_so(spool: Spool) -> None:
    append_to(spool, answered())
    drainer = Drainer(spool, None)
    drainer.start()
    drainer.close()
    status = drainer.status()
    assert (status.depth, status.database, status.drained_rows) == (1, "not configured", 0)
    assert status.last_error is None


def test_a_request_log_without_a_database_finds_what_it_keeps(tmp_path: Path) -> None:
    entry = answered()
    assert entry.prediction_id is not None
    with RequestLog(tmp_path, None) as log:
        append_to(log, entry)
        assert log.spool.submit(answered()).result(10) is None
        found = log.find_prediction(entry.prediction_id)
        assert found is not None
        assert found.predicted_class == "three"
        assert log.find_prediction(uuid4()) is None
        assert log.status().depth == 2


def test_a_batch_knows_that_one_of_its_entries_was_deleted_meanwhile(spool: Spool) -> None:
    first, second = answered(), answered()
    append_to(spool, first)
    append_to(spool, second)
    rows = spool.read_batch(10, 10_000_000).rows
    assert spool.still_holds(rows)
    assert second.prediction_id is not None
    assert delete_from_spools(spool.path.parent, second.prediction_id)
    assert not spool.still_holds(rows)
    assert spool.still_holds(rows[:1])
    assert spool.still_holds(spool.read_batch(10, 10_000_000).rows)
