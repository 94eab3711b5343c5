"""Makes pieces on all cores that this process may use, in processes of their own where that is worth their start.

Threads would not do: decoding small images holds Python's lock for most of its time.
https://docs.python.org/3/library/concurrent.futures.html#processpoolexecutor
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

import cv2

from cv_platform.cores import available_cores
from cv_platform.datasets.shards.pixels import Piece, make_piece

logger = logging.getLogger(__name__)

WORTH_SECONDS = 4.0
"""Work for this process alone from which on others are started; one costs it about half a second to start."""
_TRIAL_SECONDS = 0.5
_AHEAD = 3
"""Pieces for each process that wait for it or for their turn."""


def make_pieces(pieces: Sequence[Piece], *, workers: int | None = None) -> Iterator[tuple[Piece, list[bytes]]]:
    """Yields each piece with what `make_piece` returns, in order.

    Args:
        pieces: they may be made twice, by a process that dies and by this one.
        workers: how many processes; None: as many as there are cores.
    """
    workers = available_cores() if workers is None else workers
    done, seconds, left = 0, 0.0, sum(len(piece.paths) for piece in pieces)
    for at, piece in enumerate(pieces):
        is_worth = seconds >= _TRIAL_SECONDS and left * seconds / done >= WORTH_SECONDS
        if (is_worth or WORTH_SECONDS == 0) and workers > 1 and not multiprocessing.current_process().daemon:
            yield from _in_processes(pieces[at:], workers)
            return
        started = time.perf_counter()
        made = make_piece(piece)
        seconds += time.perf_counter() - started
        done, left = done + len(piece.paths), left - len(piece.paths)
        yield piece, made


def _in_processes(pieces: Sequence[Piece], workers: int) -> Iterator[tuple[Piece, list[bytes]]]:
    consumed = 0
    # Forked, they would inherit the locks of this process's threads as they happen to be.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(pieces)), context, initializer=_begin)
    try:
        waiting: deque[Future[list[bytes]]] = deque()
        for piece in pieces[: _AHEAD * workers]:
            waiting.append(pool.submit(make_piece, piece))
        while waiting:
            made = waiting.popleft().result()
            if (following := consumed + _AHEAD * workers) < len(pieces):
                waiting.append(pool.submit(make_piece, pieces[following]))
            consumed += 1
            yield pieces[consumed - 1], made
    except BrokenProcessPool as err:  # Killed for want of memory, or started from a script without `__main__` guard.
        logger.warning("The processes that decode have ended (%s); this one goes on alone", err)
        for piece in pieces[consumed:]:
            yield piece, make_piece(piece)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Prepares a process: one thread for OpenCV, and an end with the process that started it, however that ends."""
    cv2.setNumThreads(1)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
