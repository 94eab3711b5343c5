"""Images per minute, through the routes."""

import pytest

from cv_platform.serving.app import create_app
from cv_platform_tests.support.app_fixtures import MakeWorker, spooled
from cv_platform_tests.support.http_client import Client, flat_image, png, send_raw

IMAGE = png(flat_image(1, 2, 3))


def batch(count: int) -> dict[str, list[tuple[str, tuple[str, bytes]]]]:
    return {"files": [("files", (f"{number}.png", IMAGE)) for number in range(count)]}


def test_each_key_has_its_images_per_minute(make_worker: MakeWorker):
    worker = make_worker(CV_API_KEYS="first,second", CV_RATE_LIMIT_PER_MINUTE="3")
    client = Client(create_app(worker))
    statuses = [client.predict(IMAGE, headers={"X-API-Key": "first"}).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    refused = client.predict(IMAGE, headers={"X-API-Key": "first"})
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert "3 images per minute" in refused.json()["message"]
    assert client.predict(IMAGE, headers={"X-API-Key": "first "}).status_code == 429
    assert client.predict(IMAGE, headers={"X-API-Key": "second"}).status_code == 200
    assert client.predict(IMAGE, headers={"X-API-Key": "wrong"}).status_code == 401
    assert client.get("/health_check").status_code == 200
    assert [record["response_status_code"] for record in spooled(worker)][:4] == statuses


def test_a_batch_costs_its_images(make_worker: MakeWorker):
    client = Client(create_app(make_worker(CV_RATE_LIMIT_PER_MINUTE="5")))
    assert client.post("/predict/batch", **batch(3)).status_code == 200
    assert client.post("/predict/batch", **batch(3)).status_code == 429


def test_a_batch_that_could_never_pass_is_refused_for_good(make_worker: MakeWorker):
    client = Client(create_app(make_worker(CV_RATE_LIMIT_PER_MINUTE="5")))
    assert client.post("/predict/batch", **batch(6)).status_code == 422
    assert client.get("/health_check").json()["max_batch_files"] == 5


def test_two_workers_of_an_installation_count_together(make_worker: MakeWorker):
    workers = [Client(create_app(make_worker(CV_RATE_LIMIT_PER_MINUTE="3"))) for _ in range(2)]
    statuses = [workers[number % 2].predict(IMAGE).status_code for number in range(6)]
    assert statuses == [200] * 3 + [429] * 3


@pytest.mark.parametrize("header", [b"x-forwarded-for", b"x-real-ip", b"forwarded"])
def test_without_keys_the_address_counts_and_no_header_changes_it(make_worker: MakeWorker, header: bytes):
    app = create_app(make_worker(CV_RATE_LIMIT_PER_MINUTE="1"))
    statuses = [
        send_raw(app, "POST", "/predict", headers=[(header, b"10.0.0.%d" % number)]).status for number in range(2)
    ]
    assert statuses == [422, 429]  # The first one has no form; it counts all the same.


def test_what_is_no_image_is_not_limited(make_worker: MakeWorker):
    client = Client(create_app(make_worker(CV_RATE_LIMIT_PER_MINUTE="1")))
    prediction_id = client.predict(IMAGE).json()["prediction_id"]
    for _ in range(3):
        assert client.get(f"/predictions/{prediction_id}").status_code == 200
        assert client.post(f"/feedback/{prediction_id}", json={"true_class": "cat"}).status_code == 200
