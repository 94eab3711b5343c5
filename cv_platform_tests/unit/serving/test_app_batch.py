import asyncio
import threading
from typing import Any

import httpx
import numpy as np
import pytest

from cv_platform.errors import SpoolFullError
from cv_platform.serving.app import create_app
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.serving.model.runtime import LoadedModel, Prediction
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker, spooled, spooled_images
from cv_platform_tests.support.http_client import BrightnessRuntime, Client, FixedModels, flat_image, png
from cv_platform_tests.support.tiny_models import tiny_metadata

RED, GREEN, BLUE = (png(flat_image(*colour)) for colour in ((199, 99, 99), (99, 199, 99), (99, 99, 199)))


def form(*images: bytes, names: tuple[str, ...] = ()) -> dict[str, Any]:
    named = [*names, *(f"{number}.png" for number in range(len(names), len(images)))]
    return {"files": [("files", (name, image, "image/png")) for name, image in zip(named, images, strict=True)]}


def batch(client: Client, *images: bytes, **options: Any) -> httpx.Response:
    return client.post("/predict/batch", **form(*images), **options)


def test_answers_each_image_as_predict_does_in_their_order(client: Client, worker: WorkerParts):
    response = batch(client, BLUE, RED, GREEN, RED)
    assert response.status_code == 200
    body = response.json()
    assert (body["answered"], body["failed"]) == (4, 0)
    assert [item["predicted_class"] for item in body["results"]] == ["owl", "cat", "dog", "cat"]
    assert [item["filename"] for item in body["results"]] == ["0.png", "1.png", "2.png", "3.png"]
    single = client.predict(RED).json()
    extra = {"prediction_id", "filename", "status_code"}
    assert {k: v for k, v in body["results"][1].items() if k not in extra} == {
        k: v for k, v in single.items() if k not in extra
    }
    assert single["media_type"] == "image/jpeg"
    assert len({item["prediction_id"] for item in body["results"]}) == 4
    assert worker.admission.in_flight.inside == worker.admission.uploads.inside == 0


def test_every_answered_image_is_durable_when_the_answer_arrives(client: Client, worker: WorkerParts):
    results = batch(client, RED, GREEN, params={"explain": "none"}).json()["results"]
    records = {record["prediction_id"]: record for record in spooled(worker)}
    assert set(records) == {item["prediction_id"] for item in results}
    for item in results:
        record = records[item["prediction_id"]]
        assert record["predicted_class"] == item["predicted_class"]
        assert record["request_url"] == "/predict/batch?explain=none"
        assert record["response_status_code"] == 200
    assert sorted(spooled_images(worker)) == sorted([RED, GREEN])


def test_one_broken_file_does_not_lose_the_others(client: Client, worker: WorkerParts):
    broken = [RED, b"%PDF-1.7", b"", RED[: len(RED) // 2], b"x" * 200_001, GREEN]
    response = batch(client, *broken)
    assert response.status_code == 200
    body = response.json()
    assert [item["status_code"] for item in body["results"]] == [200, 415, 400, 400, 413, 200]
    assert (body["answered"], body["failed"]) == (2, 4)
    for item in body["results"][1:5]:
        assert set(item) == {"filename", "status_code", "message", "expected"}
        assert "Expected" in item["message"]
    # Each refused image has its entry, as a refused POST /predict has.
    assert sorted(record["response_status_code"] for record in spooled(worker)) == [200, 200, 400, 400, 413, 415]


@pytest.mark.parametrize(
    ("images", "status"), [([b"no", b"image"], 415), ([b"", b""], 400), ([b"no", b""], 422), ([b""], 400)]
)
def test_a_batch_without_any_answer_has_the_status_that_its_images_share(
    client: Client, worker: WorkerParts, images: list[bytes], status: int
):
    response = batch(client, *images)
    assert response.status_code == status
    body = response.json()
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["message"].startswith(f"None of the {len(images)} images")
    assert [item["status_code"] for item in body["results"]] == [400 if image == b"" else 415 for image in images]
    assert len(spooled(worker)) == len(images)


MALFORMED: list[dict[str, Any]] = [
    {},
    {"json": {"files": []}},
    {"files": {"file": ("a.png", RED)}},
    {"files": {"files": (None, "text, not a file")}},
    {"files": [("files", ("a.png", RED)), ("files", (None, "text"))]},
    {**form(*[RED] * 5)},
    {**form(*[b"x"] * 50)},
    {**form(RED), "data": {"explain": "gif"}},
    {"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
]


@pytest.mark.parametrize("options", MALFORMED)
def test_a_wrong_form_is_refused_as_a_whole_and_logged_once(make_worker: MakeWorker, options: dict[str, Any]):
    worker = make_worker(CV_MAX_BATCH_FILES="4")
    response = Client(create_app(worker)).post("/predict/batch", **options)
    assert response.status_code == 422
    assert "results" not in response.json()
    (record,) = spooled(worker)
    assert record["response_status_code"] == 422
    assert worker.admission.in_flight.inside == worker.admission.uploads.inside == 0


def test_says_how_many_files_it_takes(make_worker: MakeWorker):
    client = Client(create_app(make_worker(CV_MAX_BATCH_FILES="2")))
    assert batch(client, RED, RED).status_code == 200
    assert "1 to 2 images" in batch(client, RED, RED, RED).json()["expected"]
    assert client.get("/health_check").json()["max_batch_files"] == 2


def test_all_files_together_are_bounded(client: Client, worker: WorkerParts):
    response = batch(client, *[b"x" * 200_000] * 9)
    assert response.status_code == 413
    assert response.json()["max_bytes"] == 8 * (200_000 + 16_384)
    assert [record["response_status_code"] for record in spooled(worker)] == [413]


def test_a_file_name_can_forge_nothing(client: Client):
    name = "a\x1b[31m\u202e" + "x" * 500 + ".png"
    (item,) = client.post("/predict/batch", **form(RED, names=(name,))).json()["results"]
    assert item["filename"].isprintable()
    assert len(item["filename"]) == 200


class WaitingRuntime(BrightnessRuntime):
    """Answers when it is allowed to, and knows how many wait for that."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.inside = 0

    def __call__(self, images: np.ndarray, class_index: np.ndarray) -> Prediction:
        self.inside += 1
        assert self.go.wait(30)
        return super().__call__(images, class_index)


def waiting(make_worker: MakeWorker, limits: ServingLimits) -> tuple[WaitingRuntime, WorkerParts]:
    runtime = WaitingRuntime()
    return runtime, make_worker(models=FixedModels(LoadedModel(tiny_metadata(), runtime)), limits=limits)


def test_each_image_takes_a_place_and_a_batch_without_room_is_refused_as_a_whole(make_worker: MakeWorker):
    runtime, worker = waiting(make_worker, ServingLimits(max_in_flight=4, predict_threads=1, max_batch_files=4))
    app = create_app(worker)

    async def overlap() -> tuple[int, list[httpx.Response]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            first = asyncio.create_task(client.post("/predict/batch", **form(RED, GREEN, BLUE)))
            async with asyncio.timeout(30):
                while not runtime.inside:
                    await asyncio.sleep(0.01)
            inside = worker.admission.in_flight.inside
            second = await client.post("/predict/batch", **form(RED, GREEN))
            third = asyncio.create_task(client.post("/predict", files={"file": ("a", RED)}))
            health = await client.get("/health_check")
            runtime.go.set()
            return inside, [await first, second, await third, health]

    inside, (first, second, third, health) = asyncio.run(overlap())
    assert inside == 3
    assert [first.status_code, second.status_code, third.status_code, health.status_code] == [200, 429, 200, 200]
    assert int(second.headers["retry-after"]) > 0
    assert worker.admission.in_flight.inside == 0


def test_no_more_images_of_a_batch_wait_for_a_thread_than_there_are_threads(make_worker: MakeWorker):
    runtime, worker = waiting(make_worker, ServingLimits(predict_threads=2))
    app = create_app(worker)
    submitted = 0
    submit = worker.admission.threads.submit

    def counted(work: Any) -> Any:
        nonlocal submitted
        submitted += 1
        return submit(work)

    worker.admission.threads.submit = counted

    async def watch() -> tuple[int, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            task = asyncio.create_task(client.post("/predict/batch", **form(*[RED] * 10)))
            async with asyncio.timeout(30):
                while runtime.inside < 2:
                    await asyncio.sleep(0.01)
            before = submitted
            runtime.go.set()
            return before, await task

    before, response = asyncio.run(watch())
    assert before == 2
    assert submitted == response.json()["answered"] == 10


def test_images_whose_turn_does_not_come_are_504s_and_give_their_places_back(make_worker: MakeWorker):
    runtime, worker = waiting(make_worker, ServingLimits(predict_threads=1, predict_seconds=0.1))
    response = batch(Client(create_app(worker)), RED, GREEN, BLUE)
    assert response.status_code == 504
    assert int(response.headers["retry-after"]) > 0
    assert [item["status_code"] for item in response.json()["results"]] == [504] * 3
    runtime.go.set()
    worker.admission.threads.submit(lambda: None).result(30)
    assert worker.admission.in_flight.inside == 0


def test_a_full_log_is_a_503_for_the_images_it_could_not_keep(
    client: Client, worker: WorkerParts, monkeypatch: pytest.MonkeyPatch
):
    taken = worker.log.opened.spool.begin
    kept: list[object] = []

    def one_only(entry: Any, **_: object) -> Any:
        if entry.prediction_id is not None and kept:
            raise SpoolFullError(f"Expected room in {worker.settings.home}. Received: none. Free space.")
        kept.append(entry)
        return taken(entry)

    monkeypatch.setattr(worker.log.opened.spool, "begin", one_only)
    response = batch(client, RED, RED, RED)
    assert response.status_code == 200
    assert sorted(item["status_code"] for item in response.json()["results"]) == [200, 503, 503]
    assert str(worker.settings.home) not in response.text
    kept.append(None)
    response = batch(client, RED, RED)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert str(worker.settings.home) in batch(client, RED, headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}).text


def test_a_defect_costs_one_image_and_names_the_request(make_worker: MakeWorker, caplog: pytest.LogCaptureFixture):
    class Broken(BrightnessRuntime):
        def __call__(self, images: np.ndarray, class_index: np.ndarray) -> Prediction:
            if images.mean() > 140:
                raise ZeroDivisionError("the secret inside")
            return super().__call__(images, class_index)

    worker = make_worker(models=FixedModels(LoadedModel(tiny_metadata(), Broken())))
    client = Client(create_app(worker), {"X-Request-Id": "abc-123"})
    response = batch(client, RED, png(flat_image(250, 250, 250)))
    assert [item["status_code"] for item in response.json()["results"]] == [200, 500]
    assert "abc-123" in response.json()["results"][1]["message"]
    assert "secret" not in response.text
    assert "the secret inside" in caplog.text
    assert worker.admission.in_flight.inside == 0


def test_the_documented_example_of_a_batch_has_the_real_fields(client: Client):
    document = client.get("/openapi.json").json()["paths"]["/predict/batch"]["post"]
    example = document["responses"]["200"]["content"]["application/json"]["example"]
    body = batch(client, RED, b"x").json()
    assert set(example) == set(body)
    for documented, real in zip(example["results"], body["results"], strict=True):
        # FastAPI leaves out what is null.
        assert set(documented) == {name for name, value in real.items() if value is not None}
