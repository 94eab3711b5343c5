from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.servers import process_tree_cpu_seconds, process_tree_memory_bytes


def add_process(
    proc: Path, pid: int, parent: int, *, command: str, ticks: tuple[int, int, int, int], pss_kb: int
) -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    # proc_pid_stat(5): pid (comm) state ppid pgrp session tty tpgid flags minflt cminflt majflt cmajflt utime stime ...
    fields = " ".join(str(value) for value in (parent, 1, 1, 0, -1, 0, 0, 0, 0, 0, *ticks, 20, 0, 1, 0))
    (folder / "stat").write_text(f"{pid} ({command}) S {fields}\n")
    (folder / "smaps_rollup").write_text(f"00400000-ff 00:00 [rollup]\nRss: 999 kB\nPss: {pss_kb} kB\nPss_Anon: 5 kB\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """A server (10) with a worker (11), a grandchild (12) with an odd name, and a stranger (20)."""
    add_process(tmp_path, 10, 1, command="python", ticks=(100, 20, 3, 4), pss_kb=1000)
    add_process(tmp_path, 11, 10, command="worker", ticks=(200, 30, 0, 0), pss_kb=2000)
    add_process(tmp_path, 12, 11, command="odd) S 1 (name", ticks=(5, 5, 0, 0), pss_kb=30)
    add_process(tmp_path, 20, 1, command="stranger", ticks=(9999, 9999, 0, 0), pss_kb=9999)
    (tmp_path / "cpuinfo").write_text("model name : none\n")
    return tmp_path


def test_cpu_time_adds_up_over_the_tree_and_its_ended_children(proc: Path) -> None:
    # 100 + 20 + 3 + 4, 200 + 30, 5 + 5.
    assert process_tree_cpu_seconds(10, proc) == pytest.approx(367 / os.sysconf("SC_CLK_TCK"))


def test_memory_adds_up_over_the_tree(proc: Path) -> None:
    assert process_tree_memory_bytes(10, proc) == 3030 * 1024


def test_process_that_ends_meanwhile_is_left_out(proc: Path) -> None:
    (proc / "12" / "stat").unlink()
    assert process_tree_cpu_seconds(10, proc) == pytest.approx(357 / os.sysconf("SC_CLK_TCK"))


@pytest.mark.parametrize("measure", [process_tree_cpu_seconds, process_tree_memory_bytes])
def test_tells_nothing_about_an_unknown_process_or_without_proc(measure, proc: Path) -> None:
    assert measure(99, proc) is None
    assert measure(10, proc / "missing") is None
