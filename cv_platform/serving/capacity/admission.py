"""Which predictions a worker takes on, and the threads that compute them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from cv_platform.serving.capacity.bounded_calls import run_admitted
from cv_platform.serving.capacity.limits import Gate, ServingLimits, overloaded
from cv_platform.serving.capacity.memory import RequestMemory
from cv_platform.serving.capacity.rate_limit import RateLimiter
from cv_platform.serving.capacity.worker_threads import WorkerThreads
from cv_platform.serving.problem import try_later
from cv_platform.serving.telemetry.observation import note_stage

logger = logging.getLogger(__name__)

HANGING_TIMEOUTS = 4
"""A prediction that takes so many times its longest time is taken for one that never ends."""
_T = TypeVar("_T")


class Admission:
    """Bounds what is under way in one worker; its threads run until `close`.

    Args:
        limits: what this worker allows itself.
        memory: of the uploads, and of the images that are decoded.
        rate: of each client's images; None sets them no limit.

    Attributes:
        uploads: bodies being received.
        small_bodies: requests with any other body.
        in_flight: predictions running or waiting for a thread.
    """

    def __init__(self, limits: ServingLimits, memory: RequestMemory, rate: RateLimiter | None) -> None:
        self.limits = limits
        self.memory = memory
        self.uploads = Gate(limits.max_uploads)
        self.small_bodies = Gate(limits.max_small_bodies)
        self.in_flight = Gate(limits.max_in_flight)
        self.threads = WorkerThreads(limits.predict_threads, "predict")
        self._rate = rate

    def close(self) -> None:
        """Finishes what is predicted, as long as anybody waits for it."""
        if not self.threads.close(self.limits.predict_seconds):
            logger.warning("Predictions that never ended are left behind")

    @property
    def has_waiting(self) -> bool:
        """Whether predictions wait for a thread: those that run now are then not the last."""
        return self.in_flight.inside > self.limits.predict_threads

    def admit(self, images: int = 1) -> None:
        """Takes a place for each image; `compute_admitted` gives one back, or `in_flight.leave` what was not used.

        Raises:
            Problem: 429 when too much is under way.
        """
        if not self.in_flight.enter(images):
            raise overloaded("predictions", self.in_flight.limit)

    def charge(self, client: bytes, images: int) -> None:
        """Counts a client's images against its limit per minute, where there is one.

        Raises:
            Problem: 429 when it has none left, with the time until it has.
        """
        if self._rate is None:
            return
        seconds = self._rate.take(client, images)
        if seconds is not None:
            limit = self._rate.images_per_minute
            raise try_later(
                429,
                f"More than {limit} images per minute. Send these again in {seconds} s.",
                expected=f"at most {limit} images per minute of each client",
                seconds=seconds,
            )

    async def compute(self, work: Callable[[], _T]) -> _T:
        """Runs `work` in one of the threads that predict, and returns what it returns.

        Everything that decodes an image goes through here, and takes its memory by `decoding`. Its place is held
        until its thread is free, even when the answer is a 504: abandoned work still costs.

        Raises:
            Problem: 429 when too much is under way, 504 when it takes too long, 503 while the service stops.
        """
        self.admit()
        return await self.compute_admitted(work)

    async def compute_admitted(self, work: Callable[[], _T]) -> _T:
        """Does as `compute`, for something that was admitted before; its place is given back whatever happens.

        Raises:
            Problem: 504 when it takes too long, 503 while the service stops.
        """
        submitted = time.perf_counter()

        def in_thread() -> _T:
            note_stage("wait", submitted)
            return work()

        seconds = self.limits.predict_seconds
        late = try_later(
            504,
            f"The answer was not ready after {seconds:g} s. Try again later.",
            expected=f"an answer within {seconds:g} s",
        )
        return await run_admitted(self.threads, self.in_flight, in_thread, seconds, late)

    def decoding(self, data: bytes) -> AbstractContextManager[None]:
        """Takes the memory that decoding an image needs, see `RequestMemory.decoding`."""
        return self.memory.decoding(data, seconds=self.limits.predict_seconds)

    def is_stuck(self) -> bool:
        """Says whether every thread that predicts is at work that its client was told 504 about."""
        return self.threads.are_stuck(self.limits.predict_seconds)

    def is_beyond_help(self) -> bool:
        """Says whether every thread that predicts hangs: nothing can end what it does but the end of the process."""
        return self.threads.are_stuck(HANGING_TIMEOUTS * self.limits.predict_seconds)
