"""Brings a database to the tables of this version, and tells whether it has them.

Alembic (https://alembic.sqlalchemy.org) runs without an ini file; the migrations lie beside this module. Migrating is
an explicit step (`cv-platform migrate`): services only check.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, text

from cv_platform.database.connection import make_engine
from cv_platform.database.schema import SCHEMA_REVISION
from cv_platform.errors import SchemaMismatchError

if TYPE_CHECKING:
    from alembic.config import Config

_LOCK_KEY = 0x63765F706C617466
"""Advisory lock of migrators: the ASCII of `cv_platf`."""
_LOCK_WAIT = "60s"


def migrate(url: str) -> str:
    """Applies what is missing, all in one transaction, and returns the revision that the database then has.

    Two migrators wait for each other. A database that is newer than this version is left alone.

    Raises:
        ConfigError: the URL is no PostgreSQL URL.
        DatabaseUnavailableError: the server cannot be reached.
        SchemaMismatchError: the database has a revision that this version does not know.
    """
    engine = make_engine(url, pool_size=1)
    try:
        with engine.begin() as connection:
            connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_WAIT}'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
            if read_revision(connection) == SCHEMA_REVISION:
                return SCHEMA_REVISION
            # Late: importing Alembic takes longer than to see that there is nothing to do.
            from alembic import command
            from alembic.util import CommandError

            config = alembic_config()
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as err:
                raise _mismatch(read_revision(connection)) from err
    finally:
        engine.dispose()
    return SCHEMA_REVISION


def check_schema(url: str) -> None:
    """Returns if the database has exactly the tables of this version.

    Raises:
        DatabaseUnavailableError: the server cannot be reached.
        SchemaMismatchError: the database was never migrated, or has another revision.
    """
    engine = make_engine(url, pool_size=1)
    try:
        with engine.connect() as connection:
            require_revision(read_revision(connection))
    finally:
        engine.dispose()


def read_revision(connection: Connection) -> str | None:
    """Returns the revision that the database says it has; None for one that was never migrated."""
    if connection.execute(text("SELECT to_regclass('alembic_version')")).scalar() is None:
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def require_revision(revision: str | None) -> None:
    """Raises SchemaMismatchError unless the revision is this version's."""
    if revision != SCHEMA_REVISION:
        raise _mismatch(revision)


def alembic_config() -> Config:
    """Returns Alembic's configuration for the migrations in this package."""
    from alembic.config import Config

    config = Config()
    # Alembic interpolates %, which a path may contain.
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _mismatch(revision: str | None) -> SchemaMismatchError:
    if revision is None or revision < SCHEMA_REVISION:
        remedy = "Run: cv-platform migrate"
    else:
        remedy = "The database is newer: upgrade cv_platform instead of migrating."
    return SchemaMismatchError(
        f"Expected database revision {SCHEMA_REVISION}. Received: {revision or 'a database without tables'}. {remedy}"
    )
