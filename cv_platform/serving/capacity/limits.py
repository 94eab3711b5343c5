"""How much a worker takes on at once, and how large a request may be.

All of it is per worker; the reverse proxy in front has limits of its own.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Self

from cv_platform.cores import available_cores
from cv_platform.serving.machine import available_memory_bytes, share_cores
from cv_platform.serving.problem import Problem, try_later
from cv_platform.settings import Settings

FORM_OVERHEAD_BYTES = 16_384
"""What a multipart body may hold beside the file: boundaries, part headers, the field `explain`."""
SMALL_BODY_BYTES = 65_536
"""Largest body of every route that takes no file."""
BATCH_UPLOADS = 8
"""A batch's files together have at most as many bytes as so many largest uploads; it counts as so many, too."""
BATCH_PREDICTIONS = 2
"""A batch may take as long as so many of the slowest predictions."""
SHRINK_IMAGE = "Shrink or recompress the image."
"""What to do about an upload that is too large."""
PROMOTION_SECONDS = 100.0
"""Longest wait for a model to be fetched and load-tested."""
_WAITING_PER_THREAD = 16
_MEMORY_EIGHTHS = 5
_APPEND_ALLOWANCE_SECONDS = 30.0


@dataclass(frozen=True)
class ServingLimits:
    """What one worker allows itself.

    Attributes:
        max_in_flight: predictions running or waiting for a thread; beyond, 429.
        max_uploads: bodies being received; beyond, 429.
        max_small_bodies: requests with any other body in progress; beyond, 429.
        max_batch_files: images of one batch; beyond, 422.
        predict_threads: predictions that run at the same time.
        model_threads: threads of one model call; None leaves it to the framework.
        upload_seconds: longest time for receiving an upload; beyond, 408.
        small_body_seconds: longest time for receiving any other body; beyond, 408.
        predict_seconds: longest time for a prediction; beyond, 504.
        memory_bytes: of uploads and decoded images together, see `memory`; beyond, 429.
    """

    max_in_flight: int = 64
    max_uploads: int = 128
    max_small_bodies: int = 64
    max_batch_files: int = 32
    predict_threads: int = 2
    model_threads: int | None = 1
    upload_seconds: float = 30.0
    small_body_seconds: float = 10.0
    predict_seconds: float = 30.0
    memory_bytes: int = 2**30

    @classmethod
    def of(cls, settings: Settings, *, cores: int | None = None, memory_bytes: int | None = None) -> Self:
        """Returns the limits of each of the installation's workers.

        Without a setting of its own a worker computes its share of the cores at the same time, and takes on sixteen
        predictions for each of its threads beside one full batch; of the memory all workers' requests get five
        eighths, as the processes and their models need some themselves.

        Args:
            settings: of the installation.
            cores: of this machine; None asks it.
            memory_bytes: what this process may use; None asks the machine.
        """
        share = share_cores(
            cores or available_cores(), workers=settings.service_workers, predict_threads=settings.predict_threads
        )
        in_flight = settings.max_in_flight or (_WAITING_PER_THREAD * share.predict_threads + settings.max_batch_files)
        # A larger batch would never be admitted: it is refused for good, not with advice to come again.
        files = min(settings.max_batch_files, in_flight, settings.rate_limit_per_minute or in_flight)
        return cls(
            max_in_flight=in_flight,
            max_batch_files=files,
            predict_threads=share.predict_threads,
            model_threads=share.model_threads,
            predict_seconds=settings.predict_timeout_seconds,
            memory_bytes=settings.request_memory_bytes
            or (memory_bytes or available_memory_bytes()) * _MEMORY_EIGHTHS // (8 * settings.service_workers),
        )

    @property
    def longest_seconds(self) -> float:
        """Seconds after which no request of this worker is still to be answered by it."""
        predicting = self.upload_seconds + BATCH_PREDICTIONS * self.predict_seconds
        promoting = self.small_body_seconds + PROMOTION_SECONDS
        return max(predicting, promoting) + _APPEND_ALLOWANCE_SECONDS


class Gate:
    """Admits up to `limit` at a time; safe to use from any thread."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"Expected a limit of 1 or more. Received: {limit}.")
        self.limit = limit
        self._inside = 0
        self._lock = threading.Lock()

    @property
    def inside(self) -> int:
        """How many are in progress."""
        return self._inside

    @property
    def is_full(self) -> bool:
        """Whether the next one would be refused."""
        return self._inside >= self.limit

    def enter(self, places: int = 1) -> bool:
        """Takes places, all or none, or returns False when there are not so many; never waits."""
        with self._lock:
            if self._inside + places > self.limit:
                return False
            self._inside += places
            return True

    def leave(self, places: int = 1) -> None:
        """Gives places back; once for all that an `enter` which returned True has taken."""
        with self._lock:
            self._inside -= places


def too_large(limit: int, received: str, *, advice: str = SHRINK_IMAGE) -> Problem:
    """Returns the 413 of a body of more than `limit` bytes; the connection closes, as the rest stays unread."""
    return Problem(
        413,
        f"Expected at most {limit} bytes. Received: {received}. {advice}",
        expected=f"a body of at most {limit} bytes",
        headers={"Connection": "close"},
        extra={"max_bytes": limit},
    )


def overloaded(what: str, limit: int) -> Problem:
    """Returns the 429 of a worker that has `limit` of `what` in progress."""
    return try_later(
        429,
        f"This worker is busy with {limit} {what}. Try again.",
        expected=f"fewer than {limit} {what} at a time",
        seconds=1,
    )
