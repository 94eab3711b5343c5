"""Overload over real connections: what is too much is refused with advice, the rest is answered, health stays green."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from cv_platform.local.http import free_port
from cv_platform.serving.app import create_app
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform_tests.support.app_fixtures import MakeWorker, spooled
from cv_platform_tests.support.http_client import FixedModels, GatedRuntime, flat_image, png
from cv_platform_tests.support.tiny_models import tiny_metadata

IMAGE = png(flat_image(199, 99, 99))
CLIENTS = 60


@pytest.fixture
def runtime() -> GatedRuntime:
    return GatedRuntime()


@contextlib.contextmanager
def listening(server: uvicorn.Server) -> Iterator[None]:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(60)


def test_overload_answers_429_with_advice_while_health_stays_green(make_worker: MakeWorker, runtime: GatedRuntime):
    limits = ServingLimits(max_in_flight=8, predict_threads=2, max_batch_files=4)
    worker = make_worker(models=FixedModels(LoadedModel(tiny_metadata(), runtime)), limits=limits)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(worker), port=port, lifespan="off", log_config=None))

    async def flood() -> tuple[list[httpx.Response], list[int]]:
        no_limit = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=no_limit, timeout=60) as client,
            asyncio.timeout(120),
        ):
            while not server.started:
                await asyncio.sleep(0.02)
            images = [("files", (f"{number}.png", IMAGE)) for number in range(3)]
            tasks = [
                asyncio.create_task(
                    client.post("/predict/batch", files=images)
                    if number % 3 == 0
                    else client.post("/predict", files={"file": ("a.png", IMAGE)})
                )
                for number in range(CLIENTS)
            ]
            health: list[int] = []
            while worker.admission.in_flight.inside < 6 or sum(task.done() for task in tasks) < CLIENTS - 8:
                health.append((await client.get("/health_check")).status_code)
            runtime.go.set()
            return list(await asyncio.gather(*tasks)), health

    with listening(server):
        responses, health = asyncio.run(flood())
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200, 429}
    assert statuses[429] >= CLIENTS - 8
    assert all(int(r.headers["retry-after"]) > 0 for r in responses if r.status_code == 429)
    assert health
    assert set(health) == {200}
    images = sum(len(r.json().get("results", [None])) for r in responses if r.status_code == 200)
    assert 6 <= images <= 8
    logged = Counter(record["response_status_code"] for record in spooled(worker))
    assert logged[200] == images
    assert 1 <= logged[429] <= statuses[429], "a sample"
    admission = worker.admission
    assert admission.in_flight.inside == admission.uploads.inside == admission.small_bodies.inside == 0
