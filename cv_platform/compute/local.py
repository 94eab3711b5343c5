"""The engine `local`: processes of this machine, as many as cores and memory allow that this process may use.

Each has a pipe of its own, so that the shard is known that a process dies of, and no lock is left by one that does.
Threads would not do: decoding small images holds Python's lock for most of its time. A work that is not worth the start
of processes is done by this one. https://docs.python.org/3/library/multiprocessing.html
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any, Self

from cv_platform.compute.carried import files_in_place
from cv_platform.compute.engine import AHEAD, ATTEMPTS, TASK_BYTES, Outcome, R, S, Turns
from cv_platform.cores import available_cores, free_memory_bytes
from cv_platform.errors import ComputeError

logger = logging.getLogger(__name__)

WORTH_SECONDS = 4.0
"""Work for this process alone from which on others are started; one costs it about half a second to start."""
_START = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from cv_platform.compute.worker import serve
serve(connection, parent=int(sys.argv[2]))
"""
"""A program of its own: one that multiprocessing starts would load again what this one was started by, Dagster say."""


class LocalEngine:
    """Works on shards in processes of this machine.

    Args:
        workers: how many; None: as many as there are cores that this process may use, with memory for each.
        worth_seconds: work that this process would do in less is done by it; 0: none is, as where a shard may kill it.
        notes: see `Engine.notes`.
    """

    def __init__(
        self, workers: int | None = None, *, worth_seconds: float | None = None, notes: Path | None = None
    ) -> None:
        self.notes = notes
        self._asked = workers, WORTH_SECONDS if worth_seconds is None else worth_seconds
        self._fit(TASK_BYTES)

    def with_memory(self, task_bytes: int) -> Self:
        """Returns one whose processes take so much memory each."""
        fitted = copy.copy(self)
        fitted._fit(task_bytes)
        return fitted

    def _fit(self, task_bytes: int) -> None:
        workers, worth_seconds = self._asked
        self.workers = _fitting(task_bytes) if workers is None else workers
        self.worth_seconds = math.inf if worth_seconds > 0 and self.workers == 1 else worth_seconds

    def ask(self, question: Callable[[], R]) -> dict[str, R]:
        """See `Engine.ask`: all processes are of this machine."""
        return {}

    def run(self, function: Callable[[S], R], shards: Iterable[S], *, in_order: bool) -> Iterator[Outcome[S, R]]:
        """See `Engine.run`."""
        turns: Turns[S, R] = Turns(shards, ahead=AHEAD * self.workers, in_order=in_order)
        yield from _Crew(function, turns, self.workers).outcomes()


def _fitting(task_bytes: int) -> int:
    """Returns how many processes this machine bears besides what runs on it, at least one."""
    cores, free = available_cores(), free_memory_bytes()
    if free is None or free >= cores * task_bytes:
        return cores
    logger.info("%d MB of memory are free, of %d for each of %d processes", free // 10**6, task_bytes // 10**6, cores)
    return max(1, free // task_bytes)


@dataclass
class _Task:
    number: int
    shard: Any
    attempts: int = 0


class _Worker:
    """A process, the pipe to it, and what it works on: `None` while it starts, and while it waits."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.connection, theirs = Pipe()
        with theirs:  # Closed here, so that the end of the process is the end of the pipe.
            arguments = [sys.executable, "-c", _START, str(theirs.fileno()), str(os.getpid())]
            self.process = Popen(arguments, pass_fds=[theirs.fileno()], stdin=DEVNULL)
        self.is_ready = False
        self.task: _Task | None = None
        # What is suppressed is seen when it is waited for.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError), files_in_place():
            self.connection.send(sys.path)
            self.connection.send(function)

    def death(self) -> str:
        """Returns how the process has ended, after waiting for it."""
        code = self.process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def end(self) -> None:
        self.connection.close()
        self.process.kill()  # It may be at work on what nobody wants any more; that is not published.
        self.process.wait()


class _Crew:
    def __init__(self, function: Callable[[S], R], turns: Turns[S, R], workers: int) -> None:
        self._function, self._turns, self._count = function, turns, workers
        self._again: deque[_Task] = deque()
        self._workers: list[_Worker] = []

    def outcomes(self) -> Iterator[Outcome[Any, Any]]:
        try:
            while self._give_out():
                waited_for = {one.connection: one for one in self._workers if one.task or not one.is_ready}
                for connection in wait(list(waited_for)):
                    self._hear(waited_for[connection])  # pyright: ignore[reportArgumentType]
                yield from self._turns.give()
        finally:
            for worker in self._workers:
                worker.end()

    def _give_out(self) -> bool:
        """Gives each free process a shard, starts others while shards wait; returns whether any is at work."""
        free = [one for one in self._workers if one.is_ready and one.task is None]
        starting = sum(not one.is_ready for one in self._workers)
        idle = self._count - len(self._workers) + len(free) + starting
        while len(self._again) < idle and (taken := self._turns.take()) is not None:
            self._again.append(_Task(*taken))
        while free and self._again:
            self._send(free.pop(), self._again.popleft())
        for _ in range(min(len(self._again) - starting, self._count - len(self._workers))):
            self._workers.append(_Worker(self._function))
        return bool(self._again) or any(one.task for one in self._workers)

    def _send(self, worker: _Worker, task: _Task) -> None:
        worker.task = task
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # Seen when it is waited for.
            worker.connection.send(task.shard)

    def _hear(self, worker: _Worker) -> None:
        """Takes what a process has said, or its end."""
        try:
            error, result = worker.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            self._bury(worker)
            return
        if error is not None:
            raise error
        if not worker.is_ready:
            worker.is_ready = True
        elif (task := worker.task) is not None:
            worker.task = None
            self._turns.settle(task.number, Outcome(task.shard, result))

    def _bury(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        death, task = worker.death(), worker.task
        worker.end()
        if not worker.is_ready:
            raise ComputeError(
                f"Expected processes to work on shards. Received: one that {death} while it started. Look at "
                "what it has said, and at the memory of the machine."
            )
        if task is None:
            return
        task.attempts += 1
        logger.warning("A process that worked on %s %s (%d of %d)", task.shard.name, death, task.attempts, ATTEMPTS)
        if task.attempts < ATTEMPTS:
            self._again.appendleft(task)
        else:
            failure = f"has ended {ATTEMPTS} processes, the last of which {death}"
            self._turns.settle(task.number, Outcome(task.shard, None, failure))
