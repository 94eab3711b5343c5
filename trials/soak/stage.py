"""The installation that the phases play on: storage, PostgreSQL, the service, and the questions asked of them."""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine, text

from benchmarks.installation import isolated_environment, isolated_settings
from benchmarks.servers import Server, process_tree
from benchmarks.services import Wrap, platform_service
from benchmarks.untrained import deploy_untrained
from benchmarks.uploads import write_uploads
from cv_platform.database.cluster import Cluster
from cv_platform.errors import ServiceError
from cv_platform.local.http import free_port
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from trials.findings import Findings, wait_until
from trials.pace import allowed
from trials.traffic import Outcome

WORKERS = 2
VERSIONS = 3
SIDE_PX = 50
NAME = "soak"
MODEL_NAME = f"{NAME}_classifier"
ROWS_SECONDS = 90.0
SWAP_SECONDS = 60.0


@dataclass(frozen=True)
class Scale:
    """How much is done; 1 is what `make soak` promises."""

    share: float = 1.0

    def count(self, full: int, *, least: int) -> int:
        """Returns the share of a number, but no less than `least`."""
        return max(least, round(full * self.share))

    def seconds(self, full: float, *, least: float) -> float:
        """Returns the share of a time, but no less than `least`."""
        return max(least, full * self.share)


class Stage:
    """A temporary installation with several versions of one small model in its storage.

    Args:
        folder: receives everything.
        cluster: the installation's PostgreSQL, running and migrated; the phases stop and start it.
        engine: of that database.
        url: of that database.
        seed: of the uploads.
        keep: folder for what is to be looked at afterwards.
    """

    def __init__(self, folder: Path, cluster: Cluster, engine: Engine, url: str, *, seed: int, keep: Path) -> None:
        self.folder = folder
        self.seed = seed
        self.keep = keep
        self.cluster = cluster
        self._engine = engine
        self._token = secrets.token_urlsafe(24)
        self.settings: Settings = isolated_settings(home_of(folder), folder / "configs", service_workers=WORKERS)
        self._environment = {
            **isolated_environment(self.settings, database_url=url),
            "CV_ADMIN_TOKEN": self._token,
            "TF_NUM_INTRAOP_THREADS": "1",
        }
        self.storage = CentralStorage(self.settings.storage_url)
        self.uploads = [path.read_bytes() for path in write_uploads("photos", folder / "uploads", count=16, seed=seed)]
        self.versions = deploy_untrained(
            self.settings,
            self._environment,
            folder / "export",
            name=NAME,
            architecture="small_cnn",
            side_px=SIDE_PX,
            versions=VERSIONS,
        )
        self._port = free_port()

    # The service

    @contextmanager
    def service(self, name: str, *, wrap: Wrap = list, **environment: str) -> Iterator[Server]:
        """Runs the service, always on the same port.

        Args:
            name: of its log.
            wrap: turns its command into the one that is run.
            environment: variables to change.
        """
        variables = {**self._environment, **environment}
        with platform_service(
            self.settings, variables, self.folder, name=name.replace(" ", "-"), port=self._port, wrap=wrap
        ) as server:
            yield server

    def get(self, server: Server, path: str) -> tuple[int, dict[str, Any]]:
        """Returns status and JSON of a route, asked as admin; status 0: no answer."""
        return self._ask("GET", server, path)

    def move_production(self, server: Server, version: str) -> int:
        """Asks the service to put a version into production and returns its status."""
        return self._ask("PUT", server, f"/update_model/{MODEL_NAME}.yaml?version={version}")[0]

    def workers_on(self, server: Server) -> dict[int, str | None]:
        """Returns the version of each live worker by its process id, as `/models/current` says."""
        _, answer = self.get(server, "/models/current")
        live = (worker for worker in answer.get("workers", []) if worker["is_live"])
        return {int(worker["worker_id"].rpartition("-")[2]): worker["version"] for worker in live}

    def _ask(self, method: str, server: Server, path: str) -> tuple[int, dict[str, Any]]:
        try:
            response = httpx.request(
                method, server.base_url + path, headers={"Authorization": f"Bearer {self._token}"}, timeout=SWAP_SECONDS
            )
            return response.status_code, response.json()
        except (httpx.HTTPError, ValueError):
            return 0, {}

    # The database

    @contextmanager
    def database_stopped(self) -> Iterator[None]:
        """Stops PostgreSQL for the block."""
        running = self.cluster.postmaster()
        if running is None:
            raise ServiceError("Expected PostgreSQL to run before it is stopped. Received: no server.")
        self.cluster.stop()
        try:
            yield
        finally:
            wait_until(lambda: self.cluster.start(running.port), seconds=60, what="PostgreSQL to start again")

    @contextmanager
    def database_frozen(self) -> Iterator[None]:
        """Suspends all of PostgreSQL's processes for the block: connections stay, answers do not come."""
        running = self.cluster.postmaster()
        frozen = [process.pid for process in process_tree(running.pid)] if running else []
        for pid in frozen:
            _signal(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in reversed(frozen):
                _signal(pid, signal.SIGCONT)

    def missing_rows(self, outcomes: Sequence[Outcome], *, seconds: float = ROWS_SECONDS) -> int:
        """Waits until every answer with 200 has its rows in PostgreSQL and returns how many have none."""
        answered = {outcome.prediction_id for outcome in outcomes if outcome.status == 200}
        deadline = time.monotonic() + allowed(seconds)
        while True:
            missing = len(answered - self._logged())
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(1.0)

    def _logged(self) -> set[str]:
        query = (
            "SELECT p.prediction_id::text FROM predictions p JOIN api_log a USING (prediction_id) "
            "WHERE a.response_status_code = 200"
        )
        with self._engine.connect() as connection:
            return {row[0] for row in connection.execute(text(query))}


def home_of(folder: Path) -> Path:
    """Returns the CV_HOME of the stage that plays in `folder`."""
    return folder / "home"


def add_rows(findings: Findings, stage: Stage, outcomes: Sequence[Outcome]) -> None:
    """Adds what every phase ends with: whether each answer has its row."""
    answered = sum(outcome.status == 200 for outcome in outcomes)
    missing = stage.missing_rows(outcomes)
    findings.add("a row for every 200", f"{answered - missing} rows for {answered}", missing == 0 and answered > 0)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # A process that had ended by itself.
