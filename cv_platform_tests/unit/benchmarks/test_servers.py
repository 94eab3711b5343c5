from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.servers import (
    process_memory_bytes,
    process_tree,
    process_tree_cpu_seconds,
    process_tree_memory_bytes,
)

BUSY = "import time\nwhile time.process_time() < 0.3: pass\n"
TREE = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {BUSY!r}])
ended = subprocess.Popen([sys.executable, "-c", {BUSY + "print(flush=True); input()"!r}], stdout=subprocess.PIPE)
ended.stdout.readline()
print(flush=True)
input()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has waited for a busy child, and has another one that was busy and lives."""
    with subprocess.Popen([sys.executable, "-c", TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        for member in reversed(process_tree(process.pid)):
            member.kill()


def test_the_tree_begins_with_its_root(server: subprocess.Popen[bytes]) -> None:
    root, child = process_tree(server.pid)
    assert root.pid == server.pid
    assert child.ppid() == server.pid


def test_cpu_time_adds_up_over_the_tree_and_its_ended_children(server: subprocess.Popen[bytes]) -> None:
    root, child = process_tree(server.pid)
    assert root.cpu_times().user < 0.25
    assert process_tree_cpu_seconds(child.pid) > 0.25  # The kernel counts in hundredths.
    assert process_tree_cpu_seconds(root.pid) > 0.5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's share of shared pages")
def test_memory_adds_up_over_the_tree(server: subprocess.Popen[bytes]) -> None:
    parts = [process_memory_bytes(member.pid) or 0 for member in process_tree(server.pid)]
    assert min(parts) > 1_000_000
    assert process_tree_memory_bytes(server.pid) == pytest.approx(sum(parts), rel=0.2)  # Others share the pages.


def test_tells_nothing_about_a_process_that_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    assert process_tree(gone.pid) == []
    assert process_tree_cpu_seconds(gone.pid) == 0.0
    assert process_memory_bytes(gone.pid) is None
    assert process_tree_memory_bytes(gone.pid) is None
