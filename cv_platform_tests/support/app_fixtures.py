"""A started worker per test, with the real spool, and a look into the spool that shares no code with it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from cv_platform.errors import SpoolFullError
from cv_platform.serving.app import create_app
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.worker import open_worker
from cv_platform.settings import Settings
from cv_platform_tests.support.http_client import Client, FixedModels

ADMIN_TOKEN = "correct-horse"


class MakeWorker:
    """Opens workers, whose environment may be changed by variable.

    Args:
        folder: for their homes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[tuple[WorkerParts, ExitStack]] = []

    def __call__(self, *, models: Any = None, limits: Any = None, **environment: str) -> WorkerParts:
        environment = {
            "CV_HOME": str(self._folder / "home"),
            "CV_STORAGE": str(self._folder / "storage"),
            "CV_ADMIN_TOKEN": ADMIN_TOKEN,
            "CV_MAX_UPLOAD_BYTES": "200000",
            "MLFLOW_TRACKING_URI": "http://user:secret@mlflow:5050",
            **environment,
        }
        opened = ExitStack()
        worker = opened.enter_context(
            open_worker(
                Settings.from_environment({k: v for k, v in environment.items() if v}),
                models=models or FixedModels(),
                limits=limits,
                metrics=ServingMetrics(prometheus_client.CollectorRegistry()),
            )
        )
        self._open.append((worker, opened))
        return worker

    def stop(self, worker: WorkerParts) -> None:
        for other, opened in self._open:
            if other is worker:
                opened.close()

    def stop_all(self) -> None:
        for _, opened in self._open:
            opened.close()


@pytest.fixture
def make_worker(tmp_path: Path) -> Iterator[MakeWorker]:
    make = MakeWorker(tmp_path)
    yield make
    make.stop_all()


@pytest.fixture
def worker(make_worker: MakeWorker) -> WorkerParts:
    return make_worker()


@pytest.fixture
def client(worker: WorkerParts) -> Client:
    return Client(create_app(worker))


@pytest.fixture
def admin(worker: WorkerParts) -> Client:
    return Client(create_app(worker), {"Authorization": f"Bearer {ADMIN_TOKEN}"})


def spooled(worker: WorkerParts) -> list[dict[str, Any]]:
    """Returns the records that are durable in the spool's files, oldest first, with those that nobody waited for."""
    with suppress(SpoolFullError):  # A worker that has stopped has written them.
        worker.log.opened.spool.try_out()  # Behind them.
    return spooled_at(worker.settings.home)


def spooled_at(home: Path) -> list[dict[str, Any]]:
    """Returns the records that are durable in the spool's files of an installation, oldest first."""
    records: list[dict[str, Any]] = []
    for path in sorted((home / "spool").glob("*.sqlite")):
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT record FROM entries ORDER BY id").fetchall()
        records += [json.loads(record) for (record,) in rows]
    return records


def spooled_images(worker: WorkerParts) -> list[bytes]:
    """Returns the uploads that are durable in the spool's files."""
    images: list[bytes] = []
    for path in sorted((worker.settings.home / "spool").glob("*.sqlite")):
        with closing(sqlite3.connect(path)) as connection:
            images += [content for (content,) in connection.execute("SELECT content FROM images").fetchall()]
    return images
