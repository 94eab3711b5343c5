"""A started context per test, with the real spool, and a look into the spool that shares no code with it."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from cv_platform.serving.app import create_app
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.worker import ServingContext
from cv_platform.settings import Settings
from cv_platform_tests.unit.serving.http_client import Client, FixedModels

ADMIN_TOKEN = "correct-horse"
MakeContext = Callable[..., ServingContext]


@pytest.fixture
def make_context(tmp_path: Path) -> Iterator[MakeContext]:
    """Starts contexts, whose environment may be changed by variable, and stops them at the end."""
    started: list[ServingContext] = []

    def make(*, models: Any = None, limits: Any = None, **environment: str) -> ServingContext:
        environment = {
            "CV_HOME": str(tmp_path / "home"),
            "CV_STORAGE": str(tmp_path / "storage"),
            "CV_ADMIN_TOKEN": ADMIN_TOKEN,
            "CV_MAX_UPLOAD_BYTES": "200000",
            "MLFLOW_TRACKING_URI": "http://user:secret@mlflow:5050",
            **environment,
        }
        context = ServingContext(
            Settings.from_environment({k: v for k, v in environment.items() if v}),
            models=models or FixedModels(),
            limits=limits,
            metrics=ServingMetrics(prometheus_client.CollectorRegistry()),
        )
        context.start()
        started.append(context)
        return context

    yield make
    for context in started:
        context.stop()


@pytest.fixture
def context(make_context: MakeContext) -> ServingContext:
    return make_context()


@pytest.fixture
def client(context: ServingContext) -> Client:
    return Client(create_app(context))


@pytest.fixture
def admin(context: ServingContext) -> Client:
    return Client(create_app(context), {"Authorization": f"Bearer {ADMIN_TOKEN}"})


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def spooled(context: ServingContext) -> list[dict[str, Any]]:
    """Returns the records that are durable in the spool's files, oldest first, with those that nobody waited for."""
    if context._log is not None:  # A context that has stopped has written them.
        context.log.try_out()  # Behind them.
    records: list[dict[str, Any]] = []
    for path in sorted((context.settings.home / "spool").glob("*.sqlite")):
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT record FROM entries ORDER BY id").fetchall()
        records += [json.loads(record) for (record,) in rows]
    return records


def spooled_images(context: ServingContext) -> list[bytes]:
    """Returns the uploads that are durable in the spool's files."""
    images: list[bytes] = []
    for path in sorted((context.settings.home / "spool").glob("*.sqlite")):
        with closing(sqlite3.connect(path)) as connection:
            images += [content for (content,) in connection.execute("SELECT content FROM images").fetchall()]
    return images
