"""How many threads a worker gets, so that all workers together fill this machine's cores and no more.

Three numbers multiply: workers, predictions that run at the same time in each, threads of one model call. More threads
than cores make every prediction slower; fewer leave cores idle.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class ThreadShare:
    """Threads of one worker: `predict_threads` predictions at a time, each on `model_threads` threads."""

    predict_threads: int
    model_threads: int


def available_cores(cgroup_limit: Path = _CGROUP_LIMIT) -> int:
    """Returns how many cores this process may use: its affinity, and the quota of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup_limit.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return cores  # No such file outside of Linux, and "max" where there is no quota.
    return cores


def share_cores(cores: int, *, workers: int, predict_threads: int | None = None) -> ThreadShare:
    """Divides `cores` among `workers`, so that workers × predictions × threads of a model call is about `cores`.

    Args:
        cores: of the machine.
        workers: processes that share it.
        predict_threads: predictions at a time that somebody has chosen; None takes each worker's share of the cores.
    """
    predictions = predict_threads or max(1, cores // workers)
    return ThreadShare(predictions, max(1, cores // (workers * predictions)))
