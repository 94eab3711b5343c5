"""What uploads and decoded images take together is bounded in bytes; real ones are sent."""

import asyncio
import resource
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import AsyncMock

import cv2
import httpx
import numpy as np
import pytest
from starlette.types import Message

from cv_platform.serving.app import create_app
from cv_platform.serving.capacity.limits import BATCH_UPLOADS, FORM_OVERHEAD_BYTES, ServingLimits
from cv_platform.serving.capacity.memory import DECODING_BYTES_PER_PIXEL, RequestMemory
from cv_platform.serving.machine import available_memory_bytes
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.problem import Problem
from cv_platform.settings import Settings
from cv_platform_tests.support.app_fixtures import MakeWorker
from cv_platform_tests.support.http_client import Client, FixedModels, GatedRuntime, flat_image, png
from cv_platform_tests.support.tiny_models import tiny_metadata
from cv_platform_tests.support.waiting import wait_until

MEBIBYTE = 2**20


def bmp(side_px: int) -> bytes:
    ok, data = cv2.imencode(".bmp", np.zeros((side_px, side_px, 3), dtype=np.uint8))
    assert ok
    return data.tobytes()


LARGE = bmp(1_000)  # 3 MB of file; its million pixels count as 13 MB.


@pytest.fixture
def narrow(make_worker: MakeWorker) -> Client:
    """A worker of 32 MiB: 17 MB for the largest image, 16.5 MB for uploads, which is five of `LARGE`."""
    worker = make_worker(
        CV_REQUEST_MEMORY_BYTES=str(32 * MEBIBYTE), CV_MAX_UPLOAD_BYTES="4000000", CV_MAX_UPLOAD_PIXELS="1000000"
    )
    assert worker.admission.memory.uploads_bytes == 32 * MEBIBYTE - 17_000_000
    return Client(create_app(worker))


def test_uploads_beyond_the_memory_are_refused_and_the_others_answered(make_worker: MakeWorker):
    runtime = GatedRuntime()
    settings = {"CV_MAX_UPLOAD_BYTES": "4000000", "CV_MAX_UPLOAD_PIXELS": "1000000"}
    limits = ServingLimits(predict_threads=2, memory_bytes=32 * MEBIBYTE)
    worker = make_worker(models=FixedModels(LoadedModel(tiny_metadata(), runtime)), limits=limits, **settings)

    async def flood() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(worker))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client, asyncio.timeout(60):
            sent = [asyncio.create_task(client.post("/predict", files={"file": ("a.bmp", LARGE)})) for _ in range(10)]
            while sum(task.done() for task in sent) < 5:
                await asyncio.sleep(0.01)
            assert worker.admission.memory.taken_bytes <= worker.admission.memory.limit_bytes
            runtime.go.set()
            return list(await asyncio.gather(*sent))

    answers = asyncio.run(flood())
    assert Counter(answer.status_code for answer in answers) == {200: 5, 429: 5}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert worker.admission.memory.taken_bytes == 0
    assert worker.admission.in_flight.inside == worker.admission.uploads.inside == 0


def test_a_length_that_is_only_declared_takes_nothing_from_others(narrow: Client):
    headers = [(b"content-type", b"image/bmp"), (b"content-length", b"4000000")]

    async def others_answer() -> int:
        idle = Counter[str]()

        async def send_nothing() -> None:
            async def receive() -> Message:
                idle["waiting"] += 1
                await asyncio.Event().wait()
                raise AssertionError("unreachable")

            scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}
            await narrow.app(scope, receive, AsyncMock())

        transport = httpx.ASGITransport(narrow.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client, asyncio.timeout(60):
            senders = [asyncio.create_task(send_nothing()) for _ in range(4)]  # 16 of 16.5 MB.
            while idle["waiting"] < len(senders):
                await asyncio.sleep(0.01)
            answer = await client.post("/predict", files={"file": ("a.bmp", LARGE)})
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)
            return answer.status_code

    assert asyncio.run(others_answer()) == 200


@pytest.mark.parametrize("is_declared", [True, False])
def test_an_upload_that_never_fits_is_refused_for_good(make_worker: MakeWorker, is_declared: bool):
    worker = make_worker(CV_REQUEST_MEMORY_BYTES=str(16 * MEBIBYTE), CV_MAX_UPLOAD_BYTES="10000000")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield bytes(MEBIBYTE)

    content = bytes(5 * MEBIBYTE) if is_declared else chunks()
    refused = Client(create_app(worker)).post("/predict", content=content, headers={"Content-Type": "image/bmp"})
    assert refused.status_code == 413
    assert "CV_REQUEST_MEMORY_BYTES" in refused.json()["message"]
    assert worker.admission.memory.taken_bytes == 0


def test_an_image_that_could_never_be_decoded_is_refused_before_it_is(make_worker: MakeWorker):
    # An eighth of 16 MiB is for uploads, the rest decodes 1.1 megapixels.
    client = Client(create_app(make_worker(CV_REQUEST_MEMORY_BYTES=str(16 * MEBIBYTE))))
    assert client.predict(png(flat_image(1, 2, 3, height=1_000, width=1_000))).status_code == 200
    refused = client.predict(png(flat_image(1, 2, 3, height=1_200, width=1_200)))
    assert refused.status_code == 413
    assert "1440000 pixels" in refused.json()["message"]
    assert "CV_REQUEST_MEMORY_BYTES" in refused.json()["message"]


def test_a_batch_and_a_stored_image_take_and_give_back(narrow: Client):
    answer = narrow.post("/predict/batch", files=[("files", ("a.bmp", LARGE))] * 5)
    assert answer.json()["answered"] == 5
    stored = narrow.get(f"/predictions/{answer.json()['results'][0]['prediction_id']}")
    assert stored.json()["original_img"]
    refused = narrow.post("/predict/batch", files=[("files", ("a.bmp", LARGE))] * 6)
    assert refused.status_code == 413


def test_a_stored_image_that_needs_more_memory_than_there_is_now_costs_its_pictures_only(make_worker: MakeWorker):
    answer = Client(create_app(make_worker())).predict(png(flat_image(1, 2, 3, height=1_200, width=1_200)))
    smaller = Client(create_app(make_worker(CV_REQUEST_MEMORY_BYTES=str(16 * MEBIBYTE))))
    stored = smaller.get(f"/predictions/{answer.json()['prediction_id']}")
    assert stored.status_code == 200
    assert stored.json()["prediction"] == answer.json()["prediction"]
    assert stored.json()["original_img"] is None
    assert "CV_REQUEST_MEMORY_BYTES" in stored.json()["message"]


def test_a_large_image_gets_its_turn_before_small_ones_that_come_later():
    memory = RequestMemory(100 * MEBIBYTE, max_upload_bytes=MEBIBYTE, max_pixels=9 * MEBIBYTE)
    large, small = (png(flat_image(1, 2, 3, height=side, width=side)) for side in (2_400, 1_000))
    order: list[str] = []

    def decode(name: str, data: bytes) -> None:
        with memory.decoding(data, seconds=60):
            order.append(name)

    threads: list[threading.Thread] = []
    with ExitStack() as first:
        for _ in range(3):  # 39 MB; the large one needs 75 of 105.
            first.enter_context(memory.decoding(small, seconds=60))
        for name, data in (("large", large), ("small", small)):
            threads.append(threading.Thread(target=decode, args=(name, data)))
            threads[-1].start()
            wait_until(memory._turn.locked)
        assert order == []
        with pytest.raises(Problem, match="was taken for") as caught, memory.decoding(small, seconds=0.05):
            raise AssertionError("unreachable")
        assert caught.value.status_code == 503
    for thread in threads:
        thread.join(60)
    assert order == ["large", "small"]
    assert memory.taken_bytes == 0


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Lets no file of this process grow beyond 2 MiB: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MEBIBYTE, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize("is_form", [True, False])
def test_a_full_folder_for_uploads_is_a_503_that_says_so(narrow: Client, is_form: bool):
    refused = (
        narrow.predict(LARGE)
        if is_form
        else narrow.post("/predict", content=LARGE, headers={"Content-Type": "image/bmp"})
    )
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert "folder for uploads" in refused.json()["message"]
    assert narrow.predict(png(flat_image(1, 2, 3))).status_code == 200  # What fits into memory needs no disk.


def test_a_part_of_the_memory_that_the_container_may_use_is_shared_by_the_workers(tmp_path: Path):
    none, low = tmp_path / "memory.max", tmp_path / "low"
    none.write_text("max\n")
    low.write_text(f"{64 * MEBIBYTE}\n")
    machine = available_memory_bytes([none, tmp_path / "missing"])
    assert machine > 64 * MEBIBYTE
    assert available_memory_bytes([none, low]) == 64 * MEBIBYTE
    settings = Settings.from_environment({"CV_HOME": str(tmp_path), "CV_SERVICE_WORKERS": "2"})
    assert ServingLimits.of(settings, memory_bytes=2**30).memory_bytes == 5 * 2**26
    chosen = settings.model_copy(update={"request_memory_bytes": 123_456_789})
    assert ServingLimits.of(chosen).memory_bytes == 123_456_789


def test_the_containers_gibibyte_has_room_for_the_largest_image_and_the_largest_batch(tmp_path: Path):
    settings = Settings.from_environment({"CV_HOME": str(tmp_path), "CV_SERVICE_WORKERS": "1"})
    memory = RequestMemory(
        ServingLimits.of(settings, memory_bytes=2**30).memory_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        max_pixels=settings.max_upload_pixels,
    )
    assert memory.limit_bytes == 5 * 2**27
    largest = settings.max_upload_bytes + DECODING_BYTES_PER_PIXEL * settings.max_upload_pixels
    assert memory.limit_bytes - memory.uploads_bytes == largest
    assert memory.uploads_bytes >= BATCH_UPLOADS * (settings.max_upload_bytes + FORM_OVERHEAD_BYTES)
