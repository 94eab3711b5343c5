"""The log's way to a real PostgreSQL, seen through the routes."""

import base64

import cv2
import numpy as np
import pytest
from sqlalchemy import Engine, text

from cv_platform.images import Preprocessing, preprocessing_hash
from cv_platform.serving.app import create_app
from cv_platform.serving.model.runtime import LoadedModel
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker
from cv_platform_tests.support.http_client import BrightnessRuntime, Client, FixedModels, flat_image, png
from cv_platform_tests.support.log_entries import wait_until_drained
from cv_platform_tests.support.tiny_models import tiny_metadata

REDDISH = png(flat_image(199, 99, 99))


@pytest.fixture
def logged(make_worker: MakeWorker, database_url: str) -> WorkerParts:
    return make_worker(DATABASE_URL=database_url)


@pytest.fixture
def client(logged: WorkerParts) -> Client:
    return Client(create_app(logged), {"Authorization": f"Bearer {ADMIN_TOKEN}"})


def drain(worker: WorkerParts) -> None:
    wait_until_drained(worker.log.opened)


def count(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()


def test_every_answer_and_refusal_has_its_row(client: Client, logged: WorkerParts, engine: Engine):
    answered = [client.predict(REDDISH).json()["prediction_id"] for _ in range(3)]
    client.predict(b"")
    client.predict(b"x" * 300_000)
    client.post("/predict", json={})
    drain(logged)
    with engine.connect() as connection:
        joined = connection.execute(
            text(
                "SELECT p.prediction_id::text, p.predicted_class, a.response_status_code FROM predictions p "
                "JOIN api_log a USING (prediction_id) ORDER BY a.created_on"
            )
        ).all()
        refused = (
            connection.execute(
                text("SELECT response_status_code FROM api_log WHERE prediction_id IS NULL ORDER BY created_on")
            )
            .scalars()
            .all()
        )
    assert [tuple(row) for row in joined] == [(prediction_id, "cat", 200) for prediction_id in answered]
    assert refused == [400, 413, 422]
    assert count(engine, "images") == 1
    assert client.get("/health_check").json()["database"] == {"state": "ok", "error": None}


def test_a_deep_upload_is_answered_and_shown_by_the_bits_of_its_model(make_worker: MakeWorker, database_url: str):
    made = preprocessing_hash((16, 16), Preprocessing(sample_bits=12))
    models = FixedModels(LoadedModel(tiny_metadata(preprocessing_hash=made), BrightnessRuntime()))
    worker = make_worker(DATABASE_URL=database_url, models=models)
    client = Client(create_app(worker), {"Authorization": f"Bearer {ADMIN_TOKEN}"})
    deep = flat_image(199, 99, 99)[..., ::-1].astype(np.uint16) * 16 + 7
    for suffix in (".png", ".tiff"):
        answered = client.predict(cv2.imencode(suffix, deep)[1].tobytes()).json()
        assert answered["prediction"] == client.predict(REDDISH).json()["prediction"]
        drain(worker)
        again = client.get(f"/predictions/{answered['prediction_id']}").json()
        shown = np.frombuffer(base64.b64decode(again["original_img"]), np.uint8)
        assert np.abs(cv2.imdecode(shown, cv2.IMREAD_COLOR_RGB).astype(int) - (199, 99, 99)).max() <= 3


def test_reads_a_result_and_its_passport_from_the_database(client: Client, logged: WorkerParts):
    first = client.predict(REDDISH).json()
    drain(logged)
    again = client.get(f"/predictions/{first['prediction_id']}").json()
    assert again["prediction"] == first["prediction"]
    assert again["overlaid_img"]
    assert again["message"] == "ok"
    # This model's maps are the brightness of the image.
    blank = client.predict(png(flat_image(0, 0, 0)), params={"explain": "none"}).json()
    drain(logged)
    again = client.get(f"/predictions/{blank['prediction_id']}").json()
    assert again["message"].startswith("The heat-map is blank")
    passport = client.get(f"/predictions/{first['prediction_id']}/passport").json()
    assert passport["prediction"]["model_version"] == first["model_version"]
    assert passport["prediction"]["image_is_kept"] is True
    assert passport["model"] is None  # The model of this test was never published.
    assert first["model_version"] in passport["message"]


def test_an_unknown_id_is_a_404_everywhere(client: Client):
    path = "4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11"
    answers = [
        client.get(f"/predictions/{path}"),
        client.get(f"/predictions/{path}/passport"),
        client.delete(f"/predictions/{path}"),
        client.post(f"/feedback/{path}", json={"true_class": "cat"}),
    ]
    assert [answer.status_code for answer in answers] == [404] * 4
    assert all(path in answer.json()["message"] for answer in answers)
    # Whoever deletes it is not told that it may still arrive.
    assert ["will not arrive" in answer.json()["message"] for answer in answers] == [False, False, True, False]


def test_the_latest_statement_of_the_true_class_is_the_last_row(client: Client, logged: WorkerParts, engine: Engine):
    prediction_id = client.predict(REDDISH).json()["prediction_id"]
    for said, key in (("owl", "1"), ("owl", "1"), ("dog", "2"), ("owl", "3")):
        client.post(f"/feedback/{prediction_id}", json={"true_class": said}, headers={"Idempotency-Key": key})
    drain(logged)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT true_class FROM feedback ORDER BY created_on")).scalars().all()
    assert rows == ["owl", "dog", "owl"]
    # The spool is empty now: the database knows the key.
    again = client.post(f"/feedback/{prediction_id}", json={"true_class": "owl"}, headers={"Idempotency-Key": "1"})
    assert again.status_code == 200
    other = client.post(f"/feedback/{prediction_id}", json={"none_of_these": True}, headers={"Idempotency-Key": "1"})
    assert other.status_code == 422
    assert client.post(f"/feedback/{prediction_id}", json={"none_of_these": True}).status_code == 200
    drain(logged)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT true_class FROM feedback ORDER BY created_on")).scalars().all()
    assert rows == ["owl", "dog", "owl", ""]


def test_deletes_a_prediction_with_its_feedback_and_keeps_the_request(
    client: Client, logged: WorkerParts, engine: Engine
):
    prediction_id = client.predict(REDDISH).json()["prediction_id"]
    client.post(f"/feedback/{prediction_id}", json={"true_class": "owl"})
    drain(logged)
    assert client.delete(f"/predictions/{prediction_id}").status_code == 200
    assert [count(engine, table) for table in ("predictions", "feedback", "images", "api_log")] == [0, 0, 0, 1]
    assert client.get(f"/predictions/{prediction_id}").status_code == 404
    assert client.delete(f"/predictions/{prediction_id}").status_code == 404


def test_deletes_an_image_only_with_its_last_prediction(client: Client, logged: WorkerParts, engine: Engine):
    first, second = (client.predict(REDDISH).json()["prediction_id"] for _ in range(2))
    drain(logged)
    client.delete(f"/predictions/{first}")
    assert count(engine, "images") == 1
    assert client.get(f"/predictions/{second}").json()["overlaid_img"]
    client.delete(f"/predictions/{second}")
    assert count(engine, "images") == 0


def test_a_deletion_right_after_the_answer_reaches_what_is_on_its_way(
    client: Client, logged: WorkerParts, engine: Engine
):
    for _ in range(5):
        prediction_id = client.predict(REDDISH).json()["prediction_id"]
        assert client.delete(f"/predictions/{prediction_id}").status_code == 200
    drain(logged)
    assert [count(engine, table) for table in ("predictions", "images", "api_log")] == [0, 0, 5]


def test_goes_on_without_a_database_and_says_so(make_worker: MakeWorker):
    worker = make_worker(DATABASE_URL="postgresql://nobody:nothing@127.0.0.1:9/none")
    client = Client(create_app(worker))
    first = client.predict(REDDISH)
    assert first.status_code == 200
    prediction_id = first.json()["prediction_id"]
    assert client.get(f"/predictions/{prediction_id}").status_code == 200
    assert client.post(f"/feedback/{prediction_id}", json={"true_class": "owl"}).status_code == 200
    other = "4f0c4a52-3f0b-4a5e-9d0e-6f2f1f0c9f11"
    assert client.post(f"/feedback/{other}", json={"true_class": "owl"}).status_code == 202
    assert client.get(f"/predictions/{other}").status_code == 503
    health = client.get("/health_check")
    assert health.status_code == 200
    assert health.json()["database"]["state"] == "unreachable"
    assert health.json()["database"]["error"] == "database unreachable"
    assert "127.0.0.1" not in health.text
    assert "nothing" not in health.text  # The password.


def test_the_log_moves_to_a_database_that_starts_later(make_worker: MakeWorker, database_url: str, engine: Engine):
    worker = make_worker()
    client = Client(create_app(worker))
    client.predict(REDDISH)
    assert worker.log.opened.status().database == "not configured"
    worker.log.opened.use_database(database_url)
    client.predict(REDDISH)
    drain(worker)
    assert count(engine, "predictions") == 2


def test_housekeeping_finds_the_embedded_database_when_it_starts(
    make_worker: MakeWorker, database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    running: list[str | None] = [None]
    monkeypatch.setattr("cv_platform.serving.log.worker_log.running_database_url", lambda settings: running[0])
    worker = make_worker()
    worker.log.follow_database()
    assert worker.log.opened.status().database == "not configured"
    running[0] = database_url
    worker.log.follow_database()
    Client(create_app(worker)).predict(REDDISH)
    drain(worker)
    assert count(engine, "predictions") == 1
