"""The service without its request log, for `bench_serving` alone: the product has no such switch.

What a request costs here is everything but making its entry durable and bringing it to PostgreSQL.
"""

from __future__ import annotations

from concurrent.futures import Future

from cv_platform.serving.log.request_log import BegunEntry, FeedbackEntry, LogEntry
from cv_platform.serving.worker import ServingContext

_DONE: Future[None] = Future()
_DONE.set_result(None)


async def _append_nothing(self: ServingContext, entry: LogEntry | FeedbackEntry) -> None:
    del self, entry


def _begin_nothing(self: ServingContext, entry: LogEntry, *, more_follow: bool) -> BegunEntry:
    del self, entry, more_follow
    return BegunEntry(_DONE, lambda message, seconds: None)


ServingContext.append = _append_nothing
ServingContext.begin_entry = _begin_nothing

from bentos.image_classifier.service import ImageClassifier  # noqa: E402  Its context must be made of the changed class.

__all__ = ["ImageClassifier"]
