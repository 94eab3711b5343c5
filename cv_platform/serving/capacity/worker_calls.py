"""The calls of one worker that may hang: each kind has threads of its own, so that it costs its own routes alone."""

from __future__ import annotations

from cv_platform.serving.capacity.bounded_calls import BoundedCalls
from cv_platform.serving.capacity.limits import PROMOTION_SECONDS

LOOK_UP_THREADS = 8
"""Predictions looked up or deleted at the same time. A database that hangs takes no more of them than its engine has
connections (four); the others go on finding what is in the spool."""
LOOK_UP_SECONDS = 8.0
"""Longest wait for one: a little longer than the database allows itself for a statement."""
STORAGE_THREADS = 4
STORAGE_SECONDS = 20.0
STATUS_SECONDS = 1.0
"""A health check waits no longer for the spool's disk, and shows the figures that it had last."""
PROMOTION_THREADS = 2
"""One moves the pointer, the other says that somebody does."""


class WorkerCalls:
    """The threads of these calls, until `close`.

    Attributes:
        look_ups: where predictions are looked up and deleted.
        storage_reads: where central storage is read for a page.
        status_reads: where the spool's file is asked how much waits.
        promotions: where another model is put into production.
    """

    def __init__(self) -> None:
        self.look_ups = BoundedCalls("look-ups", "the request log", threads=LOOK_UP_THREADS, seconds=LOOK_UP_SECONDS)
        self.storage_reads = BoundedCalls(
            "reads of storage", "central storage", threads=STORAGE_THREADS, seconds=STORAGE_SECONDS
        )
        self.status_reads = BoundedCalls("looks at the spool", "its disk", threads=1, places=1, seconds=STATUS_SECONDS)
        self.promotions = BoundedCalls(
            "updates",
            "fetching or testing the model (see /models/current)",
            threads=PROMOTION_THREADS,
            seconds=PROMOTION_SECONDS,
            may_succeed=True,
        )

    def close(self) -> None:
        """Finishes what is under way; what hangs is left behind."""
        for calls in (self.look_ups, self.storage_reads, self.status_reads, self.promotions):
            calls.close()
