"""Requests that mean one thing to one layer and another to the next."""

import pytest

from cv_platform.serving.http.clean_requests import clean_request
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform_tests.support.app_fixtures import spooled
from cv_platform_tests.support.http_client import Client, flat_image, png, send_raw

IMAGE = png(flat_image(10, 20, 30))


@pytest.mark.parametrize("path", ["/predict%0a", "/x%0ay", "/metrics%0a", "/%1b[2J", "/health_check%7f", "/%00"])
def test_a_path_with_control_characters_is_a_400_in_json(client: Client, path: str):
    for method in ("GET", "POST", "DELETE"):
        response = client.request(method, path)
        assert response.status_code == 400
        body = response.json()
        assert body["expected"]
        assert response.headers.get_list("x-request-id") == [body["request_id"]]
        assert response.headers["x-content-type-options"] == "nosniff"


def test_a_predict_path_with_a_newline_is_refused_and_has_its_log_entry(client: Client, worker: WorkerParts):
    response = client.post("/predict%0a", files={"file": ("a.png", IMAGE)})
    assert response.status_code == 400
    (record,) = spooled(worker)
    assert (record["response_status_code"], record["request_url"]) == (400, "/predict\\n")


def test_a_content_type_that_is_not_ascii_never_reaches_what_decodes_it():
    headers = [(b"content-type", b"image/\xff"), (b"x-other", b"\xff")]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    clean_request(scope)
    assert scope["headers"] == [(b"content-type", b"application/octet-stream"), (b"x-other", b"\xff")]


@pytest.mark.parametrize(("method", "path"), [("POST", "/predict"), ("PUT", "/update_model/a.yaml"), ("DELETE", "/x")])
def test_what_another_sites_page_sends_is_refused(client: Client, method: str, path: str):
    response = client.request(method, path, headers={"Sec-Fetch-Site": "cross-site"})
    assert response.status_code == 403
    assert "another site" in response.json()["message"]


@pytest.mark.parametrize("values", [["none, cross-site"], ["cross-site,none"], ["none", "cross-site"]])
def test_another_sites_page_is_found_among_several_values(client: Client, values: list[str]):
    answer = send_raw(client.app, "DELETE", "/x", headers=[(b"sec-fetch-site", value.encode()) for value in values])
    assert answer.status == 403


def test_this_services_page_programs_and_links_from_elsewhere_pass(client: Client):
    for site in ("same-origin", "same-site", "none"):
        assert client.predict(IMAGE, headers={"Sec-Fetch-Site": site}).status_code == 200
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_a_refused_cross_site_prediction_has_its_log_entry_and_no_prediction(client: Client, worker: WorkerParts):
    client.predict(IMAGE, headers={"Sec-Fetch-Site": "Cross-Site"})
    (record,) = spooled(worker)
    assert (record["response_status_code"], record["prediction_id"]) == (403, None)
