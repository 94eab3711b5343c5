"""How many cores and how much memory this process may use: what computes in threads or processes shares them out.

Standard library only, and for Python 3.9: the machine's own Python starts the stack in containers.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_FILES = (
    ("memory.max", "memory.current", "memory.stat", ""),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
)
"""Of cgroups v2 and v1, as a container sees them: limit, usage, what it is made of, and what its names begin with."""


def available_cores(cgroup_limit: Path = _CPU_LIMIT) -> int:
    """Returns how many cores this process may use: its affinity, and the quota of its container (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup_limit.read_text(encoding="ascii").split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return cores  # No such file outside of Linux, and "max" where there is no quota.
    return cores


def free_memory_bytes(information: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Returns the memory that is to be had without swapping, by the machine and by the limit of this container.

    Pages of files count as free in both, as the kernel gives them up. None where the system does not say.
    """
    free = list[int]()
    # No such files outside of Linux or in another version of cgroups; "max" where there is no limit.
    with contextlib.suppress(OSError, ValueError, KeyError):
        free.append(1024 * _amounts(information)["MemAvailable"])
    for limit, usage, stat, prefix in _MEMORY_FILES:
        with contextlib.suppress(OSError, ValueError, KeyError):
            most, used = (int((cgroup / name).read_text(encoding="ascii")) for name in (limit, usage))
            parts = _amounts(cgroup / stat)
            free.append(max(0, most - used + parts[f"{prefix}inactive_file"] + parts[f"{prefix}active_file"]))
    return min(free, default=None)


def _amounts(path: Path) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^(\w+):?\s+(\d+)", path.read_text("ascii"), re.MULTILINE)}
