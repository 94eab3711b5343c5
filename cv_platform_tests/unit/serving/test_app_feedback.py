import base64
import unicodedata
from typing import Any, Literal
from uuid import uuid4

import cv2
import numpy as np
import pytest

from cv_platform.serving.app import create_app
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import MakeWorker, spooled, spooled_images
from cv_platform_tests.support.http_client import Client, FixedModels, brightness_model, flat_image, png

REDDISH = png(flat_image(199, 99, 99))


@pytest.fixture
def prediction_id(client: Client) -> str:
    return client.predict(REDDISH, params={"explain": "none"}).json()["prediction_id"]


def statements(worker: WorkerParts) -> list[dict[str, Any]]:
    return [record for record in spooled(worker) if "true_class" in record]


def test_keeps_what_a_person_says_before_it_answers(client: Client, worker: WorkerParts, prediction_id: str):
    response = client.post(f"/feedback/{prediction_id}", json={"true_class": "owl", "source": "page"})
    assert response.status_code == 200
    said = {"prediction_id": prediction_id, "true_class": "owl", "none_of_these": False, "source": "page"}
    assert response.json() == {**said, "message": "ok"}
    (statement,) = statements(worker)
    assert (statement["prediction_id"], statement["true_class"], statement["source"]) == (prediction_id, "owl", "page")


def test_a_statement_with_a_key_is_kept_once_however_often_it_is_sent(
    client: Client, worker: WorkerParts, prediction_id: str
):
    answers = [
        client.post(f"/feedback/{prediction_id}", json={"true_class": "owl"}, headers={"Idempotency-Key": "click-1"})
        for _ in range(3)
    ]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json() == answers[1].json() == answers[2].json()
    assert [said["true_class"] for said in statements(worker)] == ["owl"]
    # Another prediction's statement is another one, whatever its key.
    other = client.predict(REDDISH).json()["prediction_id"]
    client.post(f"/feedback/{other}", json={"true_class": "dog"}, headers={"Idempotency-Key": "click-1"})
    assert len({said["entry_id"] for said in statements(worker)}) == 2


def test_without_a_key_each_request_counts_also_with_one_request_id(
    client: Client, worker: WorkerParts, prediction_id: str
):
    for said in ("owl", "dog", "owl"):
        client.post(f"/feedback/{prediction_id}", json={"true_class": said}, headers={"X-Request-Id": "batch-job"})
    kept = statements(worker)
    assert [statement["true_class"] for statement in kept] == ["owl", "dog", "owl"]
    assert len({statement["entry_id"] for statement in kept}) == 3  # The database ignores an id that it has.


@pytest.mark.parametrize(
    "other", [{"true_class": "dog"}, {"true_class": "owl", "source": "b"}, {"none_of_these": True}]
)
def test_a_key_that_came_with_another_statement_is_refused(
    client: Client, worker: WorkerParts, prediction_id: str, other: dict[str, Any]
):
    key = {"Idempotency-Key": "a1"}
    client.post(f"/feedback/{prediction_id}", json={"true_class": "owl"}, headers=key)
    refused = client.post(f"/feedback/{prediction_id}", json=other, headers=key)
    assert refused.status_code == 422
    assert "another statement" in refused.json()["message"]
    assert [said["true_class"] for said in statements(worker)] == ["owl"]


@pytest.mark.parametrize("key", ["", "two words", "x" * 256, "ü".encode("latin-1")])
def test_a_key_is_a_word_of_visible_characters(client: Client, worker: WorkerParts, prediction_id: str, key: Any):
    response = client.post(f"/feedback/{prediction_id}", json={"true_class": "owl"}, headers={"Idempotency-Key": key})
    assert response.status_code == 422
    assert "idempotency-key" in response.json()["message"]
    assert statements(worker) == []


@pytest.mark.parametrize("classifier_type", ["multi-class", "multi-label"])
def test_an_image_may_show_none_of_the_classes(make_worker: MakeWorker, classifier_type: str):
    worker = make_worker(models=FixedModels(brightness_model(classifier_type=classifier_type)))
    client = Client(create_app(worker))
    prediction_id = client.predict(REDDISH).json()["prediction_id"]
    response = client.post(f"/feedback/{prediction_id}", json={"none_of_these": True, "source": "page"})
    assert response.status_code == 200
    assert (response.json()["true_class"], response.json()["none_of_these"]) == (None, True)
    (statement,) = statements(worker)
    assert (statement["true_class"], statement["source"]) == ("", "page")


@pytest.mark.parametrize(
    "said",
    [{}, {"none_of_these": False}, {"true_class": "owl", "none_of_these": True}, {"none_of_these": "true"},
     {"none_of_these": 1}, {"true_class": "none_of_these"}],
)  # fmt: skip
def test_says_a_class_or_none_of_these_and_not_both(
    client: Client, worker: WorkerParts, prediction_id: str, said: dict[str, Any]
):
    assert client.post(f"/feedback/{prediction_id}", json=said).status_code == 422
    assert statements(worker) == []


def test_refuses_a_class_that_the_model_does_not_have(client: Client, worker: WorkerParts, prediction_id: str):
    for true_class in ("cow", "CAT", "cat ", "cat|cow", "", "\u0000", "x" * 5_000):
        response = client.post(f"/feedback/{prediction_id}", json={"true_class": true_class})
        assert response.status_code == 422, true_class
    assert statements(worker) == []


def test_says_which_classes_there_are(client: Client, prediction_id: str):
    body = client.post(f"/feedback/{prediction_id}", json={"true_class": "cow"}).json()
    assert body["classes"] == ["cat", "dog", "owl"]
    assert "cow" in body["message"]


def test_takes_several_classes_of_a_multi_label_model(make_worker: MakeWorker):
    worker = make_worker(models=FixedModels(brightness_model(classifier_type="multi-label")))
    client = Client(create_app(worker))
    prediction_id = client.predict(REDDISH).json()["prediction_id"]
    assert client.post(f"/feedback/{prediction_id}", json={"true_class": "cat|owl"}).status_code == 200


@pytest.mark.parametrize("classifier_type", ["multi-class", "multi-label"])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_accent_may_be_sent_in_either_form_and_is_kept_in_the_models(
    make_worker: MakeWorker, classifier_type: str, form: Literal["NFC", "NFD"]
):
    names = ("caf\u00e9", "dog", "cre\u0302pe")  # The third as a model has it that was trained from macOS' folders.
    worker = make_worker(models=FixedModels(brightness_model(classifier_type=classifier_type, class_names=names)))
    client = Client(create_app(worker))
    prediction_id = client.predict(REDDISH).json()["prediction_id"]
    said = list(names) if classifier_type == "multi-class" else ["|".join(names)]
    for true_class in said:
        sent = {"true_class": unicodedata.normalize(form, true_class)}
        assert client.post(f"/feedback/{prediction_id}", json=sent).json()["true_class"] == true_class
    assert [statement["true_class"] for statement in statements(worker)] == said


MALFORMED = [
    b"", b"{", b"[]", b'"owl"', b"{}", b'{"true_class": 3}', b'{"true_class": "owl", "extra": 1}',
    b'{"true_class": "\\ud800"}', b'{"true_class": "owl", "source": "a\\u0000b"}',
    b'{"true_class": "owl", "source": "<script>"}', b"[" * 50_000, b"\xff\xfe", b"NaN",
]  # fmt: skip


def test_a_malformed_statement_is_refused_and_never_a_5xx(client: Client, prediction_id: str):
    for content in MALFORMED:
        response = client.post(
            f"/feedback/{prediction_id}", content=content, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in {400, 422}, content[:80]
        assert response.json()["message"]


def test_a_large_statement_is_refused_before_it_is_read(client: Client, prediction_id: str):
    response = client.post(f"/feedback/{prediction_id}", content=b" " * 70_000)
    assert response.status_code == 413


def test_an_id_is_a_uuid(client: Client):
    for bad in ("1", "x" * 36, "4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f1", "' OR 1=1--"):
        assert client.post(f"/feedback/{bad}", json={"true_class": "cat"}).status_code == 422, bad
        assert client.get(f"/predictions/{bad}").status_code == 422, bad


def test_only_a_multi_label_model_takes_several_classes(client: Client, worker: WorkerParts, prediction_id: str):
    for path in (prediction_id, uuid4()):
        for said in ("owl|owl|owl", "cat|owl", "owl|"):
            assert client.post(f"/feedback/{path}", json={"true_class": said}).status_code == 422, said
    assert statements(worker) == []


def test_lists_no_more_than_twenty_mistakes(client: Client, prediction_id: str):
    said = {"true_class": "owl"} | {f"f{i}": 1 for i in range(100)}
    body = client.post(f"/feedback/{prediction_id}", json=said).json()
    assert len(body["errors"]) == 20
    assert "and 80 more" in body["message"]


def test_no_more_look_ups_than_the_gate_admits(client: Client, worker: WorkerParts):
    while worker.calls.look_ups.gate.enter():
        pass
    assert client.get(f"/predictions/{uuid4()}").status_code == 429
    assert client.get("/health_check").status_code == 200


def test_feedback_without_a_database_is_kept_and_says_what_was_not_checked(client: Client, worker: WorkerParts):
    response = client.post(f"/feedback/{uuid4()}", json={"true_class": "owl"})
    assert response.status_code == 202
    assert "could not be checked" in response.json()["message"]
    assert len(statements(worker)) == 1
    assert client.post(f"/feedback/{uuid4()}", json={"true_class": "cow"}).status_code == 422


def test_reading_without_a_database_is_a_503(client: Client):
    for path in ("", "/passport"):
        response = client.get(f"/predictions/{uuid4()}{path}")
        assert response.status_code == 503
        assert response.headers["retry-after"]


def test_shows_a_result_again_with_its_pictures(client: Client):
    first = client.predict(REDDISH, params={"explain": "png"}).json()
    response = client.get(f"/predictions/{first['prediction_id']}")
    assert response.status_code == 200
    again = response.json()
    for name in ("prediction_id", "model_name", "model_version", "classifier_type", "predicted_class", "prediction"):
        assert again[name] == first[name]
    assert list(again["prediction"]) == ["cat", "dog", "owl"]
    assert again["cam"] == [[0.519] * 4] * 4
    assert again["created_on"].endswith("+00:00")
    assert again["media_type"] == "image/jpeg"
    pictures = [
        cv2.imdecode(np.frombuffer(base64.b64decode(again[name]), np.uint8), cv2.IMREAD_COLOR)
        for name in ("original_img", "overlaid_img", "raw_hm_img")
    ]
    assert [picture.shape for picture in pictures] == [(171, 256, 3)] * 3
    np.testing.assert_allclose(pictures[0][80, 100], (99, 99, 199), atol=3)


def test_shows_a_result_whose_image_was_not_kept(make_worker: MakeWorker):
    client = Client(create_app(make_worker(CV_LOG_IMAGES="none")))
    first = client.predict(REDDISH).json()
    again = client.get(f"/predictions/{first['prediction_id']}").json()
    assert again["prediction"] == first["prediction"]
    assert again["overlaid_img"] is again["original_img"] is None
    assert "not kept" in again["message"]


def test_deletes_a_prediction_that_is_still_in_the_spool_but_not_its_request(
    client: Client, admin: Client, worker: WorkerParts, prediction_id: str
):
    client.post(f"/feedback/{prediction_id}", json={"true_class": "owl"})
    assert admin.delete(f"/predictions/{prediction_id}").status_code == 200
    assert spooled_images(worker) == []
    (record,) = spooled(worker)
    assert record["prediction_id"] is None
    assert record["response_status_code"] == 200
    assert not {"predicted_class", "prediction_json", "image_sha256"} & set(record)
    assert client.get(f"/predictions/{prediction_id}").status_code == 503
    assert b"199" not in record["request_url"].encode()


def test_keeps_an_image_that_another_prediction_in_the_spool_has(
    client: Client, admin: Client, worker: WorkerParts, prediction_id: str
):
    other = client.predict(REDDISH).json()["prediction_id"]
    admin.delete(f"/predictions/{prediction_id}")
    assert spooled_images(worker) == [REDDISH]
    assert client.get(f"/predictions/{other}").json()["overlaid_img"]
    admin.delete(f"/predictions/{other}")
    assert spooled_images(worker) == []


@pytest.mark.parametrize(
    "path", ["/feedback/predict", "/feedback/4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11", "/x/predict/batch"]
)
def test_only_uploads_may_be_large(client: Client, path: str):
    response = client.post(path, content=b"[" * 100_000, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["max_bytes"] == 65_536


@pytest.mark.parametrize(
    ("content", "content_type", "said"),
    [
        (b'{"true_class": "owl"', "application/json", "body: Invalid JSON"),
        (b'["owl"]', "application/json", "body: Input should be an object"),
        (b'{"true_class": "owl", "sauce": "me"}', "application/json", "body.sauce: Extra inputs"),
        (b'{"true_class": "owl", "source": "<script>"}', "application/json", "body.source: String should match"),
        (b"", "application/json", "body: Invalid JSON"),
        (b'{"true_class": "owl"}', "text/plain", "Expected JSON"),
    ],
)
def test_says_what_is_wrong_with_a_statement(
    client: Client, worker: WorkerParts, prediction_id: str, content: bytes, content_type: str, said: str
):
    response = client.post(f"/feedback/{prediction_id}", content=content, headers={"Content-Type": content_type})
    assert response.status_code == 422
    assert said in response.json()["message"]
    assert statements(worker) == []
