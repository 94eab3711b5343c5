"""Engines and URLs of the request log's database, with errors that say whether trying again can help.

SQLAlchemy's documentation: https://docs.sqlalchemy.org/en/20/core/engines.html. Every engine made here raises
`DatabaseUnavailableError` or `SchemaMismatchError` instead of the driver's error where one of these is the cause.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL, Engine, ExceptionContext, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from cv_platform.database.address import postgres_url
from cv_platform.errors import ConfigError, DatabaseError, DatabaseUnavailableError, SchemaMismatchError
from cv_platform.settings import Settings

_SCHEMA_CODES = frozenset({"42P01", "42703", "42804", "42P10"})
"""Undefined table, undefined column, other column type, no such unique constraint."""
_UNAVAILABLE_CLASSES = frozenset({"08", "28", "3D", "53", "57"})
"""Connection, authorisation, no such database, out of resources, operator intervention."""


def normalise_url(url: str) -> URL:
    """Returns the parts of a URL, see `address.postgres_url`.

    Raises:
        ConfigError: it is no PostgreSQL URL.
    """
    try:
        return make_url(postgres_url(url))
    except ArgumentError as err:
        # The text may hold a password, so it is not repeated.
        raise ConfigError(
            "DATABASE_URL: expected postgresql://user:password@host:port/database. Received: no URL."
        ) from err


class _TypedPool(QueuePool):
    """A pool whose timeout is a `DatabaseUnavailableError`: that error comes from no driver, so no event types it."""

    def connect(self) -> PoolProxiedConnection:
        try:
            return super().connect()
        except PoolTimeoutError as err:
            raise DatabaseUnavailableError(
                "Expected a free connection to the database. Received: none in time, as all of them wait for it. "
                "Check that PostgreSQL answers."
            ) from err


def make_engine(
    url: str,
    *,
    pool_size: int = 2,
    pool_timeout_seconds: float = 10,
    statement_timeout_seconds: float | None = None,
) -> Engine:
    """Returns an engine whose connections speak UTC and notice within seconds that the server is gone.

    It connects on first use. Anything that uses it may raise `DatabaseUnavailableError` (worth trying again) or
    `SchemaMismatchError` (migrate first).

    Raises:
        ConfigError: the URL is no PostgreSQL URL.
    """
    options = "-c timezone=UTC"
    if statement_timeout_seconds is not None:
        options += f" -c statement_timeout={int(statement_timeout_seconds * 1000)}"
    parsed = normalise_url(url)
    # SQLAlchemy names a pool's logger by the module of its class, so that this one would tell in the platform's name,
    # at INFO, of each pool that is disposed of. Whoever wants to read it sets a level.
    pool_log = logging.getLogger(f"{_TypedPool.__module__}.{_TypedPool.__name__}")
    if pool_log.level == logging.NOTSET:
        pool_log.setLevel(logging.WARNING)
    engine = create_engine(
        parsed,
        pool_size=pool_size,
        max_overflow=pool_size,
        poolclass=_TypedPool,
        pool_timeout=pool_timeout_seconds,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 5,
            "application_name": "cv_platform",
            "options": options,
            # Without these a host that vanished holds a statement for up to two hours.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 15_000,
        },
    )

    @event.listens_for(engine, "handle_error")
    def _type_error(context: ExceptionContext) -> DatabaseError | None:
        # A failing pre-ping is no error: the pool connects again.
        if context.is_pre_ping or not isinstance(context.original_exception, psycopg2.Error):
            return None
        return typed_error(context.original_exception, parsed, is_disconnect=context.is_disconnect)

    return engine


def typed_error(err: psycopg2.Error, url: URL, *, is_disconnect: bool = False) -> DatabaseError | None:
    """Returns the platform's error for a driver error, or None where it is a mistake of the statement or its values."""
    code = err.pgcode
    where = f"{url.host}:{url.port or 5432}/{url.database}"
    reason = str(err).strip() or type(err).__name__
    if code in _SCHEMA_CODES:
        return SchemaMismatchError(
            f"Expected the tables of this version at {where}. Received: {reason}. Run: cv-platform migrate"
        )
    lost = is_disconnect or (code is None and isinstance(err, psycopg2.OperationalError | psycopg2.InterfaceError))
    if lost or (code or "")[:2] in _UNAVAILABLE_CLASSES:
        return DatabaseUnavailableError(
            f"Expected PostgreSQL at {where}. Received: {reason}. Check that it runs and that DATABASE_URL is right."
        )
    return None


@contextmanager
def database_url(settings: Settings) -> Iterator[str]:
    """Yields the URL of the request log: `DATABASE_URL` if set, else the embedded PostgreSQL, which runs meanwhile.

    Raises:
        ConfigError: DATABASE_URL is no PostgreSQL URL.
        ServiceError: the embedded PostgreSQL does not start.
    """
    if settings.database_url is not None:
        yield normalise_url(settings.database_url.get_secret_value()).render_as_string(hide_password=False)
        return
    # Late: a service with a server of its own needs neither the binaries nor POSIX locks.
    from cv_platform.database.embedded import embedded_database

    with embedded_database(settings.home, port=settings.postgres_port) as url:
        yield url
