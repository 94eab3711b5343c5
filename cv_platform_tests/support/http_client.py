"""A synchronous client for an ASGI app in this process, and a model source with a model that computes by hand."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import cv2
import httpx
import numpy as np
from starlette.types import ASGIApp

from cv_platform.serving.model.probation import LiveProbation
from cv_platform.serving.model.runtime import LoadedModel, Prediction
from cv_platform_tests.support.tiny_models import tiny_metadata


class BrightnessRuntime:
    """A model whose answers can be worked out by hand: (red, green, blue) means, normalised, are the probabilities."""

    def __call__(self, images: np.ndarray, class_index: np.ndarray) -> Prediction:
        means = images.reshape(len(images), -1, 3).mean(axis=1, dtype=np.float64) + 1.0
        probabilities = (means / means.sum(axis=1, keepdims=True)).astype(np.float32)
        cam = images[:, ::4, ::4].mean(axis=3, dtype=np.float64).astype(np.float32) / 255
        features = np.repeat(probabilities[:, :1], 5, axis=1)
        return Prediction(probabilities, features, np.repeat(probabilities[:, :1], 4, axis=1), cam)


class GatedRuntime(BrightnessRuntime):
    """Answers when it is allowed to."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, images: np.ndarray, class_index: np.ndarray) -> Prediction:
        assert self.go.wait(60)
        return super().__call__(images, class_index)


def brightness_model(**changes: Any) -> LoadedModel:
    """Returns a model with classes `cat` (red), `dog` (green) and `owl` (blue)."""
    return LoadedModel(tiny_metadata(**changes), BrightnessRuntime())


@dataclass
class FixedModels:
    """A model source that always has the same model, or none."""

    model: LoadedModel | None = field(default_factory=brightness_model)
    last_swap_error: str | None = None
    on_probation: LiveProbation | None = None

    def current(self) -> LoadedModel | None:
        return self.model

    def probation(self) -> LiveProbation | None:
        return self.on_probation

    def start(self) -> None:
        return None

    def stop(self) -> None:
        return None

    def status(self) -> dict[str, Any]:
        return {"worker_id": "host-4711", "public_id": "5eaf00d1", "last_swap_error": self.last_swap_error}


@dataclass(frozen=True)
class Client:
    """Sends one request after another, each in an event loop of its own."""

    app: ASGIApp
    headers: Mapping[str, str] = field(default_factory=dict)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.together([(method, path, options)])[0]

    def together(self, requests: Iterable[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
        """Sends requests at the same time, in one event loop."""

        async def send() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://service", headers=self.headers
            ) as client:
                return await asyncio.gather(
                    *(client.request(method, path, **options) for method, path, options in requests)
                )

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def put(self, path: str, **options: Any) -> httpx.Response:
        return self.request("PUT", path, **options)

    def delete(self, path: str, **options: Any) -> httpx.Response:
        return self.request("DELETE", path, **options)

    def predict(self, image: bytes, **options: Any) -> httpx.Response:
        return self.post("/predict", files={"file": ("image.png", image, "image/png")}, **options)


@dataclass
class RawAnswer:
    """What came back for a request that no HTTP library would send."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]
    chunks_read: int


def send_raw(
    app: ASGIApp, method: str, path: str, *, headers: list[tuple[bytes, bytes]], chunks: Iterable[bytes] = (b"",)
) -> RawAnswer:
    """Sends exactly these headers and chunks; a chunk is only taken from `chunks` when the app asks for it."""
    source = iter(chunks)
    read = 0
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        nonlocal read
        try:
            chunk = next(source)
        except StopIteration:
            return {"type": "http.request", "body": b"", "more_body": False}
        read += 1
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    path_only, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path_only, "raw_path": path_only.encode(), "query_string": query.encode(), "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("service", 80),
    }  # fmt: skip
    asyncio.run(cast(Coroutine[Any, Any, None], app(scope, receive, send)))
    start = sent[0]
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return RawAnswer(start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, json.loads(body), read)


def png(image: np.ndarray) -> bytes:
    """Encodes `(H, W, 3)` uint8 RGB."""
    ok, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert ok
    return data.tobytes()


def flat_image(red: int, green: int, blue: int, *, height: int = 20, width: int = 30) -> np.ndarray:
    """Returns an image of one colour."""
    return np.full((height, width, 3), (red, green, blue), dtype=np.uint8)
