"""`python -m trials.demo_loop`: the whole loop on real images, without a manual step; judged by its own outcome.

The digits are served; then the scans of one class come from another camera (a negative, tilted, with noise). Dagster's
daemon does the rest, as in an installation: drift alarms once, the queue asks, labels arrive (simulated from the truth,
2 % wrong), a version grows, the model that is trained on it passes gate and replay and is deployed. Accuracy is
measured on scans of that camera that nobody has labelled, before and after. At the end a labeller whose labels are 40 %
wrong stops the loop. Everything happens in a folder of its own, `$CV_HOME/demo-loop-<time>` or in `build/`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import cv2
import httpx
import numpy as np
import pandas as pd
import yaml
from sqlalchemy import Engine, select

from benchmarks.harness import machine_line
from benchmarks.options import REPOSITORY
from cv_platform.audit import AuditLog
from cv_platform.client.loopback import direct_transport
from cv_platform.config import ExperimentConfig, load_experiment
from cv_platform.database.connection import database_url, make_engine
from cv_platform.database.migrate import migrate
from cv_platform.database.schema import drift_reports
from cv_platform.demo import Summary, read_record, send_images, served, shifted, stage, stop_process, wait_until_logged
from cv_platform.errors import CvPlatformError, ServiceError
from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.graph import materialize
from cv_platform.local.programs import programs
from cv_platform.monitoring.label_exchange import import_labels, read_labels_file, read_queue
from cv_platform.record_store import RecordStore
from cv_platform.records import DatasetVersion, Evaluation, LabelledVersion, Replay
from cv_platform.settings import Settings, prepare_process
from cv_platform.storage import CentralStorage

CONFIG = REPOSITORY / "configs" / "digits.yaml"
CLASS = "4"
"""Whose scans change."""
WRONG, POISONED = 0.02, 0.4
_LONGEST_WAIT_SECONDS = 900.0
_LOOK_SECONDS = 1.0
_CHANGES: dict[str, dict[str, Any]] = {
    "validate": {"deepchecks_suites": "off"},
    "monitor": {"new_rows_trigger": 300},
    "labels": {"queue_size": 300},
    "loop": {"enabled": True, "cool_down_hours": 0.0, "min_new_labels": 80, "min_new_labels_in_drift": 60},
}
"""In the demo's config: reports and labels come in minutes, not in weeks."""


class Loop:
    """An installation with a running service and daemon, and what people do to it."""

    def __init__(self, settings: Settings, config: ExperimentConfig, engine: Engine, database: str, url: str) -> None:
        self.settings, self.config, self.engine, self.database, self.url = settings, config, engine, database, url
        self.storage = CentralStorage(settings.storage_url)
        self.truth: dict[str, str] = {}
        self.unlabelled = set[UUID]()

    def send(self, images: Sequence[tuple[str, bytes]], *, is_kept_apart: bool = False) -> list[UUID]:
        """Posts images with what they show, in a seeded order, and waits until they are logged; returns their ids."""
        order = np.random.default_rng(len(self.truth)).permutation(len(images)).tolist()
        ids = send_images(self.url, [images[at][1] for at in order])
        wait_until_logged(self.database, ids)
        self.truth |= {name: images[at][0] for name, at in zip(ids, order, strict=True)}
        if is_kept_apart:
            self.unlabelled |= set(map(UUID, ids))
        return [UUID(name) for name in ids]

    def accuracy(self, images: Sequence[tuple[str, bytes]]) -> float:
        """Asks the service about images that nobody labels, and returns the share that it gets right."""
        right = 0
        with httpx.Client(base_url=self.url, transport=direct_transport(self.url), timeout=30) as client:
            for shown, content in images:
                answer = client.post("/predict", files={"file": ("digit.png", content, "image/png")}).json()
                right += answer["predicted_class"] == shown
                self.unlabelled.add(UUID(answer["prediction_id"]))
        return right / len(images)

    def label(self, ids: Sequence[UUID], labeller: str, wrong_fraction: float) -> tuple[int, int]:
        """Imports a CSV of labels as any tool would write it; returns how many, and how many are wrong."""
        generator = np.random.default_rng(len(ids))
        is_wrong = np.zeros(len(ids), dtype=bool)
        is_wrong[generator.permutation(len(ids))[: round(wrong_fraction * len(ids))]] = True
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["prediction_id", "label", "labeller"])
        for name, wrong in zip(ids, is_wrong.tolist(), strict=True):
            shown = self.truth[str(name)]
            others = [one for one in self.config.model.classes if one != shown]
            writer.writerow([name, others[int(generator.integers(len(others)))] if wrong else shown, labeller])
        labels = read_labels_file(text.getvalue().encode(), self.config.model, labeller=labeller)
        return import_labels(self.engine, self.config, labels).added, int(is_wrong.sum())

    def served_version(self) -> str:
        """Returns the version in production; empty before the first."""
        pointer = self.storage.read_pointer(self.config.deploy.service)
        return pointer.version if pointer else ""

    def verdicts(self) -> list[str]:
        """Returns the reports' verdicts, the oldest first; not those of too few requests, as the first one's."""
        told = drift_reports.c.verdict != "insufficient data"
        wanted = select(drift_reports.c.verdict).where(told).order_by(drift_reports.c.created_on)
        with self.engine.connect() as connection:
            return list(connection.execute(wanted).scalars())

    def growth(self) -> LabelledVersion | None:
        """Returns the last attempt to make the labels a version."""
        return RecordStore(self.settings.home, self.config.name).latest(LabelledVersion)


def run_loop(settings: Settings, say: Callable[[str], None]) -> int:
    """Plays the loop and returns its exit status: 0 only if every statement of its summary holds.

    Raises:
        CvPlatformError: a stage could not run at all, or did not come to its end.
    """
    config = load_experiment(settings.configs)
    summary, began = Summary(), time.monotonic()
    prepare_home(settings)
    with ExitStack() as running:
        url = running.enter_context(database_url(settings))
        migrate(url)
        alert_url, alerts = running.enter_context(_alerts())
        environment = {**platform_environment(settings, database_url=url), "CV_ALERT_URLS": alert_url}
        with stage(summary, "graph", say):
            materialize(f"key:{config.name}/*", environment, log=settings.home / "logs" / "graph.log", say=say)
        engine = make_engine(url)
        running.callback(engine.dispose)
        with stage(summary, "service and daemon", say):
            base_url = running.enter_context(served(settings, environment))
            running.enter_context(_daemon(settings, environment))
        _play(Loop(settings, config, engine, url, base_url), alerts, summary, say)
    say(f"Seconds per stage: {', '.join(f'{title} {seconds:.0f}' for title, seconds in summary.seconds.items())}")
    for line in summary.lines:
        say(line)
    say(
        f"demo-loop: {'everything held' if not summary.failures else 'NOT everything held'}, "
        f"{time.monotonic() - began:.0f} s; {machine_line(('tensorflow', 'dagster', 'bentoml'))}"
    )
    say(f"To look at it: CV_HOME={settings.home} CV_CONFIGS={settings.configs} make up")
    return 1 if summary.failures else 0


def _play(loop: Loop, alerts: list[str], summary: Summary, say: Callable[[str], None]) -> None:
    usual, other_camera, held_out = _pictures(loop)
    champion = loop.served_version()
    with stage(summary, "usual traffic", say):
        loop.send(usual)
        _wait("a report on usual traffic", lambda: loop.verdicts())
    summary.expect(loop.verdicts() == ["no drift"] and not alerts, f"{len(usual)} usual scans: no drift, no alert")
    with stage(summary, "another camera", say):
        before = loop.accuracy(held_out)
        sent = set(loop.send([*usual[: len(other_camera)], *other_camera]))
        _wait("a second report", lambda: len(loop.verdicts()) >= 2)
        # The report before has filled the queue with usual scans, which the dataset has.
        _wait(
            "a queue of them", lambda: sent & {one.prediction_id for one in read_queue(loop.engine, loop.config.name)}
        )
    summary.expect(loop.verdicts()[1:] == ["drift"], f"class {CLASS} from another camera: {loop.verdicts()[-1]}")
    with stage(summary, "labels", say):
        asked = [one.prediction_id for one in read_queue(loop.engine, loop.config.name)]
        asked = [one for one in asked if one not in loop.unlabelled]
        added, wrong = loop.label(asked, "simulated", WRONG)
    words = f"{added} came, simulated from the truth, {wrong} of them wrong"
    summary.expect(added > 0, f"the queue asked for {len(asked)} labels; {words}")
    with stage(summary, "grow, retrain, gate, replay, deployment", say):
        _wait("a new version in production", lambda: loop.served_version() not in ("", champion))
    grown, replay = loop.growth(), read_record(loop.settings, loop.config.name, Replay)
    evaluation = read_record(loop.settings, loop.config.name, Evaluation)
    summary.expect(
        grown is not None and not grown.refused,
        f"the dataset grew: {grown.tag if grown else 'no'}; {' '.join(grown.summary[:2]) if grown else ''}",
    )
    summary.expect(evaluation.passed, f"gate passed: {'; '.join(evaluation.reasons)}")
    summary.expect(replay.passed and replay.replayed > 0, f"replay passed: {'; '.join(replay.reasons)}")
    after = loop.accuracy(held_out)
    summary.expect(
        after > before,
        f"accuracy on {len(held_out)} scans of the other camera that nobody labelled: {before:.3f} before, "
        f"{after:.3f} after",
    )
    drifts = [title for title in alerts if "drift" in title]
    summary.expect(len(drifts) == 1, f"drift alarmed once: {drifts}")
    _poison(loop, alerts, summary, say)


def _poison(loop: Loop, alerts: list[str], summary: Summary, say: Callable[[str], None]) -> None:
    champion, tag = loop.served_version(), loop.growth()
    with stage(summary, "poisoned labels", say):
        ids = loop.send(_others(loop))
        added, wrong = loop.label(ids, "mallory", POISONED)
        _wait("the labels to be refused", lambda: (made := loop.growth()) is not None and made.refused)
        _wait("the alert", lambda: any("labels refused" in title for title in alerts))
    refused = loop.growth()
    suspects, stays = (refused.suspects, tag is not None and refused.tag == tag.tag) if refused else ((), False)
    summary.expect(
        suspects == ("labeller:mallory",) and stays,
        f"{added} labels, {wrong} of them wrong, are refused: suspects {suspects}, and the dataset stays as it is",
    )
    time.sleep(3 * 30)  # Three ticks of the sensor, in which nothing may follow.
    attempts = [entry.subject for entry in AuditLog(loop.settings.storage_url).entries() if entry.action == "loop"]
    summary.expect(loop.served_version() == champion, "the model in production is the one before")
    summary.expect(
        [subject.split()[1] for subject in attempts] == ["grow", "retrain", "grow"], f"the loop did no more: {attempts}"
    )
    told = [title for title in alerts if "labels refused" in title]
    summary.expect(len(told) == 1, f"people were told once: {told}")


def other_camera(png: bytes, seed: int) -> bytes:
    """Returns a scan as another camera gives it: a negative, tilted by 15°, with seeded noise."""
    return shifted(_negative(png, 15.0), seed)


def _negative(png: bytes, degrees: float) -> bytes:
    image = 255 - cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    turned = cv2.warpAffine(image, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)
    return cv2.imencode(".png", turned)[1].tobytes()


Pictures = list[tuple[str, bytes]]


def _pictures(loop: Loop) -> tuple[Pictures, Pictures, Pictures]:
    """Returns usual scans (the test split), scans of the class by the other camera, and such of test scans."""
    usual = _read(loop, lambda rows: rows["split"] == "test")
    of_class = [one for one in _read(loop, lambda rows: rows["split"] != "test") if one[0] == CLASS]
    changed = [(shown, other_camera(png, seed)) for seed, (shown, png) in enumerate(of_class)]
    held_out = [(s, other_camera(png, 1000 + seed)) for seed, (s, png) in enumerate(usual) if s == CLASS]
    return usual, changed, held_out


def _others(loop: Loop) -> Pictures:
    """Returns scans of all other classes, a little worse than the dataset's, which no version has."""
    rows = [one for one in _read(loop, lambda rows: rows["split"] == "train") if one[0] != CLASS]
    worse = [(shown, _negative(_negative(png, 0.0), -20.0)) for shown, png in rows[:150]]
    return [(shown, shifted(png, seed)) for seed, (shown, png) in enumerate(worse)]


def _read(loop: Loop, wanted: Callable[[pd.DataFrame], pd.Series]) -> Pictures:
    dataset = read_record(loop.settings, loop.config.name, DatasetVersion)
    manifest = pd.read_parquet(dataset.manifest_path)
    rows = manifest.loc[wanted(manifest) & (manifest["status"] == "used")]
    pairs = [(path, str(labels[0])) for path, labels in zip(rows["path"], rows["labels"], strict=True)]
    # In a fixed order that is none of classes; without what the dataset has grown by.
    own = sorted((one for one in pairs if "labelled-" not in one[0]), key=lambda one: _digest(one[0]))
    return [(shown, (dataset.directory / path).read_bytes()) for path, shown in own]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _wait(what: str, is_there: Callable[[], object]) -> None:
    deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
    while not is_there():
        if time.monotonic() > deadline:
            raise ServiceError(f"Expected {what} within {_LONGEST_WAIT_SECONDS:.0f} s. Received: none.")
        time.sleep(_LOOK_SECONDS)


@contextmanager
def _daemon(settings: Settings, environment: Mapping[str, str]) -> Iterator[None]:
    """Runs Dagster's daemon: schedules, sensors, the queue of runs."""
    (program,) = (one for one in programs(settings) if one.name == "dagster-daemon")
    with (settings.home / "logs" / "daemon.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            program.command,
            env=dict(environment),
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            stop_process(process)


@contextmanager
def _alerts() -> Iterator[tuple[str, list[str]]]:
    """Receives alerts on a port of its own; yields the Apprise URL, and the titles as they come."""
    titles: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            titles.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["title"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"json://127.0.0.1:{server.server_address[1]}", titles
        server.shutdown()


def loop_settings(environ: Mapping[str, str], now: datetime) -> Settings:
    """Makes the demo's folder and config, and returns its settings."""
    root = Path(environ["CV_HOME"]) if environ.get("CV_HOME") else REPOSITORY / "build"
    home = (root / f"demo-loop-{now:%Y%m%dT%H%M%SZ}").absolute()
    home.mkdir(parents=True)
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for section, fields in _CHANGES.items():
        content[section] = {**content.get(section, {}), **fields}
    (home / "digits.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return Settings.from_environment({**environ, "CV_HOME": str(home), "CV_CONFIGS": str(home / "digits.yaml")})


def main() -> int:
    """Plays the loop and returns its exit status."""
    prepare_process()
    try:
        return run_loop(loop_settings(os.environ, datetime.now(UTC)), lambda line: print(line, flush=True))
    except CvPlatformError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
