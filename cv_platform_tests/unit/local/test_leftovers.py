"""Leftovers of killed programs are found by their mark, whatever their session, and nothing else is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cv_platform.local.leftovers import end_leftovers, leftover_pids, marked, program_mark
from cv_platform_tests.support.waiting import wait_until

# Starts a child in a session of its own, as BentoML does with its workers, prints its pid, and sleeps.
PARENT = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'], start_new_session=True)\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(120)\n"
)


def test_children_of_a_killed_program_are_ended_and_others_stay(tmp_path: Path) -> None:
    mark, other = program_mark(tmp_path, "service"), program_mark(tmp_path, "mlflow")
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], env=marked(os.environ, other))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], env=marked(os.environ, mark), stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_until(lambda: leftover_pids(mark) == [child])  # Its environment is there soon after its id.
        assert end_leftovers(mark) == 1
        assert leftover_pids(mark) == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        if parent.stdout is not None:
            parent.stdout.close()


def test_the_wrapper_ends_its_predecessors_children_and_becomes_the_program(tmp_path: Path) -> None:
    mark = program_mark(tmp_path, "service")
    leftover = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], env=marked(os.environ, mark))
    wrapper = subprocess.Popen(
        [
            *(sys.executable, "-m", "cv_platform.local.run_program", str(tmp_path), "service", "end"),
            *(sys.executable, "-c", "import os; print(os.getpid(), os.environ['CV_PLATFORM_PROGRAM'])"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = wrapper.communicate(timeout=60)
    assert output.split(maxsplit=1) == [str(wrapper.pid), f"{mark}\n"]
    # On a busy machine, patience may end before it does.
    assert leftover.wait(timeout=10) in (-signal.SIGTERM, -signal.SIGKILL)


def test_dagsters_runs_outlive_a_restart(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(120)"],
        env=marked(os.environ, program_mark(tmp_path, "dagster")),
    )
    try:
        subprocess.run(
            [sys.executable, "-m", "cv_platform.local.run_program", str(tmp_path), "dagster", "keep", "true"],
            check=True,
            timeout=60,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(timeout=0.2)
    finally:
        run.kill()
        run.wait()
