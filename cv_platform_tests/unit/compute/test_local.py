from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from cv_platform.compute import engine as engines
from cv_platform.compute import map_shards, progress
from cv_platform.compute.engine import AHEAD, Salvage
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

from .tasks import Numbers, doubled, process_id, shards, tensorflow_threads

PROCESSES = LocalEngine(2, worth_seconds=0)


def test_a_shard_that_kills_its_process_is_named_and_the_rest_is_done(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    work = map_shards(doubled, shards(4), engine=PROCESSES, title="Doubling", total=8)
    with pytest.raises(ShardError, match=r"numbers from 6 \(has ended 3 processes, the last of which .*SIGKILL\)"):
        done.extend(value for _, result in work for value in result)
    assert done == [0, 2, 4, 6, 8, 10]
    assert "A process that worked on numbers from 6 was ended by SIGKILL (1 of 3)" in caplog.messages


def test_the_rest_of_such_a_shard_can_be_saved_in_its_place() -> None:
    salvage: Salvage[Numbers, list[int]] = Salvage(
        divide=lambda shard: [Numbers((value,)) for value in shard.values],
        join=lambda parts: [value for part in parts for value in part],
        lost=lambda shard, why: [-1],
    )
    done = map_shards(doubled, shards(4), engine=PROCESSES, title="Doubling", total=8, salvage=salvage)
    assert [result for _, result in done] == [[0, 2], [4, 6], [8, 10], [12, -1]]


def test_an_error_of_the_function_ends_the_work_as_it_is() -> None:
    with pytest.raises(InvalidDatasetError, match="Expected no 9"):
        list(map_shards(doubled, [Numbers((9,))], engine=PROCESSES, title="Doubling", total=1))


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
    assert re.match(r"Images copied: 1 of 2 images, [\d,]+ per second, 0 s left", caplog.messages[0])
    assert file.getvalue() == ""


def test_progress_says_how_many_how_fast_and_how_long() -> None:
    progress = Progress("Scoring", 3000)
    progress.add(1000)
    assert progress.line(20.0) == "Scoring: 1,000 of 3,000 images, 50 per second, 40 s left"
