"""The service in one process with its caller, as BentoML's users test theirs: `to_asgi()`, and endpoints as methods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cv_platform_tests.support.app_fixtures import spooled_at
from cv_platform_tests.support.http_client import flat_image, png

REPOSITORY = Path(__file__).parents[2]
IMAGE = png(flat_image(200, 30, 30))
BEGIN = """
import asyncio, json, os, sys, warnings
from pathlib import Path
with warnings.catch_warnings(action="ignore"):  # It would rather have another HTTP library.
    from starlette.testclient import TestClient
import cv_platform.serving.worker as worker
from cv_platform_tests.support.app_fixtures import spooled_at
from cv_platform_tests.support.http_client import FixedModels
worker.ModelHolder = lambda *args, **options: FixedModels()  # The model that computes by hand.
from bentos.image_classifier.service import ImageClassifier
image = Path(sys.argv[1])
said = {}
"""
pytestmark = pytest.mark.timeout(120)


def said_by(program: str, folder: Path, **variables: str) -> dict[str, Any]:
    """Runs a program after BEGIN, whose installation is `folder`, and returns what it has put into `said`."""
    image = folder / "red.png"
    image.write_bytes(IMAGE)
    inherited = {n: v for n, v in os.environ.items() if not n.startswith("CV_") and n != "DATABASE_URL"}
    done = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}{program}\nprint(json.dumps(said))", str(image)],
        cwd=REPOSITORY,
        env={**inherited, "CV_HOME": str(folder), "BENTOML_HOME": str(folder / "bentoml"), **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def logged(folder: Path) -> set[str]:
    return {record["prediction_id"] for record in spooled_at(folder) if record.get("prediction_id")}


def test_to_asgi_has_the_routes_behind_our_layers(tmp_path: Path) -> None:
    said = said_by(
        """
app = ImageClassifier.to_asgi()
said["routes"] = [route.path for route in app.routes]
with TestClient(app) as client:
    for path in ("/readyz", "/livez", "/metrics", "/schema.json", "/docs.json", "/openapi.json", "/", "/nothing"):
        answer = client.get(path)
        said[path] = [answer.status_code, answer.headers["X-Content-Type-Options"], answer.text[:200_000]]
    said["ours"] = client.post("/predict", files={"file": image.read_bytes()}, data={"explain": "none"}).json()
    said["bentomls"] = client.post("/predict", files={"file": image.read_bytes()}, data={"explain": '"cam"'}).json()
with TestClient(ImageClassifier.to_asgi()) as client:  # Another one, once the first has stopped.
    said["again"] = client.get("/readyz").status_code
""",
        tmp_path,
    )
    assert {"/predict", "/predict/batch", "/feedback", "/schema.json", "/docs.json", "/readyz"} <= set(said["routes"])
    statuses = {path: answer[0] for path, answer in said.items() if path.startswith("/")}
    assert statuses == {path: 404 if path == "/nothing" else 200 for path in statuses}
    assert {answer[1] for path, answer in said.items() if path.startswith("/")} == {"nosniff"}
    assert (said["/readyz"][2], said["again"]) == ("\n", 200)
    for answer in (said["ours"], said["bentomls"]):
        assert answer["predicted_class"] == "cat"
        assert answer["prediction_id"] in logged(tmp_path)


def test_an_endpoint_that_somebody_adds_is_behind_our_keys_and_limits(tmp_path: Path) -> None:
    said = said_by(
        """
import bentoml
@bentoml.api
async def shout(self, word: str) -> str:
    return word.upper()
ImageClassifier.inner.shout = shout
ImageClassifier.apis["shout"] = shout
key = {"Authorization": "Bearer first-key"}
with TestClient(ImageClassifier.to_asgi()) as client:
    for name, word, headers in (("stranger", "a", {}), ("known", "a", key), ("large", "a" * 100_000, key)):
        answer = client.post("/shout", json={"word": word}, headers=headers)
        said[name] = [answer.status_code, answer.text, answer.headers["X-Frame-Options"]]
""",
        tmp_path,
        CV_API_KEYS="first-key",
    )
    assert said["known"] == [200, "A", "DENY"]
    assert (said["stranger"][0], said["large"][0]) == (401, 413)
    assert {answer[2] for answer in said.values()} == {"DENY"}


def test_a_request_leaves_no_timer_behind(tmp_path: Path) -> None:
    said = said_by(
        """
import httpx
app = ImageClassifier.to_asgi()
async def count():
    loop = asyncio.get_running_loop()
    live = lambda: sum(not handle.cancelled() for handle in loop._scheduled)
    before = live()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for path in ["/livez", "/models/current", "/schema.json", "/nothing"] * 50:
            await client.get(path)
        for _ in range(5):
            await client.post("/predict", files={"file": image.read_bytes()})
    return live() - before
with TestClient(app) as client:
    said["timers"] = client.portal.call(count)
""",
        tmp_path,
    )
    # BentoML's time-out alone would have left 205.
    assert said["timers"] < 5


def test_bentomls_documents_describe_our_routes_too(tmp_path: Path) -> None:
    said = said_by(
        """
with TestClient(ImageClassifier.to_asgi()) as client:
    said = client.get("/docs.json").json()["paths"]
    assert client.get("/docs.json").json()["paths"] == said
""",
        tmp_path,
    )
    assert {"/predict", "/feedback", "/feedback/{prediction_id}", "/rollback", "/readyz", "/metrics"} <= said.keys()
    assert set(said["/predict"]["post"]["requestBody"]["content"]) == {"multipart/form-data", "image/*"}


def test_the_methods_answer_and_log_as_the_routes_do(tmp_path: Path) -> None:
    said = said_by(
        """
service = ImageClassifier()
async def ask():
    said["one"] = await service.predict(file=image, explain="png")
    said["logged"] = [record.get("prediction_id") for record in spooled_at(Path(os.environ["CV_HOME"]))]
    said["batch"] = await service.predict_batch(files=[image, Path("pyproject.toml")])
    said["feedback"] = await service.feedback(prediction_id=said["one"]["prediction_id"], true_class="owl")
    for name, call in {
        "no image": lambda: service.predict(file=Path("pyproject.toml")),
        "too large": lambda: service.predict(file=Path("requirements.lock")),
        "no files": lambda: service.predict_batch(files=[]),
        "no class": lambda: service.feedback(prediction_id=said["one"]["prediction_id"], true_class="cow"),
        "no id": lambda: service.feedback(prediction_id="seven", true_class="owl"),
        "over the rate": lambda: service.predict_batch(files=[image] * 6),
    }.items():
        try:
            await call()
        except Exception as err:
            said[name] = f"{type(err).__name__}: {err}"
asyncio.run(ask())
service.stop()
""",
        tmp_path,
        CV_MAX_UPLOAD_BYTES="20000",
        CV_RATE_LIMIT_PER_MINUTE="9",
    )
    assert said["logged"] == [said["one"]["prediction_id"]]  # Before the answer left.
    assert said["one"]["predicted_class"] == "cat"
    assert said["one"]["media_type"] == "image/png"
    good, bad = said["batch"]["results"]
    assert (good["status_code"], bad["status_code"], said["batch"]["failed"]) == (200, 415, 1)
    assert {said["one"]["prediction_id"], good["prediction_id"]} == logged(tmp_path)
    assert said["feedback"]["true_class"] == "owl"
    assert said["no image"].startswith("UnsupportedImageError: Expected an image")
    assert said["too large"].startswith("Problem: Expected at most 20000 bytes")
    assert "1 to 9 images" in said["no files"]
    assert "true_class: expected one of the model's classes (cat, dog, owl)" in said["no class"]
    assert said["no id"].startswith("ValidationError")
    assert "More than 9 images per minute" in said["over the rate"]
    refused = [record for record in spooled_at(tmp_path) if (record.get("response_status_code") or 200) != 200]
    assert [record["response_status_code"] for record in refused] == [415, 415, 413, 422, 429]
