"""What the page's tests stand on: a model whose answers are known by hand, a real service with it, a real browser."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import cv2
import httpx
import numpy as np
import prometheus_client
import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from cv_platform.images import preprocess, preprocessing_hash
from cv_platform.local.http import free_port
from cv_platform.serving.app import create_app
from cv_platform.serving.model.unknown import UNKNOWN
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.worker import open_worker
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.tiny_models import tiny_metadata

if TYPE_CHECKING:
    from cv_platform.deployment.export import ExportedModel

SIDE = 48
COLOURS = {
    "cherry": (200, 40, 45),
    "lime": (60, 190, 50),
    "blueberry": (50, 70, 200),
    "lemon": (235, 225, 40),
    "ice": (60, 225, 230),
    "plum": (190, 50, 185),
}
INSECURE_HOST = "insecure.test"
"""Resolves to this machine, yet is not localhost: browsers call a page from there insecure."""
WAIT_SECONDS = 20


def drawn(*fruits: str, width: int = 640, height: int = 420) -> bytes:
    """Returns a PNG with a ball of each fruit's colour on a grey table, from left to right."""
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = np.linspace(190, 130, height, dtype=np.uint8)[:, np.newaxis, np.newaxis]
    for place, fruit in enumerate(fruits, start=1):
        centre, radius = (width * place // (len(fruits) + 1), int(height * 0.52)), height // 4
        red, green, blue = COLOURS[fruit]
        cv2.ellipse(picture, (centre[0], centre[1] + radius), (radius, radius // 5), 0, 0, 360, (105, 105, 105), -1)
        cv2.circle(picture, centre, radius, (blue, green, red), -1, cv2.LINE_AA)
        shine = (centre[0] - radius // 3, centre[1] - radius // 3)
        cv2.circle(picture, shine, radius // 7, (235, 235, 235), -1, cv2.LINE_AA)
    ok, data = cv2.imencode(".png", picture)
    assert ok
    return data.tobytes()


def export_by_hand(folder: Path) -> ExportedModel:
    """Exports a classifier that nobody trained: each channel of its feature map answers to one fruit's colour only."""
    import keras

    from cv_platform.deployment.export import export_bundle

    folder.mkdir(parents=True)
    inputs = keras.Input((SIDE, SIDE, 3), dtype="uint8", name="image")
    scaled = keras.layers.Rescaling(1 / 255)(inputs)
    colours = keras.layers.Conv2D(6, 4, strides=4, activation="relu", name="feature_map")
    pooled = keras.layers.GlobalAveragePooling2D()(colours(scaled))
    features = keras.layers.Dense(6, activation="relu", name="features")
    head = keras.layers.Dense(6, activation="softmax", name="probabilities")
    model = keras.Model(inputs, head(features(pooled)))
    # Pure colours (one sample minus both others), then mixed ones (two samples minus twice the third).
    weights = [(1, -1, -1), (-1, 1, -1), (-1, -1, 1), (1, 1, -2), (-2, 1, 1), (1, -2, 1)]
    kernel = np.tile(np.array(weights, np.float32).T / 16, (4, 4, 1, 1))
    colours.set_weights([kernel, np.array([-0.05] * 3 + [-0.8] * 3, np.float32)])
    features.set_weights([30 * np.eye(6, dtype=np.float32), np.zeros(6, np.float32)])
    head.set_weights([4 * np.eye(6, dtype=np.float32), np.zeros(6, np.float32)])
    encoded = keras.layers.Dense(4)(keras.layers.Flatten()(keras.layers.AveragePooling2D(16)(scaled)))
    keras_path, uae_path = folder / "tiny.keras", folder / "tiny_uae.keras"
    model.save(keras_path)
    keras.Model(inputs, encoded).save(uae_path)
    golden = np.stack([np.full((SIDE, SIDE, 3), colour, np.uint8) for colour in COLOURS.values()])
    exported = export_bundle(keras_path, uae_path, folder, golden_images=golden)
    write_rule(keras.Model(inputs, features.output), folder, head.get_weights())
    return exported


def write_rule(features: Any, folder: Path, head: list[np.ndarray]) -> None:
    """Writes the rule by which pictures without any fruit are unknown."""
    from cv_platform.deployment.unknown import fit_unknown

    pictures = [preprocess(drawn(fruit, width=600 + 8 * size), (SIDE, SIDE)) for fruit in COLOURS for size in range(10)]
    seen, truth = np.asarray(features(np.stack(pictures))), np.repeat(np.eye(6, dtype=np.float32), 10, axis=0)
    rule = fit_unknown(seen, truth, seen, kernel=head[0], bias=head[1])
    assert rule is not None
    rule.save(folder / UNKNOWN)


@dataclass(frozen=True)
class Service:
    """A service that answers on loopback."""

    url: str
    worker: WorkerParts

    def predict(self, image: bytes, **headers: str) -> dict[str, Any]:
        """Asks the service directly: what the page has to show."""
        response = httpx.post(
            f"{self.url}/predict", params={"explain": "cam"}, files={"file": ("x.png", image)}, headers=headers
        )
        assert response.status_code == 200, response.text
        return response.json()


Serve = Callable[..., Service]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts services, each with a home and a model version of its own, and stops them at the end."""
    folder = tmp_path_factory.mktemp("page")
    exported = export_by_hand(folder / "export")
    workers = ExitStack()
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(*, metadata: dict[str, Any] | None = None, **environment: str) -> Service:
        home = folder / f"home{len(running)}"
        storage = CentralStorage(home / "storage")
        facts = {
            "runtime": exported.runtime,
            "class_names": tuple(COLOURS),
            "image_size": exported.image_size,
            "preprocessing_hash": preprocessing_hash(exported.image_size),
            "feature_dims": exported.feature_dims,
        }
        published = storage.publish_bundle(folder / "export", tiny_metadata(**{**facts, **(metadata or {})}))
        pointer = ProductionPointer(model_name="tiny", version=published.version, since_utc=datetime.now(UTC))
        storage.write_pointer("image_classifier", pointer)
        settings = Settings.from_environment({"CV_HOME": str(home), **environment})
        opened = open_worker(settings, metrics=ServingMetrics(prometheus_client.CollectorRegistry()))
        worker = workers.enter_context(opened)
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(create_app(worker), port=port, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        deadline = threading.Event()
        for _ in range(10 * WAIT_SECONDS):
            if server.started or not thread.is_alive():
                break
            deadline.wait(0.1)
        # Else each test of the module would wait in the browser for an answer that cannot come.
        assert server.started, "Expected the service to start. Its log says why it did not."
        assert worker.models.current(), f"Expected a service with a model. Received: {worker.models.status()}"
        return Service(f"http://127.0.0.1:{port}", worker)

    yield start
    for server, _ in running:
        server.should_exit = True
    for _, thread in running:
        thread.join(WAIT_SECONDS)
    workers.close()


@pytest.fixture(scope="module")
def service(serve: Serve) -> Service:
    """An open service with a multi-class model."""
    return serve(CV_MAX_UPLOAD_BYTES="400000")


def browser_path() -> str:
    """Returns where Chromium lies."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.fail("Expected Chromium on PATH. Received: none. Install it: make browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for the module, with a camera that shows a moving test picture."""
    arguments = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--host-resolver-rules=MAP {INSECURE_HOST} 127.0.0.1",
    ]
    # Chromium refuses its sandbox to root; these pages are our own.
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    expect.set_options(timeout=1000 * WAIT_SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=arguments)
        yield browser
        browser.close()


class Visit:
    """One visitor's tabs, and everything that must never happen in them.

    Attributes:
        context: the tabs' common session.
        violations: errors and warnings on the console, uncaught exceptions, requests to other hosts.
        expected: beginnings of console lines that the test itself provokes.
    """

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.violations: list[str] = []
        # The browser's own line for an answer of 4xx or 5xx, or for a lost connection.
        self.expected: tuple[str, ...] = ("Failed to load resource",)
        context.set_default_timeout(1000 * WAIT_SECONDS)
        context.on("console", self._on_console)
        context.on("weberror", lambda error: self.violations.append(f"uncaught: {error.error}"))
        context.on("request", self._on_request)

    def open(self, url: str) -> Page:
        """Opens a tab and waits until it has said which model there is."""
        page = self.context.new_page()
        page.goto(url)
        page.locator("#model:not([data-state=unknown])").wait_for()
        return page

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not message.text.startswith(self.expected):
            self.violations.append(f"console: {message.text}")

    def _on_request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in {"data", "blob"} and parts.hostname not in {"127.0.0.1", INSECURE_HOST}:
            self.violations.append(f"request to {request.url}")


MakeVisit = Callable[..., Visit]


@pytest.fixture
def make_visit(browser: Browser) -> Iterator[MakeVisit]:
    """Makes visitors; none of them may have met a console error, a violated policy or another host."""
    visits: list[Visit] = []

    def make(**options: Any) -> Visit:
        visits.append(Visit(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})))
        return visits[-1]

    yield make
    for visit in visits:
        visit.context.close()
    violations = [violation for visit in visits for violation in visit.violations]
    if violations:
        pytest.fail("Expected a quiet page. Received:\n" + "\n".join(violations))
