"""What engines have in common: shards, what came of them, whose turn it is, and errors that pass by themselves."""

from __future__ import annotations

import logging
import math
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

from cv_platform.errors import (
    BundleExistsError,
    BundleNotFoundError,
    CorruptBundleError,
    CvPlatformError,
    DatabaseUnavailableError,
    LockHeldError,
    ServiceError,
    StorageError,
)
from cv_platform.settings import prepare_worker

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Processes that a shard may kill before it is given up."""
AHEAD = 3
"""Shards for each worker that are given out, or wait for their turn."""
TASK_BYTES = 2**30
"""Memory of a process that works on shards by a network: with TensorFlow it takes 0.8 GB."""
DECODING_BYTES = 2**28
"""Memory of one that decodes images, and loads no network: a photograph takes 0.1 GB."""
MOST_LOST = 10
"""Images that may each kill their process: of more, the machine is to blame, and none of them is given up for it."""
_PASSING = (StorageError, DatabaseUnavailableError, LockHeldError, ServiceError, ConnectionError, TimeoutError)
_LASTING = (BundleExistsError, BundleNotFoundError, CorruptBundleError)
"""Of these, what no waiting mends."""
_LASTING_CAUSES = (PermissionError, ValueError, KeyError, TypeError)
"""Nor where one of these lies behind it: rights that are missing, or something unreadable that is there."""
_TRIAL_SECONDS = 0.5
"""Of work after which this process knows how long the rest takes it."""
_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Before work is tried again whose storage is away: a minute together."""


class Shard(Protocol):
    """A part of the work: small, and such that pickle takes it."""

    @property
    def name(self) -> str:
        """Returns how the log and errors call it."""
        ...

    @property
    def images(self) -> int:
        """Returns how many images it has, for the progress."""
        ...


def span(first: str, last: str) -> str:
    """Returns the name of a shard of several things: the first and the last, or the one that it has."""
    return first if first == last else f"{first} to {last}"


S = TypeVar("S", bound=Shard)
R = TypeVar("R")
P = ParamSpec("P")


@dataclass(frozen=True)
class Outcome(Generic[S, R]):
    """What came of a shard: a result, or why there is none although it was tried several times."""

    shard: S
    result: Any
    failure: str | None = None


@dataclass(frozen=True)
class Salvage(Generic[S, R]):
    """How the rest of a shard is saved of which one image kills the process.

    Attributes:
        divide: returns a shard of each image; not asked where there is one.
        join: returns the shard's result from theirs, in order.
        lost: returns the result of an image that kills its process, given why; None: there is none, and the image is
            named in the error at the end.
        most_lost: images that may kill their process; at one more the work ends.
    """

    divide: Callable[[S], Iterable[S]]
    join: Callable[[list[R]], R]
    lost: Callable[[S, str], R] | None
    most_lost: float = math.inf


class Engine(Protocol):
    """Who works on shards; see the package for how to add one."""

    @property
    def workers(self) -> int:
        """Returns how many shards it works on at a time."""
        ...

    @property
    def worth_seconds(self) -> float:
        """Returns how much work it is worth asking for: what is less, the process that has it does itself."""
        ...

    @property
    def notes(self) -> Path | None:
        """Returns where processes note what they work on themselves, see `tries`; None: nowhere."""
        ...

    def ask(self, question: Callable[[], R]) -> dict[str, R]:
        """Returns what each machine that works on shards answers, by its name; nothing where it is this one alone.

        Raises:
            ComputeError: one cannot be asked.
        """
        ...

    def run(self, function: Callable[[S], R], shards: Iterable[S], *, in_order: bool) -> Iterator[Outcome[S, R]]:
        """Yields what came of each shard, a shard that kills its process included.

        Args:
            function: see `map_shards`.
            shards: taken as the work goes on.
            in_order: in the order of `shards`; else as they come.

        Raises:
            Exception: what `function` raises.
        """
        ...


class Turns(Generic[S, R]):
    """Gives shards out, never too far ahead of who takes the outcomes, and keeps outcomes until their turn."""

    def __init__(self, shards: Iterable[S], *, ahead: int, in_order: bool) -> None:
        self._shards = iter(shards)
        self._ahead, self._in_order = ahead, in_order
        self._issued = self._given = 0
        self._settled: dict[int, Outcome[S, R]] = {}

    def take(self) -> tuple[int, S] | None:
        """Returns the next shard with its number; None: there is none, or too many wait."""
        if self._issued - self._given >= self._ahead:
            return None
        for shard in self._shards:
            self._issued += 1
            return self._issued - 1, shard
        return None

    def settle(self, number: int, outcome: Outcome[S, R]) -> None:
        """Takes what came of a shard."""
        self._settled[number] = outcome

    def give(self) -> Iterator[Outcome[S, R]]:
        """Yields the outcomes whose turn it is."""
        while self._settled:
            number = self._given if self._in_order else next(iter(self._settled))
            if number not in self._settled:
                return
            self._given += 1
            yield self._settled.pop(number)


def alone(
    function: Callable[[S], R], shards: Iterable[S], *, worth_seconds: float, total: int
) -> Iterator[tuple[S, R]]:
    """Works on shards in this process until there is nothing left, or as much as others are worth their start.

    An error has a note with the shard and this machine, as from `answer`.
    """
    done, seconds = 0, 0.0
    for shard in shards:
        started = time.perf_counter()
        try:
            result = call(function, shard)
        except Exception as err:
            err.add_note(f"Of {shard.name}, in this process on {socket.gethostname()}")
            raise
        seconds += time.perf_counter() - started
        done += shard.images
        yield shard, result
        left = (total - done) * seconds / max(done, 1)
        if seconds >= _TRIAL_SECONDS and left >= worth_seconds:
            return


def use_one_thread() -> None:
    """Lets a process that works on shards compute by one thread: the other cores are the other processes'."""
    prepare_worker()  # Before TensorFlow computes.
    if opencv := sys.modules.get("cv2"):
        opencv.setNumThreads(1)


def answer(function: Callable[[S], R], shard: S) -> tuple[Exception | None, R | None]:
    """Works on a shard for another process, and returns `(error, result)`, of which one is None.

    The error has a note with the shard and this machine; with the traceback, too, if it is none of the platform's own.
    """
    try:
        return None, call(function, shard)
    except Exception as err:
        where = "" if isinstance(err, CvPlatformError) else f":\n{traceback.format_exc()}"
        err.add_note(f"Of {shard.name}, in a process of its own on {socket.gethostname()}{where}")
        return err, None


def call(function: Callable[[S], R], shard: S) -> R:
    """Calls `function` on a shard, patiently."""
    return patiently(shard.name, function, shard)


def patiently(what: str, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Returns what `work` returns, which is tried again where storage or a server is away, for up to a minute.

    Args:
        what: for the log.
        work: has to bear being called twice.
        *args, **kwargs: of `work`.
    """
    for wait in _WAITS_SECONDS:
        try:
            return work(*args, **kwargs)
        except _PASSING as err:
            if isinstance(err, _LASTING) or isinstance(err.__cause__, _LASTING_CAUSES):
                raise
            logger.warning("%s is tried again in %.0f s: %s", what, wait, err)
            time.sleep(wait)
    return work(*args, **kwargs)
