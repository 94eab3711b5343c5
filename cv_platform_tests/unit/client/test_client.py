"""The client against the real app, in this process; what no service of ours would send comes from a scripted one."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from cv_platform.client import Client, ClientError, RequestRefusedError, ServiceUnavailableError, UnusableImageError
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker, spooled
from cv_platform_tests.support.client_of import client_of
from cv_platform_tests.support.http_client import FixedModels, flat_image, png

REDDISH = png(flat_image(199, 99, 99))


@pytest.fixture
def client(worker: WorkerParts) -> Iterator[Client]:
    with client_of(worker, admin_token=ADMIN_TOKEN, sleep=lambda seconds: None) as client:
        yield client


def test_predicts_bytes_and_files(client: Client, tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(REDDISH)
    for image in (REDDISH, path, str(path)):
        result = client.predict(image)
        assert result.predicted_class == "cat"
        assert result.prediction == {"cat": 0.5, "dog": 0.25, "owl": 0.25}
        assert isinstance(result.prediction_id, UUID)
        assert result.overlaid_img is not None
        assert base64.b64decode(result.overlaid_img)[:3] == b"\xff\xd8\xff"
    assert client.predict(REDDISH, explain="none").overlaid_img is None
    assert client.predict(REDDISH, explain="cam").cam == [[0.519] * 4] * 4


def test_an_image_that_cannot_be_used_is_an_error_with_the_services_words(client: Client, tmp_path: Path):
    for image, status, text in (
        (b"", 400, "Expected"),
        (b"no image", 415, "Expected an image"),
        (b"x" * 300_000, 413, "at most"),
        (tmp_path / "missing.png", None, "missing.png"),
    ):
        with pytest.raises(UnusableImageError, match=text) as caught:
            client.predict(image)
        assert caught.value.status_code == status


def test_what_is_too_large_without_an_image_is_no_image(client: Client):
    with pytest.raises(RequestRefusedError, match="Send less") as caught:
        client.feedback(uuid4(), "x" * 70_000)
    assert caught.value.status_code == 413


def test_a_batch_has_an_answer_or_an_error_for_each_image(client: Client, tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(REDDISH)
    first, second, third = client.predict_batch([path, b"no image", REDDISH], explain="none")
    assert [answer.filename for answer in (first, second, third)] == ["a.png", "image-2", "image-3"]
    assert first.result is not None
    assert first.result.predicted_class == "cat"
    assert second.result is None
    assert isinstance(second.error, UnusableImageError)
    assert second.error.status_code == 415
    assert third.error is None


def test_a_batch_that_is_refused_image_by_image_is_still_a_list(client: Client):
    answers = client.predict_batch([b"no", b""])
    assert all(isinstance(answer.error, UnusableImageError) for answer in answers)
    assert [answer.error and answer.error.status_code for answer in answers] == [415, 400]


def test_a_batch_that_is_refused_as_a_whole_raises(client: Client):
    with pytest.raises(RequestRefusedError, match="1 to 32 images") as caught:
        client.predict_batch([])
    assert caught.value.status_code == 422


def test_looks_up_says_and_deletes(client: Client, worker: WorkerParts):
    result = client.predict(REDDISH)
    stored = client.prediction(str(result.prediction_id))
    assert stored.prediction == result.prediction
    assert stored.original_img
    said = client.feedback(result.prediction_id, "owl", source="test")
    assert (said.true_class, said.source) == ("owl", "test")
    none = client.feedback(result.prediction_id, none_of_these=True)
    assert (none.true_class, none.none_of_these) == (None, True)
    with pytest.raises(RequestRefusedError, match="either true_class or none_of_these"):
        client.feedback(result.prediction_id, "owl", none_of_these=True)
    client.feedback(result.prediction_id, "owl", idempotency_key="mine")
    with pytest.raises(RequestRefusedError, match="another statement"):
        client.feedback(result.prediction_id, "dog", idempotency_key="mine")
    assert client.delete_prediction(result.prediction_id).prediction_id == result.prediction_id
    with pytest.raises(RequestRefusedError, match="cow"):
        client.feedback(client.predict(REDDISH).prediction_id, "cow")
    with pytest.raises(RequestRefusedError, match="prediction_id"):
        client.prediction("../../etc/passwd")


def test_shows_models_and_health_and_refuses_what_cannot_be_promoted(client: Client, worker: WorkerParts):
    assert client.models_current().workers == []
    assert client.health().status == "ready"
    with pytest.raises(RequestRefusedError, match="tiny") as missing:
        client.update_model("tiny")
    assert missing.value.status_code == 404
    with pytest.raises(RequestRefusedError):
        client.update_model("../tiny")
    with pytest.raises(RequestRefusedError, match="nothing was deployed") as first:
        client.rollback()
    assert first.value.status_code == 409


def test_health_of_a_worker_that_is_not_ready_is_an_answer_too(make_worker: MakeWorker):
    with client_of(make_worker(models=FixedModels(model=None))) as client:
        assert client.health().status == "not ready"


def test_sends_its_key_and_only_admin_routes_get_the_token(make_worker: MakeWorker):
    worker = make_worker(CV_API_KEYS="my-key")
    with client_of(worker, api_key="my-key") as client:
        assert client.predict(REDDISH).predicted_class == "cat"
        with pytest.raises(RequestRefusedError, match="admin token") as caught:
            client.rollback()
        assert caught.value.status_code == 401
    with client_of(worker, api_key="wrong") as client, pytest.raises(RequestRefusedError, match="X-API-Key"):
        client.predict(REDDISH)


class Script:
    """Answers what it is told to, and remembers what was asked and waited for."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.waited: list[float] = []

    def client(self, **options: Any) -> Client:
        transport = httpx.MockTransport(self._answer)
        return Client("http://service", transport=transport, sleep=self.waited.append, **options)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def refusal(status: int, **headers: str) -> httpx.Response:
    body = {"message": f"refused with {status}", "expected": "patience", "request_id": "r-1"}
    return httpx.Response(status, json=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def kept() -> httpx.Response:
    return httpx.Response(
        200, json={"prediction_id": str(uuid4()), "true_class": "a", "source": "client", "message": "ok"}
    )


def test_comes_again_when_the_service_says_and_as_the_same_statement():
    script = Script(refusal(429, retry_after="7"), refusal(503, retry_after="2"), kept())
    with script.client() as client:
        assert client.feedback(uuid4(), "a").message == "ok"
    assert script.waited == [7.0, 2.0]
    assert len({request.headers["idempotency-key"] for request in script.requests}) == 1
    assert [json.loads(request.content) for request in script.requests] == [{"true_class": "a", "source": "client"}] * 3


@pytest.mark.parametrize("header", [{}, {"retry_after": "soon"}, {"retry_after": "nan"}])
def test_waits_longer_each_time_where_no_time_is_named(header: dict[str, str]):
    script = Script(*[refusal(503, **header) for _ in range(4)])
    with script.client() as client, pytest.raises(ServiceUnavailableError, match=r"refused with 503 \(request r-1\)"):
        client.models_current()
    assert script.waited == [0.5, 1.0, 2.0]


def test_gives_up_after_its_retries_with_the_services_words():
    script = Script(*[refusal(429, retry_after="1") for _ in range(2)])
    with script.client(retries=1) as client, pytest.raises(ServiceUnavailableError, match="refused with 429"):
        client.predict(b"x")
    assert script.waited == [1.0]


def test_does_not_wait_for_longer_than_it_was_told():
    script = Script(refusal(503, retry_after="3600"))
    with script.client() as client, pytest.raises(ServiceUnavailableError):
        client.predict(b"x")
    assert script.waited == []


@pytest.mark.parametrize(
    "answer", [refusal(504), refusal(500), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("cut off")]
)
def test_does_not_repeat_what_the_service_may_have_done(answer: httpx.Response | Exception):
    script = Script(answer)
    with script.client() as client, pytest.raises(ServiceUnavailableError):
        client.predict(b"x")
    assert len(script.requests) == 1


def test_repeats_what_never_reached_the_service():
    script = Script(httpx.ConnectError("refused"), kept())
    with script.client() as client:
        client.feedback(uuid4(), "a")
    assert script.waited == [0.5]
    script = Script(*[httpx.ConnectError("refused") for _ in range(4)])
    with script.client() as client, pytest.raises(ServiceUnavailableError, match="http://service"):
        client.models_current()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refusal(409, retry_after="5"), ServiceUnavailableError),
        (refusal(409), RequestRefusedError),
        (refusal(404), RequestRefusedError),
        (refusal(403), RequestRefusedError),
        (httpx.Response(502, text="<html>Bad Gateway</html>"), ServiceUnavailableError),
        (httpx.Response(200, text="<html>another server</html>"), ServiceUnavailableError),
        (httpx.Response(200, text="[" * 100_000), ServiceUnavailableError),
        (
            httpx.Response(200, json={"service": "a", "production": {"version": 3}, "message": ""}),
            ServiceUnavailableError,
        ),
    ],
)
def test_each_refusal_of_an_update_is_the_error_of_its_kind(answer: httpx.Response, kind: type[ClientError]):
    with Script(answer).client() as client, pytest.raises(kind) as caught:
        client.update_model("tiny", "20260101T000000Z-0000000a")
    assert type(caught.value) is kind
    assert caught.value.status_code == answer.status_code


def test_a_malformed_request_is_no_unusable_image():
    with Script(refusal(400)).client() as client, pytest.raises(RequestRefusedError, match="refused with 400"):
        client.predict(REDDISH)


def test_a_refused_image_that_is_sent_again_leaves_one_row_for_each_attempt(make_worker: MakeWorker):
    models = FixedModels(model=None)
    worker = make_worker(models=models)
    ready = FixedModels().model

    def deploy(seconds: float) -> None:
        models.model = ready

    with client_of(worker, sleep=deploy) as client:
        result = client.predict(REDDISH)
    records = spooled(worker)
    assert [record["response_status_code"] for record in records] == [503, 200]
    assert [record["prediction_id"] for record in records] == [None, str(result.prediction_id)]
