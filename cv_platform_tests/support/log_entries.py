"""Entries of the request log, as the service makes them."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

import numpy as np

from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.entry import FeedbackEntry, LogEntry
from cv_platform.serving.log.request_log import RequestLog
from cv_platform.serving.log.spool import Spool
from cv_platform_tests.support.waiting import WAIT_SECONDS, wait_until


def answered(**changes: object) -> LogEntry:
    """Returns the entry of an answered prediction."""
    entry = LogEntry(
        request_method="POST",
        request_url="http://127.0.0.1:4242/predict",
        response_status_code=200,
        response_message="ok",
        timespan=0.25,
        created_on=datetime(2026, 1, 31, 6, tzinfo=UTC),
        model_name="digits",
        model_version="20260131T060000Z-1f3c9a2e",
        prediction_id=uuid4(),
        predicted_class="three",
        prediction_json={"three": 0.75, "four": 0.25},
        uae_feats=np.array([0.5, -1.5, 3.0], dtype=np.float32),
        bbsd_feats=np.array([0.75, 0.25], dtype=np.float32),
        features=np.array([1.0], dtype=np.float32),
        properties=np.arange(7, dtype=np.float32),
        raw_hm=np.array([[0.0, 0.5, 1.0], [0.25, 0.75, 0.125]], dtype=np.float32),
        image=b"an image",
        media_type="image/png",
    )
    return replace(entry, **changes)


def append_to(log: Spool | RequestLog, entry: LogEntry | FeedbackEntry) -> None:
    """Returns once the entry is durable."""
    spool = log.spool if isinstance(log, RequestLog) else log
    spool.submit(entry).result(WAIT_SECONDS)


def hold_writer(spool: Spool) -> threading.Event:
    """Returns once the writer of the spool hangs, until the event is set: what is queued meanwhile is another group."""
    begun, goes_on = threading.Event(), threading.Event()
    spool._writer.submit(lambda _: (begun.set(), goes_on.wait(WAIT_SECONDS)))
    assert begun.wait(WAIT_SECONDS)
    return goes_on


def wait_until_drained(log: Drainer | RequestLog) -> None:
    """Returns once the database has every entry."""
    wait_until(lambda: log.status().depth == 0)
