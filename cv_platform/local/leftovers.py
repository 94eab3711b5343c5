"""Ends what a killed program has left behind: its children, which keep its port and would make every restart fail.

supervisord knows only the process that it started; BentoML's and MLflow's workers live in sessions of their own and
outlast a SIGKILL of it. Every supervised program carries a mark in its environment, which its children inherit, so they
are found whatever their session or parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

MARK = "CV_PLATFORM_PROGRAM"
GRACE_SECONDS = 5.0


def program_mark(home: Path, name: str) -> str:
    """Returns the mark of a program of the installation at `home`."""
    return f"{home}:{name}"


def leftover_pids(mark: str) -> list[int]:
    """Lists this user's processes that carry `mark`, without the calling one."""
    wanted = f"{MARK}={mark}"
    proc = Path("/proc")
    if (proc / "self" / "environ").exists():
        found = [int(p.name) for p in proc.iterdir() if p.name.isdigit() and wanted in _environment(p)]
    else:  # macOS: `ps` shows the environment after the command.
        listing = subprocess.run(["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=False)
        lines = (line.split(maxsplit=1) for line in listing.stdout.splitlines())
        found = [int(line[0]) for line in lines if len(line) == 2 and wanted in line[1].split()]
    return [pid for pid in found if pid != os.getpid()]


def end_leftovers(mark: str) -> int:
    """Ends the processes that carry `mark`, by SIGTERM, then by SIGKILL; returns how many there were."""
    pids = leftover_pids(mark)
    for pid in pids:
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while leftover_pids(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in leftover_pids(mark):
        _signal(pid, signal.SIGKILL)
    return len(pids)


def marked(environment: Mapping[str, str], mark: str) -> dict[str, str]:
    """Returns an environment that carries `mark`."""
    return {**environment, MARK: mark}


def _environment(process: Path) -> list[str]:
    try:
        return (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # Another user's, or gone meanwhile.
        return []


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
