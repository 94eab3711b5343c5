"""Threads whose work may never end: unlike an executor's, they hold up neither `close` nor the end of the process."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

_T = TypeVar("_T")
_Job = tuple[Future[Any], Callable[[], Any]]


class WorkerThreads:
    """Runs jobs in `count` daemon threads, in the order of their arrival; safe to use from any thread.

    Each runs in a copy of the context of whoever submits it, so that its log lines name the request.
    """

    def __init__(self, count: int, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._busy_since: list[float | None] = [None] * count
        self._is_closed = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, args=(index,), name=f"{name}-{index}", daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Queues `work` and returns its future.

        Raises:
            RuntimeError: the threads are closed.
        """
        done: Future[_T] = Future()
        with self._lock:
            if self._is_closed:
                raise RuntimeError("Expected running threads. Received: closed ones.")
            self._jobs.put((done, functools.partial(contextvars.copy_context().run, work)))
        return done

    def are_stuck(self, seconds: float) -> bool:
        """Says whether every thread has been at its present job for longer than `seconds`."""
        limit = time.monotonic() - seconds
        return all(since is not None and since < limit for since in self._busy_since)

    def close(self, seconds: float) -> bool:
        """Finishes what is queued, for at most `seconds`; returns whether all of it was, and cancels the rest."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                for _ in self._threads:
                    self._jobs.put(None)
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            return True
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        return False

    def _run(self, index: int) -> None:
        while (job := self._jobs.get()) is not None:
            done, work = job
            if not done.set_running_or_notify_cancel():
                continue
            self._busy_since[index] = time.monotonic()
            result, error = None, None
            try:
                result = work()
            # It belongs to whoever waits for the future.
            except BaseException as err:
                error = err
            # Free before anybody hears of it.
            self._busy_since[index] = None
            with contextlib.suppress(InvalidStateError):
                if error is not None:
                    done.set_exception(error)
                else:
                    done.set_result(result)
            del job, done, work, result, error
