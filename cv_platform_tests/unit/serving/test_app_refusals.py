import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any, cast

import cv2
import httpx
import numpy as np
import pytest

from cv_platform.errors import SpoolFullError
from cv_platform.serving.app import create_app
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.serving.http.access import ObserveRequests
from cv_platform.serving.http.deadline import Deadline
from cv_platform.serving.model.runtime import LoadedModel, Prediction
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker, spooled
from cv_platform_tests.support.http_client import (
    BrightnessRuntime,
    Client,
    FixedModels,
    flat_image,
    png,
    send_raw,
)
from cv_platform_tests.support.tiny_models import tiny_metadata

IMAGE = png(flat_image(10, 20, 30))
LARGE = {
    "/predict": "Shrink or recompress the image.",
    "/predict/batch": "Send fewer or smaller images.",
    "/feedback/4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11": "Send less.",
}
"""What a body of 2 MB is told."""


def jpeg() -> bytes:
    ok, data = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert ok
    return data.tobytes()


def refused(worker: WorkerParts, response: httpx.Response, status: int, *, logged: str | None = None) -> dict[str, Any]:
    """Checks a refusal and its log entry (`logged`: its message, if it is not the answer's); returns the body."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body["message"]
    assert body["expected"]
    assert response.headers["x-request-id"] == body["request_id"]
    record = spooled(worker)[-1]
    assert record["response_status_code"] == status
    assert record["response_message"] == (logged or body["message"])[:1000]
    assert record["client_error"] in {None, record["response_message"]}
    assert record["prediction_id"] is None
    assert record["timespan"] >= 0
    assert (record["client_error"] is not None) == (status < 500)
    return body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (IMAGE[: len(IMAGE) // 2], 400),
        (jpeg()[:-200], 400),
        (b"not an image at all", 415),
        (b"\x00" * 100, 415),
        (b"%PDF-1.7 ...", 415),
        (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', 415),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 50, 400),
        (b"\xff\xd8\xff\xe0", 400),
    ],
)
def test_says_what_is_wrong_with_an_upload_and_logs_it(client: Client, worker: WorkerParts, data: bytes, status: int):
    body = refused(worker, client.predict(data), status)
    assert "Expected" in body["message"]
    assert len(spooled(worker)) == 1


def test_refuses_too_many_pixels(make_worker: MakeWorker):
    worker = make_worker(CV_MAX_UPLOAD_PIXELS="599")
    client = Client(create_app(worker))
    body = refused(worker, client.predict(IMAGE), 413)
    assert "30×20 = 600" in body["message"]


def test_takes_exactly_the_largest_number_of_pixels(make_worker: MakeWorker):
    worker = make_worker(CV_MAX_UPLOAD_PIXELS="600")
    assert Client(create_app(worker)).predict(IMAGE).status_code == 200


def test_refuses_a_large_upload_by_its_length(client: Client, worker: WorkerParts):
    body = refused(worker, client.predict(b"x" * 300_000), 413)
    assert body["max_bytes"] == 200_000 + 16_384


def test_refuses_a_file_above_the_limit_that_hides_in_the_forms_allowance(client: Client, worker: WorkerParts):
    body = refused(worker, client.predict(b"x" * 200_001), 413)
    assert body["max_bytes"] == 200_000
    refused(worker, client.predict(b"x" * 200_000), 415)


def test_a_large_upload_is_told_to_shrink_its_images_and_any_other_body_only_to_be_smaller(client: Client):
    messages = {path: client.post(path, content=b"x" * 2_000_000).json()["message"] for path in LARGE}
    assert {path: message.partition("(Content-Length). ")[2] for path, message in messages.items()} == LARGE


def test_stops_reading_a_chunked_upload_at_the_limit(client: Client, worker: WorkerParts):
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for _ in range(1_000):
            taken += 1
            yield b"x" * 10_000

    response = client.post("/predict", content=endless(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    refused(worker, response, 413)
    assert taken == 22  # 21 chunks fit into 216,384 bytes; the 22nd is one too many.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"json": {"file": "abc"}},
        {"content": IMAGE, "headers": {"Content-Type": "application/png"}},
        {"content": b"file=abc", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        {"files": {"image": ("a.png", IMAGE)}},
        {"files": {"file": (None, "text, not a file")}},
        {"files": [("file", ("a.png", IMAGE)), ("file", ("b.png", IMAGE))]},
        {"files": [("file", (f"{i}.png", b"x")) for i in range(50)]},
        {"files": {"file": ("a.png", IMAGE)}, "data": {"explain": "x" * 10_000}},
        {"files": {"file": ("a.png", IMAGE)}, "data": {f"f{i}": "x" for i in range(50)}},
        {"content": b"", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        {"content": b"--x\r\n\r\n\r\n--x--", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        {"content": b"--x--", "headers": {"Content-Type": "multipart/form-data; boundary=\xe9".encode("latin-1")}},
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=" + "b" * 5_000}},
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data; charset=no-such; boundary=x"}},
    ],
)
def test_says_which_field_it_expected(client: Client, worker: WorkerParts, options: dict[str, Any]):
    refused(worker, client.post("/predict", **options), 422)


@pytest.mark.parametrize(
    ("options", "received"),
    [
        ({"data": {"explain": "gif"}}, "'gif'"),
        ({"params": {"explain": "JPEG"}}, "'JPEG'"),
        ({"params": {"explain": ""}}, "''"),
        ({"data": {"explain": '"'}}, "'\"'"),
        ({"data": {"explain": '"none'}}, "'\"none'"),
        ({"files": {"file": ("a.png", IMAGE), "explain": ("jpeg", b"jpeg")}}, "a file"),
    ],
)
def test_says_which_explain_it_received_and_logs_it_masked(
    client: Client, worker: WorkerParts, options: dict[str, Any], received: str
):
    response = client.post("/predict", **{"files": {"file": ("a.png", IMAGE)}, **options})
    expected = "explain: expected jpeg, png, cam, none. Received: "
    body = refused(worker, response, 422, logged=f"{expected}***.")
    assert body["message"] == f"{expected}{received}."


def test_a_multipart_form_inside_the_file_is_only_bytes(client: Client, worker: WorkerParts):
    inner = b'--y\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + IMAGE + b"\r\n--y--\r\n"
    response = client.post("/predict", files={"file": ("a.png", inner, "multipart/mixed; boundary=y")})
    assert "JPEG" in refused(worker, response, 415)["expected"]


@pytest.mark.parametrize(
    "filename",
    [b"a\x00b.png", b"../../etc/passwd", "日本語 😀.png".encode(), b"\xff\xfe\xfa", b"x" * 3_000, b"C:\\a.png", b""],
)
def test_the_filename_changes_nothing(client: Client, worker: WorkerParts, filename: bytes):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="'
        + filename
        + b'"\r\n\r\n'
        + IMAGE
        + b"\r\n--x--\r\n"
    )
    response = client.post("/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert response.status_code == 200
    assert len(spooled(worker)) == 1


def test_a_newline_in_the_filename_breaks_only_its_own_request(client: Client, worker: WorkerParts):
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a\r\nX-Evil: 1"\r\n\r\n'
        + IMAGE
        + b"\r\n--x--\r\n"
    )
    response = client.post("/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert response.status_code in {200, 422}
    assert "x-evil" not in response.headers
    assert spooled(worker)[-1]["response_status_code"] == response.status_code


def test_what_a_client_sends_can_be_quoted_back_and_logged_whatever_it_is(client: Client, worker: WorkerParts):
    hostile = "\x00\ud800<script>".encode("utf-8", "surrogatepass")
    logged = "explain: expected jpeg, png, cam, none. Received: ***."
    body = refused(worker, client.predict(IMAGE, params={"explain": hostile}), 422, logged=logged)
    assert "<script>" in body["message"]  # JSON, with nosniff: text, never markup.
    body = refused(worker, client.post("/predict", files={"<script>\x00": ("a.png", IMAGE)}), 422)
    assert "<script>" in body["message"]  # JSON, with nosniff: text, never markup.


def test_without_a_model_it_says_so_and_when_to_come_again(make_worker: MakeWorker):
    worker = make_worker(models=FixedModels(model=None))
    response = Client(create_app(worker)).predict(IMAGE)
    body = refused(worker, response, 503)
    assert "No model is deployed" in body["message"]
    assert int(response.headers["retry-after"]) > 0


class WaitingRuntime(BrightnessRuntime):
    """Answers when it is allowed to."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.has_ended = threading.Event()

    def __call__(self, images: np.ndarray, class_index: np.ndarray) -> Prediction:
        try:
            assert self.go.wait(30)
            return super().__call__(images, class_index)
        finally:
            self.has_ended.set()


def test_overload_is_refused_with_429_and_the_rest_is_answered(make_worker: MakeWorker):
    runtime = WaitingRuntime()
    worker = make_worker(
        models=FixedModels(LoadedModel(tiny_metadata(), runtime)),
        limits=ServingLimits(max_in_flight=3, predict_threads=1),
    )
    app = create_app(worker)

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
            tasks = [asyncio.create_task(client.post("/predict", files={"file": ("a", IMAGE)})) for _ in range(8)]
            async with asyncio.timeout(30):
                while sum(task.done() for task in tasks) < 5:
                    await asyncio.sleep(0.01)
            runtime.go.set()
            return await asyncio.gather(*tasks)

    responses = asyncio.run(flood())
    statuses = sorted(r.status_code for r in responses)
    assert statuses == [200] * 3 + [429] * 5
    assert all(int(r.headers["retry-after"]) > 0 for r in responses if r.status_code == 429)
    assert sorted(record["response_status_code"] for record in spooled(worker)) == statuses
    assert worker.admission.in_flight.inside == worker.admission.uploads.inside == 0


def test_a_late_prediction_is_a_504_and_keeps_its_place_until_its_thread_is_free(make_worker: MakeWorker):
    runtime = WaitingRuntime()
    limits = ServingLimits(max_in_flight=1, predict_threads=1, predict_seconds=0.05)
    worker = make_worker(models=FixedModels(LoadedModel(tiny_metadata(), runtime)), limits=limits)
    client = Client(create_app(worker))
    runtime.go.set()
    worker.admission.limits = ServingLimits()
    stored = client.predict(IMAGE).json()["prediction_id"]
    runtime.go.clear()
    worker.admission.limits = limits
    response = client.predict(IMAGE)
    refused(worker, response, 504)
    assert worker.admission.in_flight.inside == 1
    refused(worker, client.predict(IMAGE), 429)
    assert client.get(f"/predictions/{stored}").status_code == 429  # It decodes an image, too.
    runtime.go.set()
    worker.admission.threads.submit(lambda: None).result(30)
    assert worker.admission.in_flight.inside == 0
    assert [record["response_status_code"] for record in spooled(worker)] == [200, 504, 429]


def test_a_worker_whose_threads_never_end_is_busy_and_still_stops(make_worker: MakeWorker):
    runtime = WaitingRuntime()
    limits = ServingLimits(predict_threads=1, predict_seconds=0.05)
    worker = make_worker(models=FixedModels(LoadedModel(tiny_metadata(), runtime)), limits=limits)
    client = Client(create_app(worker))
    assert client.predict(IMAGE).status_code == 504
    health = client.get("/health_check")
    assert (health.status_code, health.json()["status"]) == (503, "busy")
    make_worker.stop(worker)
    assert not runtime.has_ended.is_set()
    runtime.go.set()


def test_a_body_that_never_ends_is_a_408(make_worker: MakeWorker):
    worker = make_worker(limits=ServingLimits(upload_seconds=0.05))

    async def stuck() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        await asyncio.sleep(30)

    response = Client(create_app(worker)).post(
        "/predict", content=stuck(), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    refused(worker, response, 408)
    assert worker.admission.uploads.inside == 0


def test_a_full_spool_is_a_503_and_no_prediction_leaves(
    client: Client, worker: WorkerParts, monkeypatch: pytest.MonkeyPatch
):
    def full(entry: object, **_: object) -> None:
        raise SpoolFullError("Expected room. Received: none. Free space.")

    monkeypatch.setattr(worker.log.opened.spool, "begin", full)
    monkeypatch.setattr(worker.log.opened.spool, "submit", full)
    response = client.predict(IMAGE)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert "prediction" not in response.json()
    health = client.get("/health_check")
    assert health.status_code == 503
    assert "request log takes no entries: full or unwritable" in health.json()["message"]
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    assert "Expected room" in client.get("/health_check", headers=admin).json()["message"]


def test_recovers_when_the_spool_has_room_again(client: Client, worker: WorkerParts):
    worker.log.append_error = "Expected room. Received: none."
    assert client.get("/health_check").status_code == 503
    assert client.predict(IMAGE).status_code == 200
    assert client.get("/health_check").status_code == 200


def test_a_defect_of_the_service_is_a_500_in_json_with_the_requests_id(make_worker: MakeWorker, caplog: Any):
    class Broken(BrightnessRuntime):
        def __call__(self, images: np.ndarray, class_index: np.ndarray) -> Prediction:
            raise ZeroDivisionError("the secret inside")

    worker = make_worker(models=FixedModels(LoadedModel(tiny_metadata(), Broken())))
    client = Client(create_app(worker), {"X-Request-Id": "abc-123"})
    body = refused(worker, client.predict(IMAGE), 500)
    assert "abc-123" in body["message"]
    assert "secret" not in body["message"]
    assert "the secret inside" in caplog.text
    assert worker.admission.in_flight.inside == 0


def test_the_wrong_method_and_unknown_paths_are_json_too(client: Client):
    response = client.get("/predict")
    assert response.status_code == 405
    assert "GET" in response.json()["message"]
    response = client.get("/no/such/page")
    assert response.status_code == 404
    assert "/docs" in response.json()["expected"]
    refused = client.request("PATCH", "/rollback")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert client.get("/page/../worker.py").status_code == 404
    assert client.get("/page/%2e%2e/worker.py").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/predict", "POST"),
        ("OPTIONS", "/predict/batch", "POST"),
        ("PATCH", "/predictions/4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11", "DELETE, GET"),
        ("PROPFIND", "/livez", "GET, HEAD"),
        ("DELETE", "/page/app.js", "GET, HEAD"),
        ("POST", "/docs", "GET"),
    ],
)
def test_what_does_not_take_a_method_names_those_that_it_takes(client: Client, method: str, path: str, allow: str):
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allow
    assert answer.json()["message"].endswith(f" does not take {method}.")
    assert allow in answer.json()["expected"]


def test_a_malformed_length_is_logged_as_well(client: Client, worker: WorkerParts):
    answer = send_raw(client.app, "POST", "/predict", headers=[(b"content-length", b"9" * 400)])
    assert answer.status == 413
    answer = send_raw(client.app, "POST", "/predict", headers=[(b"content-length", b"a lot")])
    assert answer.status == 400
    assert [record["response_status_code"] for record in spooled(worker)] == [413, 400]


def test_zeros_before_a_length_change_nothing(client: Client):
    length = b"0" * 5_000 + str(len(IMAGE)).encode()
    headers = [(b"content-type", b"image/png"), (b"content-length", length)]
    assert send_raw(client.app, "POST", "/predict", headers=headers, chunks=[IMAGE]).status == 200


def test_keeps_a_request_id_that_is_fit_for_logs(client: Client):
    for wished in ("job-7", "a.b_c-D9", "x" * 128):
        assert client.get("/health_check", headers={"X-Request-Id": wished}).headers["x-request-id"] == wished


def test_makes_a_request_id_of_its_own_otherwise(client: Client):
    for wished in ("", "x" * 129, "two words", "a\tb", "<b>", "ü".encode("latin-1")):
        made = client.get("/health_check", headers={"X-Request-Id": wished}).headers["x-request-id"]
        assert len(made) == 32, wished
        assert made != wished


def test_a_client_that_goes_away_is_no_defect(client: Client, worker: WorkerParts):
    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": b"--x\r\n", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/predict", "raw_path": b"/predict", "query_string": b"", "root_path": "", "client": None,
        "headers": [(b"content-type", b"multipart/form-data; boundary=x")], "server": None,
    }  # fmt: skip
    asyncio.run(cast(Coroutine[Any, Any, None], client.app(scope, receive, send)))
    assert sent[0]["status"] == 499
    (record,) = spooled(worker)
    assert record["response_status_code"] == 499
    assert "went away" in record["response_message"]


@pytest.mark.parametrize(("has_left", "status"), [(False, 504), (True, 499)])
def test_what_nothing_else_ends_is_a_time_out_unless_the_client_has_left(
    worker: WorkerParts, has_left: bool, status: int
):
    async def hang(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await asyncio.Event().wait()

    async def receive() -> Any:
        return {"type": "http.disconnect"} if has_left else {"type": "http.request", "body": b"", "more_body": False}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "query_string": b""}
    observed = ObserveRequests(Deadline(hang, seconds=0.01), metrics=worker.metrics, tracing=None, routes=())
    asyncio.run(observed(scope, receive, send))
    assert sent[0]["status"] == status
    counted = [
        sample.labels["status"]
        for family in worker.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "cv_http_requests_total"
    ]
    assert counted == [str(status)]
