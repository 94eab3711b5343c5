"""Databases of a test's own on the PostgreSQL of its session, and questions to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg2
from psycopg2 import sql
from sqlalchemy import Engine, make_url, text

from cv_platform_tests.support.waiting import wait_until


@contextmanager
def own_database(server_url: str, *, template: str = "template1") -> Iterator[str]:
    """Makes a database from `template`, yields its URL, and drops it with whatever connections a test left to it."""
    name = f"test_{uuid4().hex}"
    make_database(server_url, name, template=template)
    yield named(server_url, name)
    drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))

    def is_dropped() -> bool:
        try:
            _administrate(server_url, drop)
        except psycopg2.errors.InsufficientPrivilege:  # Autovacuum is in it: a process that is not this role's to end.
            return False
        return True

    wait_until(is_dropped, seconds=30)


def make_database(server_url: str, name: str, *, template: str = "template1") -> None:
    """Makes a database."""
    names = {"name": sql.Identifier(name), "template": sql.Identifier(template)}
    _administrate(server_url, sql.SQL("CREATE DATABASE {name} TEMPLATE {template}").format(**names))


def named(url: str, database: str) -> str:
    """Returns the URL of another database of the same server."""
    return make_url(url).set(database=database).render_as_string(hide_password=False)


def plain_connection(url: str) -> psycopg2.extensions.connection:
    """Connects past SQLAlchemy, in no transaction."""
    connection = psycopg2.connect(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False))
    connection.autocommit = True
    return connection


def scalar(engine: Engine, statement: str) -> object:
    """Returns the first value that a statement gives."""
    with engine.connect() as connection:
        return connection.execute(text(statement)).scalar()


def count(engine: Engine, table: str) -> object:
    """Returns how many rows a table has."""
    return scalar(engine, f"SELECT count(*) FROM {table}")


def _administrate(url: str, statement: sql.Composable) -> None:
    connection = plain_connection(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
    finally:
        connection.close()
