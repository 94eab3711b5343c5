"""Fixtures that several suites share: a real PostgreSQL per session, and a fresh migrated database per test."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psycopg2
import pytest
from psycopg2 import sql
from sqlalchemy import Engine, make_url

from cv_platform.loopback import past_proxies

_TEMPLATE = "cv_template"
_TRACKING = "MLFLOW_TRACKING_URI"
_GIVEN_TRACKING = os.environ.get(_TRACKING)
os.environ.update(past_proxies(os.environ))  # Tests ask servers of their own, in children too.


@pytest.fixture(autouse=True)
def _process_as_found() -> Iterator[None]:
    """Gives the next test the environment and the handling of SIGTERM that this one found: children inherit both.

    MLflow writes the tracking address of each run into the environment, also from a module's fixture, which this one
    cannot look behind: that address is again what the session began with.
    """
    environment = dict(os.environ)
    handler, mask = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGTERM, handler)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    os.environ.pop(_TRACKING, None)
    if _GIVEN_TRACKING is not None:
        os.environ[_TRACKING] = _GIVEN_TRACKING


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of an embedded PostgreSQL of this session (under pytest-xdist: of this worker), to make databases in."""
    from cv_platform.database.embedded import embedded_database

    # Not below pytest's own folder, which is closed to the unprivileged user that runs the server for root.
    home = Path(tempfile.mkdtemp(prefix="cv-tests-"))
    home.chmod(0o711)
    try:
        with embedded_database(home) as url:
            yield url
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="session")
def _template_url(postgres_url: str) -> str:
    from cv_platform.database.migrate import migrate

    _administrate(postgres_url, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
    migrate(_renamed(postgres_url, _TEMPLATE))
    return postgres_url


@pytest.fixture
def database_url(_template_url: str) -> Iterator[str]:
    """URL of a migrated, empty database of this test's own."""
    with _database(_template_url, template=_TEMPLATE) as url:
        yield url


@pytest.fixture
def unmigrated_url(postgres_url: str) -> Iterator[str]:
    """URL of a database of this test's own without any table."""
    with _database(postgres_url, template="template1") as url:
        yield url


@contextmanager
def _database(server_url: str, *, template: str) -> Iterator[str]:
    name = f"test_{uuid4().hex}"
    identifiers = {"name": sql.Identifier(name), "template": sql.Identifier(template)}
    _administrate(server_url, sql.SQL("CREATE DATABASE {name} TEMPLATE {template}").format(**identifiers))
    yield _renamed(server_url, name)
    _drop_database(server_url, name)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on `database_url`."""
    from cv_platform.database.connection import make_engine

    engine = make_engine(database_url)
    yield engine
    engine.dispose()


def _renamed(url: str, database: str) -> str:
    return make_url(url).set(database=database).render_as_string(hide_password=False)


def _drop_database(url: str, name: str) -> None:
    """Drops a database and whatever connections a test left to it."""
    statement = sql.SQL("DROP DATABASE {name} WITH (FORCE)").format(name=sql.Identifier(name))
    deadline = time.monotonic() + 30
    while True:
        try:
            return _administrate(url, statement)
        except psycopg2.errors.InsufficientPrivilege:  # Autovacuum is in it: a process that is not this role's to end.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _administrate(url: str, statement: sql.Composable) -> None:
    connection = psycopg2.connect(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        connection.autocommit = True  # CREATE DATABASE runs in no transaction.
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()
