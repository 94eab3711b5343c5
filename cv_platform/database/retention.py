"""Deletes what the request log has kept long enough: requests, predictions with their feedback, and uploads.

Everything goes in batches, each a transaction of its own, so that no lock is held for long and a stopped run leaves
nothing half done: the next one goes on. Three moments decide, all of them reported:

* the log's: requests and predictions before it are deleted, with all feedback on those predictions;
* the images': predictions before it give up their upload; an upload that no prediction has any more is deleted;
* the start of the earliest window that a monitor judges: neither of the other two comes after it.

Uploads are shared by content (sha256), so one that was sent again lives as long as its latest prediction. What still
waits in a spool is not touched; it goes when it has been drained and is too old. Drift reports stay: they have their
own small pictures, and name uploads that may have gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Engine, Table, delete, exists, func, select, text, true, update

from cv_platform.database.schema import api_log, deletions, feedback, images, predictions
from cv_platform.database.version_index import model_versions
from cv_platform.errors import DatabaseError

logger = logging.getLogger(__name__)

BATCH_ROWS = 1000
_LOCK_KEY = 0x63765F7265746169
"""Advisory lock of retention: the ASCII of `cv_retai`."""


class Retention(BaseModel):
    """What one run has deleted, or would delete.

    Attributes:
        is_dry_run: nothing was deleted; the counts are of what would be.
        log_before_utc: older requests, predictions and feedback go; None: none do.
        images_before_utc: older predictions give up their upload; None: none do.
        requests, predictions, feedback, images: rows deleted.
        image_bytes: size of the deleted uploads.
        released_uploads: predictions that stay without their upload.
        warnings: where a monitor's window keeps rows longer than the settings say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    is_dry_run: bool
    log_before_utc: datetime | None
    images_before_utc: datetime | None
    requests: int = 0
    predictions: int = 0
    feedback: int = 0
    images: int = 0
    image_bytes: int = 0
    released_uploads: int = 0
    warnings: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """Returns the numbers by name."""
        return {name: value for name, value in self.model_dump().items() if type(value) is int}

    def summary(self) -> str:
        """Returns what happened in a sentence or two."""
        if self.log_before_utc is None and self.images_before_utc is None:
            return "Nothing is deleted: CV_LOG_RETENTION_DAYS and CV_IMAGE_RETENTION_DAYS are 0."
        verb = "Would delete" if self.is_dry_run else "Deleted"
        before = " and ".join(
            f"{name} before {moment:%Y-%m-%d %H:%M} UTC"
            for name, moment in (("log rows", self.log_before_utc), ("uploads", self.images_before_utc))
            if moment is not None
        )
        return (
            f"{verb} {self.requests} requests, {self.predictions} predictions, {self.feedback} statements of feedback "
            f"and {self.images} uploads ({self.image_bytes / 1e6:.1f} MB): {before}. "
            f"{self.released_uploads} predictions stay without their upload."
        )


def delete_expired(
    engine: Engine,
    *,
    now: datetime,
    log_retention_days: int | None,
    image_retention_days: int | None,
    windows: Mapping[str, datetime],
    is_dry_run: bool = False,
    batch_rows: int = BATCH_ROWS,
) -> Retention:
    """Deletes what is older than its retention, and returns the counts.

    Args:
        engine: of the request log.
        now: with its zone.
        log_retention_days: of requests, predictions and feedback; None: for ever.
        image_retention_days: of uploads; None: as long as the log.
        windows: experiment → start of the window that its monitor judges now; nothing from the earliest on is touched.
        is_dry_run: only counts.
        batch_rows: most rows that one transaction deletes.

    Raises:
        DatabaseError: another run is under way.
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`; what was deleted before
            stays deleted.
    """
    protected = min(windows.values(), default=None)
    log_before, image_before = (
        None if days is None else _earlier(now - timedelta(days=days), protected)
        for days in (log_retention_days, image_retention_days)
    )
    # Without predictions no upload is of use, so the log's moment holds for uploads too where it is the later one.
    bounds = [moment for moment in (log_before, image_before) if moment is not None]
    result = Retention(
        is_dry_run=is_dry_run,
        log_before_utc=log_before,
        images_before_utc=max(bounds, default=None),
        warnings=_warnings(
            now, windows, {"CV_LOG_RETENTION_DAYS": log_retention_days, "CV_IMAGE_RETENTION_DAYS": image_retention_days}
        ),
    )
    for warning in result.warnings:
        logger.warning("%s", warning)
    if result.images_before_utc is None:
        return result
    with _only_one(engine):
        counts = _count(engine, result) if is_dry_run else _delete(engine, result, batch_rows)
    return result.model_copy(update=counts)


def _earlier(moment: datetime, protected: datetime | None) -> datetime:
    return moment if protected is None else min(moment, protected)


def _warnings(now: datetime, windows: Mapping[str, datetime], days_of: Mapping[str, int | None]) -> tuple[str, ...]:
    return tuple(
        f"{variable} is {days}, but the monitor of {name} judges requests since {start:%Y-%m-%d %H:%M} UTC: they are "
        f"kept until then. Raise {variable}, or shorten monitor.window_days, or the time from one "
        "report of monitor.schedule_cron to the next."
        for variable, days in days_of.items()
        if days is not None
        for name, start in sorted(windows.items())
        if start < now - timedelta(days=days)
    )


@contextmanager
def _only_one(engine: Engine) -> Iterator[None]:
    """Holds the advisory lock of retention on a connection of its own; it goes with the connection."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": _LOCK_KEY}).scalar_one():
            raise DatabaseError("Expected one retention run at a time. Received: a second. Wait for the first to end.")
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK_KEY})


def _delete(engine: Engine, limits: Retention, batch_rows: int) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(
        ("requests", "predictions", "feedback", "released_uploads", "images", "image_bytes"), 0
    )

    def repeat(step: Callable[[Connection], Mapping[str, int]]) -> None:
        while True:
            with engine.begin() as connection:
                found = step(connection)
            for name, count in found.items():
                counts[name] += count
            if not any(found.values()):
                return

    before = limits.log_before_utc
    if before is not None:
        for slice_ in _slices(engine, api_log, true(), before, batch_rows):
            with engine.begin() as connection:
                counts["requests"] += connection.execute(delete(api_log).where(slice_)).rowcount
        with engine.connect() as connection:
            versions = [tuple(row) for row in connection.execute(select(model_versions()))]
        for model_name, version in versions:
            key = (predictions.c.model_name == model_name) & (predictions.c.model_version == version)
            for slice_ in _slices(engine, predictions, key, before, batch_rows):
                with engine.begin() as connection:
                    for name, count in _delete_predictions(connection, slice_).items():
                        counts[name] += count
        repeat(lambda connection: _delete_feedback_of_none(connection, before, batch_rows))
        with engine.begin() as connection:  # What would still arrive of these is too old itself.
            connection.execute(delete(deletions).where(deletions.c.created_on < before))
    assert limits.images_before_utc is not None
    for slice_ in _slices(engine, images, true(), limits.images_before_utc, batch_rows):
        with engine.connect() as connection:
            batch = list(connection.execute(select(images.c.sha256).where(slice_)).scalars())
        repeat(lambda connection, batch=batch: _release(connection, batch, limits, batch_rows))
        with engine.begin() as connection:
            for name, count in _delete_images(connection, batch).items():
                counts[name] += count
    return counts


def _slices(engine: Engine, table: Table, key: Any, before: datetime, rows: int) -> Iterator[Any]:
    """Yields what holds for the next `rows` of a table by time, slice after slice, up to a moment.

    Each slice begins where the last one ended: a search for the oldest rows would walk over all that are deleted
    already, until PostgreSQL has cleaned up behind them.
    """
    moment, inside = table.c.created_on, table.c.created_on < before
    with engine.connect() as connection:
        start = connection.execute(select(func.min(moment)).where(key & inside)).scalar_one()
    while start is not None:
        following = select(moment).where(key & (moment >= start) & inside).order_by(moment).offset(rows).limit(1)
        with engine.connect() as connection:
            end = connection.execute(following).scalar_one_or_none()
        if end == start:  # More than these have one time.
            end = start + timedelta(microseconds=1)
        yield key & (moment >= start) & (inside if end is None else moment < end)
        start = end


def _delete_predictions(connection: Connection, slice_: Any) -> dict[str, int]:
    # Feedback first, as in `DELETE /predictions/{id}`: in another order the two could wait for each other.
    old = select(predictions.c.prediction_id).where(slice_)
    said = connection.execute(delete(feedback).where(feedback.c.prediction_id.in_(old))).rowcount
    gone = connection.execute(delete(predictions).where(slice_)).rowcount
    return {"feedback": said, "predictions": gone}


def _delete_feedback_of_none(connection: Connection, before: datetime, batch_rows: int) -> dict[str, int]:
    """Deletes old feedback whose prediction is not there, deleted before it was drained, say."""
    ids = select(feedback.c.id).where((feedback.c.created_on < before) & ~_has_prediction()).limit(batch_rows)
    return {"feedback": connection.execute(delete(feedback).where(feedback.c.id.in_(ids))).rowcount}


def _release(connection: Connection, sha256s: Sequence[str], limits: Retention, batch_rows: int) -> dict[str, int]:
    """Takes these uploads from the predictions that are too old for them."""
    ids = (
        select(predictions.c.prediction_id)
        .where(predictions.c.image_sha256.in_(sha256s) & (predictions.c.created_on < limits.images_before_utc))
        .limit(batch_rows)
        # One that is just being deleted needs nothing.
        .with_for_update(skip_locked=True)
    )
    released = update(predictions).where(predictions.c.prediction_id.in_(ids)).values(image_sha256=None)
    return {"released_uploads": connection.execute(released).rowcount}


def _delete_images(connection: Connection, sha256s: Sequence[str]) -> dict[str, int]:
    """Deletes those of these uploads that no prediction has."""
    # Locked, so that no replica begins to use one meanwhile; those that a replica has locked are used. The next
    # statement sees what was committed before the locks.
    unused = select(images.c.sha256).where(images.c.sha256.in_(sha256s) & ~_is_used()).with_for_update(skip_locked=True)
    locked = list(connection.execute(unused).scalars())
    gone = connection.execute(
        delete(images).where(images.c.sha256.in_(locked) & ~_is_used()).returning(images.c.bytes)
    ).scalars()
    sizes = list(gone)
    return {"images": len(sizes), "image_bytes": sum(sizes)}


def _count(engine: Engine, limits: Retention) -> dict[str, int]:
    """Counts in one snapshot what `_delete` would delete."""
    log_before = limits.log_before_utc
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:

        def count(statement: Any) -> int:
            return int(connection.execute(statement).scalar_one())

        found: dict[str, int] = {}
        kept_from = limits.images_before_utc
        if log_before is not None:
            rows = select(func.count())
            found["requests"] = count(rows.select_from(api_log).where(api_log.c.created_on < log_before))
            found["predictions"] = count(rows.select_from(predictions).where(predictions.c.created_on < log_before))
            has_recent = exists().where(
                (predictions.c.prediction_id == feedback.c.prediction_id) & (predictions.c.created_on >= log_before)
            )
            found["feedback"] = count(
                rows.select_from(feedback).where(
                    ~has_recent & (_has_prediction() | (feedback.c.created_on < log_before))
                )
            )
        released = (predictions.c.created_on < kept_from) & predictions.c.image_sha256.is_not(None)
        if log_before is not None:
            released &= predictions.c.created_on >= log_before
        found["released_uploads"] = count(select(func.count()).select_from(predictions).where(released))
        unused = (images.c.created_on < kept_from) & ~exists().where(
            (predictions.c.image_sha256 == images.c.sha256) & (predictions.c.created_on >= kept_from)
        )
        number, size = connection.execute(
            select(func.count(), func.coalesce(func.sum(images.c.bytes), 0)).where(unused)
        ).one()
        return {**found, "images": int(number), "image_bytes": int(size)}


def _is_used() -> Any:
    return exists().where(predictions.c.image_sha256 == images.c.sha256)


def _has_prediction() -> Any:
    return exists().where(predictions.c.prediction_id == feedback.c.prediction_id)
