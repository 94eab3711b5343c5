"""The request log as the service sees it: keep an entry for good, record feedback, find a prediction again.

An entry is kept once it is in the local spool (`spool.py`); the drainer (`drainer.py`) brings it to PostgreSQL when
PostgreSQL is there. The service therefore answers, and loses nothing, while the database
is away.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self
from uuid import UUID

from cv_platform.database.address import postgres_url
from cv_platform.errors import DatabaseUnavailableError
from cv_platform.serving.log.deletion import delete_from_database, delete_from_spools
from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.entry import FeedbackEntry, StoredPrediction
from cv_platform.serving.log.limits import LogLimits
from cv_platform.serving.log.spool import Spool
from cv_platform.serving.log.spool_file import find_spooled, find_statements
from cv_platform.serving.telemetry.log_status import LogStatus

if TYPE_CHECKING:
    from sqlalchemy import Engine

_POOL_SECONDS = 2.0
"""A person waits for what this engine reads: better no answer soon than one that never comes."""
_STATEMENT_SECONDS = 5.0


class RequestLog:
    """One replica's request log; safe to use from many threads. Make it after forking.

    Attributes:
        spool: takes the entries.

    Args:
        directory: `$CV_HOME/spool`, shared by all replicas.
        database_url: PostgreSQL's URL; None: entries stay in the spool, as far as its limits allow.
        limits: of this replica.

    Raises:
        SpoolFullError: the spool cannot be made.
        ConfigError: the URL is no PostgreSQL URL.
    """

    def __init__(
        self,
        directory: Path,
        database_url: str | None,
        limits: LogLimits | None = None,
    ) -> None:
        self._limits = limits or LogLimits()
        # The URL first: a wrong one must not leave a spool behind.
        self._url = None if database_url is None else postgres_url(database_url)
        self._engine: Engine | None = None
        self._making_engine = threading.Lock()
        self._directory = directory
        self._folders = (directory,) if self._limits.archive is None else (directory, self._limits.archive)
        self.spool = Spool(directory, self._limits)
        self._drainer = Drainer(self.spool, database_url, self._limits)
        self._drainer.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find_prediction(self, prediction_id: UUID) -> StoredPrediction | None:
        """Returns a prediction wherever it is: in a replica's spool, or in the database.

        Raises:
            DatabaseUnavailableError: it is in no spool, and the database cannot be asked.
            SchemaMismatchError: it is in no spool, and the database has other tables.
        """
        # In this order: an entry leaves the spool only after the database has it.
        found = self.spool.find(prediction_id)
        for folder in self._folders:
            found = found or find_spooled(folder, prediction_id)
        engine = None if found is not None else self._reading_engine()
        if engine is None:
            return found
        from cv_platform.serving.log.tables import find_prediction

        return find_prediction(engine, prediction_id)

    def statements(self, prediction_id: UUID) -> Iterator[FeedbackEntry]:
        """Yields what was said of a prediction: first what waits in a spool of this host, then what the database has.

        Raises:
            DatabaseUnavailableError, SchemaMismatchError: the database cannot be asked; the spools' came before.
        """
        for folder in self._folders:
            yield from find_statements(folder, prediction_id)
        engine = self._reading_engine()
        if engine is not None:
            from cv_platform.serving.log.tables import find_statements as find_stored_statements

            yield from find_stored_statements(engine, prediction_id)

    def delete_prediction(self, prediction_id: UUID) -> bool:
        """Deletes a prediction and what was said of it, wherever they are; returns whether there was one.

        What waits on its way to the database, on this host or another one, does not arrive there either.

        Raises:
            DatabaseUnavailableError: the database cannot be asked, which may have it whatever the spools have: nothing
                was deleted.
            SchemaMismatchError: as the former.
        """
        engine = self._reading_engine()
        is_stored = False
        if engine is not None:
            try:
                # First: what leaves a spool meanwhile is in the database, or finds the deletion there.
                is_stored = delete_from_database(engine, prediction_id)
            except DatabaseUnavailableError as err:
                raise DatabaseUnavailableError(f"{err} Nothing was deleted: try again later.") from err
        removed = [delete_from_spools(folder, prediction_id) for folder in self._folders]
        was_spooled = any(removed)
        if engine is not None:
            return is_stored or was_spooled
        if not was_spooled:
            self.database()
        return True

    def database(self) -> Engine:
        """Returns the engine for what needs the database itself, as labels do.

        Raises:
            DatabaseUnavailableError: there is none.
        """
        engine = self._reading_engine()
        if engine is None:
            raise DatabaseUnavailableError(
                "Expected the request log's database. Received: none. Start it, or set DATABASE_URL."
            )
        return engine

    def use_database(self, database_url: str) -> None:
        """Drains to this database from now on: the embedded one may start later than the service, or move.

        Raises:
            ConfigError: the URL is no PostgreSQL URL.
        """
        url = postgres_url(database_url)
        self._drainer.close()
        with self._making_engine:
            self._url = url
            former, self._engine = self._engine, None
        self._drainer = Drainer(self.spool, database_url, self._limits)
        self._drainer.start()
        if former is not None:
            former.dispose()

    def status(self) -> LogStatus:
        """Returns depth and age of what waits, the database's state and the last error."""
        return self._drainer.status()

    def close(self) -> None:
        """Ends the threads; what the database does not have yet is left to the next replica that starts."""
        self._drainer.close()
        self.spool.close()
        if self._engine is not None:
            self._engine.dispose()

    def _reading_engine(self) -> Engine | None:
        """Returns the engine of what is looked up, made by the first look-up: SQLAlchemy would hold up the start."""
        with self._making_engine:
            if self._engine is None and self._url is not None:
                from cv_platform.database.connection import make_engine

                self._engine = make_engine(
                    self._url, pool_timeout_seconds=_POOL_SECONDS, statement_timeout_seconds=_STATEMENT_SECONDS
                )
            return self._engine
