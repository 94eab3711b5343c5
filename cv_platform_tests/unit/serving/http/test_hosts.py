import pytest

from cv_platform.serving.app import create_app
from cv_platform_tests.support.app_fixtures import MakeWorker, spooled
from cv_platform_tests.support.http_client import Client, flat_image, png, send_raw

IMAGE = png(flat_image(1, 2, 3))
HOSTS = "cv.example.org, *.shop.example, 127.0.0.1, [::1], only-here:8080, my_service"


@pytest.fixture
def named(make_worker: MakeWorker) -> Client:
    return Client(create_app(make_worker(CV_ALLOWED_HOSTS=HOSTS)))


@pytest.mark.parametrize(
    "host",
    [
        "cv.example.org", "CV.Example.ORG", "cv.example.org:4242", "cv.example.org.", "a.shop.example",
        "a.b.shop.example:80", "127.0.0.1:4242", "[::1]:4242", "[::1]", "only-here:8080", "my_service:4242",
    ],
)  # fmt: skip
def test_answers_to_its_names(named: Client, host: str):
    assert named.get("/openapi.json", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "cv.example.org.evil.example", "shop.example", "evilshop.example", "only-here", "only-here:81",
     "", "[::2]", "localhost", "127.0.0.1.evil.example", "cv.example.org@evil.example"],
)  # fmt: skip
def test_refuses_any_other_host_before_anything_else(named: Client, host: str):
    response = named.get("/openapi.json", headers={"Host": host})
    assert response.status_code == 421
    assert "CV_ALLOWED_HOSTS" in response.json()["expected"]


@pytest.mark.parametrize(
    "host",
    ["evil.com/.shop.example", "evil.com#.shop.example", "x@a.shop.example", ".shop.example", "a..shop.example",
     "*.shop.example", "127.0.0.1:80@evil.com", "127.0.0.1:evil.com", "127.0.0.1:", "127.0.0.1:80:80",
     "127.0.0.1..", "[::1]evil.com", "[::1].", "[::1]:evil.com", "[::1", "cv.example.org\\.shop.example",
     "evil.com a.shop.example", "cv.example.org,evil.com", "\xa0cv.example.org", "cv.example.org:\xb2"],
)  # fmt: skip
def test_refuses_what_is_no_host_although_it_holds_an_allowed_name(named: Client, host: str):
    answer = send_raw(named.app, "GET", "/openapi.json", headers=[(b"host", host.encode("latin-1"))])
    assert answer.status == 421


def test_a_refused_host_is_logged_like_every_refused_prediction(make_worker: MakeWorker):
    worker = make_worker(CV_ALLOWED_HOSTS="cv.example.org")
    client = Client(create_app(worker))
    assert client.predict(IMAGE, headers={"Host": "evil.example"}).status_code == 421
    assert client.predict(IMAGE, headers={"Host": "cv.example.org"}).status_code == 200
    assert [record["response_status_code"] for record in spooled(worker)] == [421, 200]


@pytest.mark.parametrize("path", ["/health_check", "/livez", "/readyz", "/healthz", "/metrics"])
def test_what_machines_ask_by_address_always_answers(named: Client, path: str):
    headers = {"Host": "10.1.2.3"}
    assert named.get(path, headers=headers).status_code == 200
    for method in ("POST", "OPTIONS", "PURGE"):
        assert named.request(method, path, headers=headers).status_code == 421


def test_no_host_and_two_hosts_are_none_of_its_names(named: Client):
    for headers in ([], [(b"host", b"cv.example.org"), (b"host", b"evil.example")]):
        assert send_raw(named.app, "GET", "/models/current", headers=headers).status == 421


def test_a_forwarded_host_is_not_believed(named: Client):
    headers = {"Host": "evil.example", "X-Forwarded-Host": "cv.example.org", "Forwarded": "host=cv.example.org"}
    assert named.get("/openapi.json", headers=headers).status_code == 421


def test_without_allowed_hosts_any_is_answered(client: Client):
    assert client.get("/openapi.json", headers={"Host": "whatever.example"}).status_code == 200
