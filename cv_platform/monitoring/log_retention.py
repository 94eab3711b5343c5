"""Deletes what the request log has kept long enough, but for what the monitors still judge."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import Engine

from cv_platform.config import ExperimentConfig
from cv_platform.database.retention import Retention, delete_expired
from cv_platform.monitoring.accept import forget_deleted
from cv_platform.monitoring.window import monitored_since
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage


def expire_log(
    engine: Engine, experiments: Collection[ExperimentConfig], settings: Settings, now: datetime, *, is_dry_run: bool
) -> Retention:
    """Deletes requests and uploads older than the settings' retention, and takes deleted ones out of accepted windows.

    Args:
        engine: of the request log.
        experiments: all that use it: what their monitors judge is kept.
        settings: how long what is kept, and where central storage is.
        now: with its zone.
        is_dry_run: only counts.

    Raises:
        DatabaseError, DatabaseUnavailableError, SchemaMismatchError: see `database.retention.delete_expired`.
        StorageError: central storage cannot be read or written.
    """
    if not is_dry_run:
        names = [experiment.model.model_name for experiment in experiments]
        forget_deleted(engine, CentralStorage(settings.storage_url), names, settings.home / "cache")
    return delete_expired(
        engine,
        now=now,
        log_retention_days=settings.log_retention_days,
        image_retention_days=settings.image_retention_days,
        windows=monitored_since(experiments, now),
        is_dry_run=is_dry_run,
    )
