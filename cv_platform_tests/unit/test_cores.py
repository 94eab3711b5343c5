from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from cv_platform.compute import engine as engines
from cv_platform.compute import local, map_shards
from cv_platform.compute.blas import one_blas_thread
from cv_platform.compute.engine import DECODING_BYTES, TASK_BYTES
from cv_platform.compute.local import LocalEngine
from cv_platform.cores import available_cores, free_memory_bytes
from cv_platform_tests.unit.compute.tasks import process_id, shards


@pytest.mark.parametrize(("text", "cores"), [("100000 100000", 1), ("150000 100000", 1), ("50000 100000", 1)])
def test_a_containers_quota_counts_as_its_cores(tmp_path: Path, text: str, cores: int):
    limit = tmp_path / "cpu.max"
    limit.write_text(text)
    assert available_cores(limit) == cores


@pytest.mark.parametrize("text", [None, "max 100000", "", "nonsense", "100000 0"])
def test_without_a_quota_all_cores_of_the_process_count(tmp_path: Path, text: str | None):
    limit = tmp_path / "cpu.max"
    if text is not None:
        limit.write_text(text)
    assert available_cores(limit) == available_cores(tmp_path / "missing") >= 1


MEMORY = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    8000 kB\n"


@pytest.mark.parametrize(
    ("files", "kilobytes"),
    [
        ({}, 8000),
        ({"memory.max": "max", "memory.current": "1024"}, 8000),
        ({"memory.max": f"{6000 * 1024}", "memory.current": f"{5000 * 1024}"}, 1000 + 300 + 200),
        ({"memory.max": f"{1000 * 1024}", "memory.current": f"{2000 * 1024}"}, 0),
        ({"memory/memory.limit_in_bytes": f"{6000 * 1024}", "memory/memory.usage_in_bytes": f"{2000 * 1024}"}, 4007),
        ({"memory/memory.limit_in_bytes": f"{2**63 - 4096}", "memory/memory.usage_in_bytes": "0"}, 8000),
    ],
)
def test_free_memory_is_the_machines_or_what_the_containers_limit_leaves(
    tmp_path: Path, files: dict[str, str], kilobytes: int
) -> None:
    (tmp_path / "meminfo").write_text(MEMORY)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory.stat").write_text(f"anon 9\ninactive_file {300 * 1024}\nactive_file {200 * 1024}\n")
    (tmp_path / "memory/memory.stat").write_text("inactive_file 1\ntotal_inactive_file 7168\ntotal_active_file 0\n")
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert free_memory_bytes(tmp_path / "meminfo", tmp_path) == kilobytes * 1024


def test_without_a_word_of_the_system_nothing_is_known_of_memory(tmp_path: Path) -> None:
    assert free_memory_bytes(tmp_path / "meminfo", tmp_path) is None


@pytest.mark.parametrize(("free", "workers"), [(None, 4), (0, 1), (2**30 - 1, 1), (3 * 2**30, 3), (2**40, 4)])
def test_there_are_as_many_processes_as_cores_and_memory_allow(
    free: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "available_cores", lambda: 4)
    monkeypatch.setattr(local, "free_memory_bytes", lambda: free)
    assert LocalEngine().workers == workers
    assert LocalEngine(7).workers == 7


def test_what_loads_no_network_gets_more_processes_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "available_cores", lambda: 4)
    monkeypatch.setattr(local, "free_memory_bytes", lambda: 3 * DECODING_BYTES)
    engine = LocalEngine()
    assert (engine.workers, engine.worth_seconds) == (1, math.inf)
    lighter = engine.with_memory(DECODING_BYTES)
    assert (lighter.workers, lighter.worth_seconds) == (3, local.WORTH_SECONDS)
    assert LocalEngine(7).with_memory(DECODING_BYTES).workers == 7
    monkeypatch.setattr(engines, "_TRIAL_SECONDS", 0.0)
    for task_bytes, apart in ((TASK_BYTES, False), (DECODING_BYTES, True)):
        made = map_shards(process_id, shards(3), engine=None, title="Counting", total=10**9, task_bytes=task_bytes)
        assert any(process != os.getpid() for _, process in made) == apart


def test_products_of_matrices_stay_in_one_thread_for_a_while() -> None:
    def most_threads() -> int:
        return max(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")

    with threadpool_limits(2, user_api="blas"):
        assert most_threads() == 2
        assert one_blas_thread()(most_threads)() == 1
        assert most_threads() == 2
