"""How workers share the machine's cores, how much memory there is, and giving memory back.

Three numbers multiply: workers, predictions that run at the same time in each, threads of one model call. More threads
than cores make every prediction slower; fewer leave cores idle. What models and large uploads have used is not kept for
the next ones; the calls that give it back are glibc's, and do nothing with another C library.
https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LARGE_BLOCK_BYTES = 4 * 2**20
"""A decoded image of 1.4 megapixels. Smaller blocks come from the heap, which is faster, and stay in it."""
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of cgroups v2 and v1, as a container sees them."""
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class ThreadShare:
    """Threads of one worker: `predict_threads` predictions at a time, each on `model_threads` threads."""

    predict_threads: int
    model_threads: int


def share_cores(cores: int, *, workers: int, predict_threads: int | None = None) -> ThreadShare:
    """Divides `cores` among `workers`, so that workers × predictions × threads of a model call is about `cores`.

    Args:
        cores: of the machine.
        workers: processes that share it.
        predict_threads: predictions at a time that somebody has chosen; None takes each worker's share of the cores.
    """
    predictions = predict_threads or max(1, cores // workers)
    return ThreadShare(predictions, max(1, cores // (workers * predictions)))


def available_memory_bytes(cgroup_limits: Sequence[Path] = _MEMORY_LIMITS) -> int:
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


def bound_opencv(threads: int | None) -> None:
    """Makes OpenCV use so many threads for an image, those of a model call; None: every core, as it does by itself.

    Waking them costs more than they do to a photograph, and the cores have other predictions to make.
    """
    import cv2

    cv2.setNumThreads(-1 if threads is None else threads)


def release_memory() -> None:
    """Gives back what is unused now, as after a model that another has replaced."""
    # Its graph may hold reference cycles, which would wait for a full collection.
    gc.collect()
    # glibc keeps the pages between those of two models.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
