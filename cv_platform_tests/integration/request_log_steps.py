"""What tests of the request log ask its database, and wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Engine, text

WAIT_SECONDS = 60.0


def scalar(engine: Engine, statement: str) -> object:
    with engine.connect() as connection:
        return connection.execute(text(statement)).scalar()


def count(engine: Engine, table: str) -> object:
    return scalar(engine, f"SELECT count(*) FROM {table}")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
