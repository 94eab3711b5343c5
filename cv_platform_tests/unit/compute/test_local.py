from __future__ import annotations

import errno
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cv_platform.compute import engine as engines
from cv_platform.compute import map_shards, progress
from cv_platform.compute.engine import AHEAD, Salvage, patiently
from cv_platform.compute.local import LocalEngine
from cv_platform.compute.progress import Progress, watched
from cv_platform.errors import (
    BundleNotFoundError,
    CorruptBundleError,
    CvPlatformError,
    InvalidDatasetError,
    ShardError,
    StorageError,
)
from cv_platform.files import exclusive
from cv_platform.object_store import ObjectStore
from cv_platform.storage import CentralStorage

from .tasks import Numbers, doubled, process_id, shards, tensorflow_threads

PROCESSES = LocalEngine(2, worth_seconds=0)


def test_a_shard_that_kills_its_process_is_named_and_the_rest_is_done(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    work = map_shards(doubled, shards(4), engine=PROCESSES, title="Doubling", total=8)
    with pytest.raises(ShardError, match=r"numbers from 6 \(has ended 3 processes, the last of which .*SIGKILL\)"):
        done.extend(value for _, result in work for value in result)
    assert done == [0, 2, 4, 6, 8, 10]
    assert "A process that worked on numbers from 6 was ended by SIGKILL (1 of 3)" in caplog.messages


ONE_BY_ONE: Salvage[Numbers, list[int]] = Salvage(
    divide=lambda shard: [Numbers((value,)) for value in shard.values],
    join=lambda parts: [value for part in parts for value in part],
    lost=None,
)


def test_the_rest_of_such_a_shard_can_be_saved_in_its_place() -> None:
    salvage = replace(ONE_BY_ONE, lost=lambda shard, why: [-1])
    done = map_shards(doubled, shards(4), engine=PROCESSES, title="Doubling", total=8, salvage=salvage)
    assert [result for _, result in done] == [[0, 2], [4, 6], [8, 10], [12, -1]]


def test_the_image_to_blame_is_named_where_none_may_be_lost() -> None:
    done: list[int] = []
    work = map_shards(doubled, shards(4), engine=PROCESSES, title="Doubling", total=8, salvage=ONE_BY_ONE)
    with pytest.raises(ShardError, match=r"Received: numbers from 7 \(has ended 3 processes.*\)\. All others are done"):
        done.extend(value for _, result in work for value in result)
    assert done == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("lost", [None, lambda shard, why: [-1]])
def test_where_more_images_are_to_blame_than_can_be_the_work_ends(lost: Any) -> None:
    many = [Numbers((7, 1, 7, 7)), Numbers((3,))]
    salvage = replace(ONE_BY_ONE, lost=lost, most_lost=1)
    with pytest.raises(
        ShardError, match=r"from 7 \(.*\), numbers from 7 \(.*\)\. The work was ended, as so many"
    ) as caught:
        list(
            map_shards(
                doubled, many, engine=LocalEngine(1, worth_seconds=0), title="Doubling", total=5, salvage=salvage
            )
        )
    assert str(caught.value).count("has ended 3 processes") == 2


def test_an_image_alone_is_not_tried_again_to_save_it(caplog: pytest.LogCaptureFixture) -> None:
    def divide(shard: Numbers) -> list[Numbers]:
        raise AssertionError(f"what is in {shard.name} is known")

    salvage: Salvage[Numbers, list[int]] = Salvage(divide, join=lambda parts: parts[0], lost=lambda shard, why: [-1])
    one = [Numbers((7,))]
    done = map_shards(doubled, one, engine=PROCESSES, title="Doubling", total=1, salvage=salvage)
    assert [result for _, result in done] == [[-1]]
    assert re.search(r"Doubling: numbers from 7 has ended 3 processes, .* by SIGKILL; the rest goes on", caplog.text)


def test_an_error_of_the_function_ends_the_work_as_it_is() -> None:
    with pytest.raises(InvalidDatasetError, match="Expected no 9") as caught:
        list(map_shards(doubled, [Numbers((9,))], engine=PROCESSES, title="Doubling", total=1))
    assert caught.value.__notes__ == [f"Of numbers from 9, in a process of its own on {socket.gethostname()}"]
    with pytest.raises(InvalidDatasetError) as here:
        list(map_shards(doubled, [Numbers((9,))], engine=None, title="Doubling", total=1))
    assert here.value.__notes__ == [f"Of numbers from 9, in this process on {socket.gethostname()}"]
    with pytest.raises(TypeError) as unforeseen:
        list(map_shards(len, shards(1), engine=PROCESSES, title="Counting", total=1))  # pyright: ignore[reportArgumentType]
    assert re.match(r"Of numbers from 0, in a process .*:\nTraceback", unforeseen.value.__notes__[0])


@pytest.mark.parametrize("in_order", [True, False])
def test_shards_are_taken_as_the_work_goes_on(in_order: bool) -> None:
    taken: list[Numbers] = []

    def source() -> Iterator[Numbers]:
        for shard in shards(100):
            taken.append(shard)
            yield shard

    results = map_shards(process_id, source(), engine=PROCESSES, title="Counting", total=10, in_order=in_order)
    for number, (_, process) in enumerate(results):
        assert process != os.getpid()
        assert len(taken) <= number + 1 + AHEAD * PROCESSES.workers
    assert len(taken) == 100


def test_little_work_starts_no_process() -> None:
    results = map_shards(process_id, shards(5), engine=None, title="Counting", total=10)
    assert {process for _, process in results} == {os.getpid()}


@pytest.mark.parametrize("engine", [PROCESSES, LocalEngine(2, worth_seconds=1.0)])
def test_what_each_process_would_have_to_load_is_begun_here_once_and_then_shared_out(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nobody(LocalEngine):
        def run(self, *_: Any, **__: Any) -> Iterator[Any]:
            raise AssertionError("nobody is asked for little work")

    little = map_shards(process_id, shards(5), engine=Nobody(), title="Counting", total=10, alone_seconds=1.0)
    assert [process for _, process in little] == [os.getpid()] * 5

    ticks = count(0.0, 0.25)  # A quarter of a second for each shard: after two, 8 of 10 are left.
    monkeypatch.setattr(engines.time, "perf_counter", lambda: next(ticks))
    much = map_shards(process_id, shards(10), engine=engine, title="Counting", total=20, alone_seconds=2.0)
    outcomes = list(much)
    assert [shard for shard, _ in outcomes] == shards(10)
    assert [process == os.getpid() for _, process in outcomes] == [True] * 2 + [False] * 8


ALONE = """
import sys
from pathlib import Path
from cv_platform.compute import map_shards
from cv_platform.compute.local import LocalEngine
from cv_platform_tests.unit.compute.tasks import doubled, shards
engine = LocalEngine(int(sys.argv[2]), notes=Path(sys.argv[1]))
print([sum(result) for _, result in map_shards(doubled, shards(4), engine=engine, title="Doubling", total=8)])
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_has_killed_who_worked_alone_is_left_to_other_processes(
    workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path), str(workers)], capture_output=True, timeout=100)
    assert (run.returncode, run.stdout) == (-signal.SIGKILL, b"")
    engine, done = LocalEngine(workers, notes=tmp_path), list[int]()
    for _ in range(2):
        caplog.clear()
        with pytest.raises(ShardError, match="numbers from 6"):
            done.extend(sum(r) for _, r in map_shards(doubled, shards(4), engine=engine, title="Doubling", total=8))
        assert "Doubling: a process that worked alone has died at numbers from 6: now" in caplog.text
    assert done == [2, 10, 18] * 2


def work_beside(notes: Path, title: str = "Counting") -> list[bool]:
    """Returns of each of four shards whether this process has worked on it."""
    made = map_shards(process_id, shards(4), engine=LocalEngine(2, notes=notes), title=title, total=8)
    return [process == os.getpid() for _, process in made]


def test_a_death_is_forgotten_that_was_not_the_shards_doing(tmp_path: Path) -> None:
    def work(title: str) -> list[bool]:
        return work_beside(tmp_path, title)

    def leave(name: str, days: int = 0) -> Path:
        note = tmp_path / f"Counting.{name}"
        note.write_text(name)
        then = time.time() - 86_400 * days
        os.utime(note, (then, then))
        return note

    died = leave("numbers from 2")
    assert work("Countings") == [True] * 4, "another work"
    assert work("Counting") == [True, False, False, False]
    assert not died.exists(), "others have lived through that shard"
    assert work("Counting") == [True] * 4
    gone = leave("numbers from 99", days=29)
    assert work("Counting") == [True] * 4, "a death at other data"
    assert gone.exists(), "nobody has worked on that shard"
    leave("numbers from 99", days=31)
    assert work("Counting") == [True] * 4
    assert not gone.exists()
    with exclusive(leave("numbers from 4")):
        assert work("Counting") == [True] * 4, "of a process that lives"
    (tmp_path / "Counting.numbers from 4").unlink()
    with pytest.raises(InvalidDatasetError):
        list(map_shards(doubled, [Numbers((9,))], engine=LocalEngine(notes=tmp_path), title="Doubling", total=1))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_the_work(tmp_path: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"  # No file may have a byte.
    script = full + ALONE.replace("shards(4)", "shards(3)")
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path), "1"], capture_output=True, timeout=100)
    assert (run.returncode, run.stdout) == (0, b"[2, 10, 18]\n"), run.stderr
    assert list(tmp_path.iterdir()) == []


def test_where_locks_are_refused_no_notes_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    assert work_beside(tmp_path) == [True] * 4
    assert list(tmp_path.iterdir()) == []


def test_a_shard_waits_for_a_storage_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(engines.time, "sleep", waits.append)

    def read(shard: Numbers) -> int:
        if sum(waits) < 30:
            raise StorageError("Cannot read.")
        return shard.images

    assert [images for _, images in map_shards(read, shards(2), engine=None, title="Reading", total=4)] == [2, 2]
    assert sum(waits) == pytest.approx(31)

    def never(_: Numbers) -> int:
        raise StorageError("Cannot read at all.")

    with pytest.raises(StorageError, match="at all"):
        list(map_shards(never, shards(1), engine=None, title="Reading", total=2))


@pytest.mark.parametrize("error", [BundleNotFoundError, CorruptBundleError])
def test_what_no_waiting_mends_is_not_waited_for(error: type[CvPlatformError], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.time, "sleep", lambda _: pytest.fail("it waits"))

    def load(_: Numbers) -> int:
        raise error("Expected a published version.")

    with pytest.raises(error, match="published"):
        list(map_shards(load, shards(1), engine=None, title="Loading", total=2))


def test_what_is_there_and_of_no_use_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.time, "sleep", lambda _: pytest.fail("it waits"))
    storage, store = CentralStorage(tmp_path), ObjectStore(tmp_path)
    store.replace(store.path("services", "pets", "production.json"), "{")
    with pytest.raises(StorageError, match=r"production\.json: expected a ProductionPointer"):
        patiently("The pointer", storage.read_pointer, "pets")

    def write() -> None:
        with store.errors("write"):
            raise PermissionError("Access Denied")  # As S3 says it.

    with pytest.raises(StorageError, match=r"Cannot write at .*: Access Denied"):
        patiently("The upload", write)


def test_a_process_of_several_computes_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    results = map_shards(tensorflow_threads, shards(2), engine=PROCESSES, title="Asking", total=4)
    assert [threads for _, threads in results] == ["1", "1"]
    assert "TF_NUM_INTRAOP_THREADS" not in os.environ


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    assert list(watched([], "Images converted")) == []
    assert terminal.getvalue() == "", "nothing of no images"
    assert list(watched(range(30), "Images copied")) == list(range(30))
    assert re.search(r"Images copied: 100%.* 30/30 \[", terminal.getvalue())
    monkeypatch.setattr(sys, "stderr", file := io.StringIO())
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        assert list(watched("ab", "Images copied")) == ["a", "b"]
    assert re.match(r"Images copied: 1 of 2 images, [\d,]+ per second, 00:00 left", caplog.messages[0])
    assert file.getvalue() == ""


def test_progress_says_how_many_how_fast_and_how_long() -> None:
    progress = Progress("Scoring", 3000)
    progress.add(1000)
    assert progress.line(20.0) == "Scoring: 1,000 of 3,000 images, 50 per second, 00:40 left"
    assert progress.line(17_500.0) == "Scoring: 1,000 of 3,000 images, 0 per second, 9:43:20 left"
