"""How much memory there is, and giving it back: what models and large uploads have used is not kept for the next ones.

The calls that give it back are glibc's; with another C library they do nothing.
https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Sequence
from pathlib import Path

LARGE_BLOCK_BYTES = 4 * 2**20
"""A decoded image of 1.4 megapixels. Smaller blocks come from the heap, which is faster, and stay in it."""
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of cgroups v2 and v1, as a container sees them."""
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def available_memory_bytes(cgroup_limits: Sequence[Path] = _CGROUP_LIMITS) -> int:
    """Returns how much memory this process may use: the machine's, or what its container may use if that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in cgroup_limits:
        # No such file outside of Linux or in another version of cgroups; "max" where there is no limit.
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text(encoding="ascii")))
    return min(limits)


def return_large_blocks() -> None:
    """Makes this process give every block of `LARGE_BLOCK_BYTES` back as soon as it is freed.

    glibc begins so, but after each such block it takes larger ones from the heap, up to 32 MiB, where smaller ones that
    live on hold their pages: a worker grew by 40 MiB over 20,000 hostile uploads, and by 4 MiB with this.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, LARGE_BLOCK_BYTES)


def release_memory() -> None:
    """Gives back what is unused now, as after a model that another has replaced."""
    # Its graph may hold reference cycles, which would wait for a full collection.
    gc.collect()
    # glibc keeps the pages between those of two models.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
