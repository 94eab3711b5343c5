"""The service without its request log, for `bench_serving` alone: the product has no such switch.

What a request costs here is everything but making its entry durable and bringing it to PostgreSQL.
"""

from __future__ import annotations

from concurrent.futures import Future

from cv_platform.serving.log.entry import FeedbackEntry, LogEntry
from cv_platform.serving.log.spool import BegunEntry
from cv_platform.serving.log.worker_log import WorkerLog

_DONE: Future[None] = Future()
_DONE.set_result(None)


async def _append_nothing(self: WorkerLog, entry: LogEntry | FeedbackEntry) -> None:
    del self, entry


def _begin_nothing(self: WorkerLog, entry: LogEntry, *, more_follow: bool) -> BegunEntry:
    del self, entry, more_follow
    return BegunEntry(_DONE, lambda message, seconds: None)


WorkerLog.append = _append_nothing
WorkerLog.begin_entry = _begin_nothing

from bentos.image_classifier.service import ImageClassifier  # noqa: E402  Its log must be made of the changed class.

__all__ = ["ImageClassifier"]
