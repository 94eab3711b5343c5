"""`make demo`: the digits experiment from data to monitored predictions, judged by its own outcome.

Everything is real: the graph is materialised by the `dagster` CLI, the service is a BentoML server, the images go over
HTTP, the log lies in PostgreSQL. Two windows of requests follow each other: the test images as they are, then the same
images as another camera might give them. The first must show no drift, the second must.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import cv2
import httpx
import numpy as np
import pandas as pd
from sqlalchemy import create_engine, text

from cv_platform.client.loopback import direct_transport
from cv_platform.config import load_experiment
from cv_platform.database.connection import database_url
from cv_platform.database.migrate import migrate
from cv_platform.errors import CvPlatformError, ServiceError
from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.graph import materialize
from cv_platform.local.http import free_port, wait_for_http
from cv_platform.local.programs import service_command
from cv_platform.local.supervisor import is_running
from cv_platform.record_store import RecordStore
from cv_platform.records import DatasetVersion, DriftReport, Evaluation, Record
from cv_platform.settings import Settings

_R = TypeVar("_R", bound=Record)
READY_SECONDS = 120.0
DRAIN_SECONDS = 60.0


@dataclass
class Summary:
    """What the demo saw; `failures` decides about its exit status."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def expect(self, condition: bool, statement: str) -> None:
        """Records a statement, and whether it held."""
        self.lines.append(f"  {'ok ' if condition else 'NOT'}  {statement}")
        if not condition:
            self.failures.append(statement)


def run_demo(settings: Settings, say: Callable[[str], None]) -> int:
    """Runs the demo and returns its exit status: 0 only if every statement of its summary holds.

    Raises:
        CvPlatformError: a stage could not run at all.
    """
    if is_running(settings):
        raise ServiceError("Expected a stopped stack, as the demo starts a service of its own. Run `make down` first.")
    config_file = _config_file(settings)
    experiment = load_experiment(config_file)
    settings = settings.model_copy(update={"configs": config_file})
    prepare_home(settings)
    summary = Summary()
    with database_url(settings) as url:
        migrate(url)
        environment = platform_environment(settings, database_url=url)
        with stage(summary, "graph", say):
            log = settings.home / "logs" / "demo-graph.log"
            materialize(f"key:{experiment.name}/*", environment, log=log, say=say)
        evaluation = read_record(settings, experiment.name, Evaluation)
        version, accuracy = evaluation.model.version, evaluation.metrics["accuracy"]
        summary.expect(
            accuracy >= experiment.evaluate.min_accuracy,
            f"test accuracy {accuracy:.4f} (gate {experiment.evaluate.min_accuracy})",
        )
        images = _test_images(settings, experiment.name)
        with ExitStack() as running:
            with stage(summary, "service start", say):
                base_url = running.enter_context(served(settings, environment))
            windows = _send_windows(base_url, url, images, summary, say)
            with httpx.Client(transport=direct_transport(base_url), timeout=10) as client:
                health = client.get(f"{base_url}/health_check").json()
        sent = [identifier for _, _, ids in windows.values() for identifier in ids]
        logged = _logged(url, sent)
        summary.expect(
            logged == len(sent), f"{len(sent)} answers with status 200, {logged} of them in predictions and api_log"
        )
        summary.expect(health.get("model_version") == version, f"the service answered with version {version}")
        for title, verdict in (("unshifted", "no drift"), ("shifted", "drift")):
            start, end, _ = windows[title]
            with stage(summary, f"drift report, {title}", say):
                report = _drift_report(settings, environment, experiment.name, start, end, title, say)
            moved = ", ".join(movement.class_name for movement in report.moved_classes[:3])
            detail = f"; classes that moved: {moved}" if report.verdict == "drift" and moved else ""
            summary.expect(
                report.verdict == verdict,
                f"{title} window ({report.rows} requests): {report.verdict}, smallest adjusted p "
                f"{min(report.adjusted_p_values.values(), default=float('nan')):.4f}{detail}",
            )
            summary.lines.append(f"       report: {report.report_url}")
    _print(summary, settings, say)
    return 1 if summary.failures else 0


def _send_windows(
    base_url: str, database: str, images: list[bytes], summary: Summary, say: Callable[[str], None]
) -> dict[str, tuple[datetime, datetime, list[str]]]:
    """Sends the images as they are, then shifted; returns bounds and prediction ids per window, all of it logged."""
    windows = {}
    for title, pictures in (("unshifted", images), ("shifted", [shifted(i, n) for n, i in enumerate(images)])):
        with stage(summary, f"{len(pictures)} {title} requests", say):
            start = datetime.now(UTC)
            ids = send_images(base_url, pictures)
            wait_until_logged(database, ids)
            windows[title] = (start, datetime.now(UTC), ids)
    return windows


def shifted(png: bytes, seed: int) -> bytes:
    """Returns an image as a worse camera gives it: darker (× 0.7), tilted by 12°, with seeded noise."""
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 12, 1.0)
    noise = np.random.default_rng(seed).normal(0, 12, image.shape)
    worse = cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REPLICATE) * 0.7 + noise
    encoded, content = cv2.imencode(".png", np.clip(worse, 0, 255).astype(np.uint8))
    if not encoded:
        raise CvPlatformError("Expected OpenCV to encode a PNG. Received: a refusal.")
    return content.tobytes()


def _config_file(settings: Settings) -> Path:
    if settings.configs.is_file():
        return settings.configs
    return settings.configs / "digits.yaml"


def _drift_report(
    settings: Settings,
    environment: dict[str, str],
    name: str,
    start: datetime,
    end: datetime,
    title: str,
    say: Callable[[str], None],
) -> DriftReport:
    window = {"window_start_utc": start.isoformat(), "window_end_utc": end.isoformat()}
    config = {"resources": {f"{name}_config": {"config": {"monitor": window}}}}
    log = settings.home / "logs" / f"demo-drift-{title}.log"
    materialize(f"key:{name}/drift_report", environment, log=log, say=say, config=config)
    return read_record(settings, name, DriftReport)


@contextmanager
def served(settings: Settings, environment: dict[str, str]) -> Iterator[str]:
    """Serves the production model on a free port; yields the base URL."""
    port = free_port()
    home = settings.home / "bentoml-demo"
    home.mkdir(exist_ok=True)
    log = settings.home / "logs" / "demo-service.log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            service_command(port),
            env={**environment, "BENTOML_HOME": str(home), "CV_SERVICE_PORT": str(port)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            base_url = f"http://127.0.0.1:{port}"
            wait_for_http(f"{base_url}/health_check", seconds=READY_SECONDS, alive=lambda: process.poll() is None)
            yield base_url
        except ServiceError as err:
            raise ServiceError(f"{err} The service's log: {log}\n{log.read_text(errors='replace')[-2000:]}") from err
        finally:
            stop_process(process)


def stop_process(process: subprocess.Popen[bytes]) -> None:
    """Ends a process by SIGTERM, and its group by force where it does not go."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def send_images(base_url: str, images: list[bytes]) -> list[str]:
    """Posts images, four at a time; returns the prediction ids, in order.

    Raises:
        ServiceError: an answer was not 200.
    """
    with httpx.Client(base_url=base_url, transport=direct_transport(base_url), timeout=30) as client:

        def predict(image: bytes) -> str:
            response = client.post("/predict", files={"file": ("digit.png", image, "image/png")})
            if response.status_code != 200:
                raise ServiceError(
                    f"Expected 200 from /predict. Received: {response.status_code}: {response.text[:500]}"
                )
            return str(response.json()["prediction_id"])

        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(predict, images))


def wait_until_logged(url: str, prediction_ids: list[str]) -> None:
    """Waits until the request log has brought the given predictions to PostgreSQL.

    Raises:
        ServiceError: it did not within `DRAIN_SECONDS`.
    """
    deadline = time.monotonic() + DRAIN_SECONDS
    while (logged := _logged(url, prediction_ids)) < len(prediction_ids):
        if time.monotonic() > deadline:
            raise ServiceError(
                f"Expected {len(prediction_ids)} predictions in PostgreSQL within {DRAIN_SECONDS:.0f} s. "
                f"Received: {logged}; the rest waits in the spool."
            )
        time.sleep(0.2)


def _logged(url: str, prediction_ids: list[str]) -> int:
    """Counts the given predictions that have a row in `predictions` joined to a 200 in `api_log`."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            statement = text(
                "SELECT count(DISTINCT p.prediction_id) FROM predictions p JOIN api_log a USING (prediction_id) "
                "WHERE a.response_status_code = 200 AND p.prediction_id = ANY(CAST(:ids AS uuid[]))"
            )
            return int(connection.execute(statement, {"ids": prediction_ids}).scalar_one())
    finally:
        engine.dispose()


def _test_images(settings: Settings, name: str) -> list[bytes]:
    """Reads the files of the test split as they lie in the dataset, in a seeded order.

    By class, as they lie, no user would send them, and drift detection that follows the order would take it for drift.
    """
    dataset = read_record(settings, name, DatasetVersion)
    manifest = pd.read_parquet(dataset.manifest_path)
    paths = manifest.loc[(manifest["split"] == "test") & (manifest["status"] == "used"), "path"]
    shuffled = np.random.default_rng(0).permutation(sorted(paths))
    return [(dataset.directory / path).read_bytes() for path in shuffled]


def read_record(settings: Settings, name: str, kind: type[_R]) -> _R:
    """Returns the latest record of an experiment; one that has none is an error."""
    record = RecordStore(settings.home, name).latest(kind)
    if record is None:
        raise CvPlatformError(f"Expected a {kind.__name__} of {name}. Received: none. Look into the log of the graph.")
    return record


@contextmanager
def stage(summary: Summary, title: str, say: Callable[[str], None]) -> Iterator[None]:
    """Says a stage's title, and notes how long it takes."""
    say(f"{title} …")
    begin = time.monotonic()
    yield
    summary.seconds[title] = time.monotonic() - begin


def _print(summary: Summary, settings: Settings, say: Callable[[str], None]) -> None:
    say("")
    say("Seconds per stage: " + ", ".join(f"{title} {seconds:.0f}" for title, seconds in summary.seconds.items()))
    for line in summary.lines:
        say(line)
    say(f"  All state lies in {settings.home}; `make up` starts the pages and stays, `rm -r {settings.home}` resets.")
    say(
        "demo: everything held."
        if not summary.failures
        else f"demo: {len(summary.failures)} statement(s) did NOT hold."
    )
    sys.stdout.flush()
