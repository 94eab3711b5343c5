"""The tested stack as its phases see it: its containers, its doors, and what PostgreSQL, MLflow and Evidently hold."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from benchmarks.options import REPOSITORY
from cv_platform.config import load_experiment
from cv_platform.containers import engine
from cv_platform.containers.engine import Container
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import ServiceError
from trials.findings import Findings, wait_until
from trials.pace import allowed
from trials.stack.checkout import Checkout
from trials.stack.dagster_api import DagsterApi
from trials.traffic import Outcome, Traffic

EXPERIMENT = "digits"
ROWS_SECONDS = 90.0
_HEALTH_SECONDS = 180.0
_LOGGED = (
    "SELECT p.prediction_id FROM predictions p JOIN api_log a USING (prediction_id) WHERE a.response_status_code = 200"
)


@dataclass(frozen=True)
class Digit:
    """An image of the test split, as it lies in the dataset."""

    png: bytes
    label: str


class Stage:
    """A running stack.

    Args:
        checkout: whose commands start and change it.
        artifacts: folder for what is to be looked at afterwards.
    """

    def __init__(self, checkout: Checkout, artifacts: Path) -> None:
        self.checkout = checkout
        self.artifacts = artifacts

    # Its doors

    def url(self, port: str) -> str:
        """Returns the address of one of the published ports, named as in docker/.env, such as `MLFLOW_PORT`."""
        return f"http://127.0.0.1:{self.checkout.values[port]}"

    @property
    def login(self) -> tuple[str, str]:
        """Name and password before the pages."""
        values = self.checkout.values
        return values["STACK_USER"], values["STACK_PASSWORD"]

    @property
    def dagster(self) -> DagsterApi:
        """Dagster, through nginx."""
        return DagsterApi(self.url("DAGSTER_PORT"), *self.login)

    def get(self, port: str, path: str, **parameters: str) -> Any:
        """Returns the JSON of a page's API, asked through nginx with the login.

        Raises:
            ServiceError: no answer, or another status than 200.
        """
        url = self.url(port) + path
        try:
            response = httpx.get(url, params=parameters, auth=self.login, timeout=30)
        except httpx.HTTPError as err:
            raise ServiceError(f"Expected an answer of {url}. Received: {err!r}.") from err
        if response.status_code != 200:
            raise ServiceError(f"Expected 200 of {url}. Received: {response.status_code}, {response.text[:300]}.")
        return response.json()

    def health(self) -> dict[str, Any]:
        """Returns what a replica says of itself at `/health_check`; `status_code` is added, 0 for no answer."""
        try:
            response = httpx.get(f"{self.url('SERVICE_PORT')}/health_check", timeout=10)
            return {**response.json(), "status_code": response.status_code}
        except (httpx.HTTPError, ValueError):
            return {"status_code": 0}

    # Load

    @cached_property
    def digits(self) -> list[Digit]:
        """The test images of the digits, made here as the stack makes them; kept beside the checkout."""
        experiment = load_experiment(REPOSITORY / "configs" / f"{EXPERIMENT}.yaml")
        home = self.checkout.folder.with_name(f"{self.checkout.folder.name}-images")
        version = checkout_version(experiment.dataset, experiment.model, home=home)
        files = sorted(version.directory.glob("**/test/*/*.png"))
        random.Random(0).shuffle(files)  # As requests come: class by class, their order alone would look like drift.
        return [Digit(path.read_bytes(), path.parent.name) for path in files]

    def traffic(self, *, concurrency: int) -> Traffic:
        """Returns load upon the service, through nginx."""
        return Traffic(self.url("SERVICE_PORT"), [digit.png for digit in self.digits], concurrency=concurrency)

    def predict(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        """Sends images, four at a time, and returns the answers in their order; `status` is added."""
        with httpx.Client(base_url=self.url("SERVICE_PORT"), timeout=60) as client:

            def send(image: bytes) -> dict[str, Any]:
                response = client.post("/predict", files={"file": ("digit.png", image, "image/png")})
                return {**response.json(), "status": response.status_code}

            with ThreadPoolExecutor(max_workers=4) as pool:
                return list(pool.map(send, images))

    def state_truths(self, prediction_ids: Sequence[str], labels: Sequence[str]) -> int:
        """Says what images really show, and returns how many statements the service has taken."""
        with httpx.Client(base_url=self.url("SERVICE_PORT"), timeout=60) as client:
            answers = [
                client.post(f"/feedback/{identifier}", json={"true_class": label})
                for identifier, label in zip(prediction_ids, labels, strict=True)
            ]
        return sum(answer.is_success for answer in answers)

    # What is kept

    def query(self, statement: str) -> list[list[str]]:
        """Returns the rows of a query on the request log, asked within PostgreSQL's container as the log's owner."""
        # psql's password by the environment: a command line is everybody's to read.
        command = ["docker", "exec", "--env", "PGPASSWORD", self.container("postgres").id]
        command += ["psql", "--no-psqlrc", "-h", "127.0.0.1", "-U", "request_log", "-d", "request_log", "-AtF", "\t"]
        environment = {**os.environ, "PGPASSWORD": self.checkout.values["REQUEST_LOG_PASSWORD"]}
        done = subprocess.run(
            [*command, "-c", statement], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode != 0:
            raise ServiceError(f"Expected rows of {statement[:100]!r}. Received: {done.stderr.strip()[-500:]}.")
        return [line.split("\t") for line in done.stdout.splitlines()]

    def missing_rows(self, prediction_ids: set[str], *, seconds: float = ROWS_SECONDS) -> int:
        """Waits until each prediction has its rows in PostgreSQL, and returns how many have none."""
        deadline = time.monotonic() + allowed(seconds)
        while True:
            try:
                missing = len(prediction_ids - {row[0] for row in self.query(_LOGGED)})
            except ServiceError:  # PostgreSQL comes back later than the rest.
                missing = len(prediction_ids)
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(1.0)

    # Its containers

    def containers(self, *services: str) -> list[Container]:
        """Returns the containers of these services, or of all."""
        return engine.containers(self.checkout.project, *services)

    def container(self, service: str) -> Container:
        """Returns the first container of a service.

        Raises:
            ServiceError: it has none.
        """
        found = self.containers(service)
        if not found:
            raise ServiceError(f"Expected a container of {service}. Received: none. The phase `up` starts it.")
        return found[0]

    def is_well(self) -> bool:
        """Returns whether every container is healthy, or has done its one task."""
        found = self.containers()
        return bool(found) and all(container.is_well for container in found)

    def wait_until_well(self, *, seconds: float = _HEALTH_SECONDS) -> float:
        """Waits until `is_well`, and returns the seconds it took.

        Raises:
            ServiceError: not within `seconds`.
        """
        return wait_until(self.is_well, seconds=seconds, what="every container healthy")

    def keep_logs(self, name: str) -> Path:
        """Writes every container's log and state into a folder of that name, and returns it."""
        folder = self.artifacts / name
        folder.mkdir(parents=True, exist_ok=True)
        for container in self.containers():
            lines = engine.last_lines(container, 5000)
            state = json.loads(engine.docker("inspect", "--format", "{{json .State}}", container.id))
            text = f"{container.status}\n{json.dumps(state, indent=2)}\n\n{lines}\n"
            (folder / f"{container.name}.log").write_text(text, encoding="utf-8")
        return folder


def add_rows(findings: Findings, stage: Stage, outcomes: Sequence[Outcome]) -> None:
    """Adds what every phase under load ends with: whether each answer has its row."""
    answered = {outcome.prediction_id for outcome in outcomes if outcome.status == 200 and outcome.prediction_id}
    missing = stage.missing_rows(answered)
    findings.add(
        "a row for every 200", f"{len(answered) - missing} rows for {len(answered)}", not missing and bool(answered)
    )
