"""What a really served service answers to anything goes through our app: BentoML's routes are behind it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from cv_platform_tests.support.served import serving

pytestmark = [pytest.mark.xdist_group("every_answer"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A worker without a model that answers to one name."""
    variables = {"CV_SERVICE_WORKERS": "1", "CV_ALLOWED_HOSTS": "service"}
    with serving(tmp_path_factory.mktemp("home"), variables) as port:
        yield port


def ask(port: int, method: str, target: str, host: str = "service") -> tuple[HTTPResponse, bytes]:
    """Sends exactly this request line."""
    return send(port, f"{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode(), method)


def send(port: int, content: bytes, method: str = "GET") -> tuple[HTTPResponse, bytes]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(content)
        answer = HTTPResponse(connection, method=method)
        answer.begin()
        return answer, answer.read()


def require_ours(answer: HTTPResponse) -> None:
    assert answer.headers.get_all("X-Request-Id") is not None
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("POST", "/schema.json", 404),
        ("GET", "/schema.json/", 404),
        ("GET", "/static_content/index.html", 404),
        ("POST", "/predict/", 404),
        ("GET", "/assets/index.html", 404),
        ("OPTIONS", "*", 404),
        ("GET", "http://evil.example/openapi.json", 404),
        ("POST", "/livez", 405),
        ("DELETE", "/readyz", 405),
        ("PURGE", "/livez", 405),
        ("TRACE", "/readyz", 405),
        ("PROPFIND", "/healthz", 405),
        ("PROPFIND", "/predict", 405),
        ("SUBSCRIBE", "/nothing/here", 404),
        ("GET", "/readyz", 503),
        ("GET", "/livez/", 404),
    ],
)  # fmt: skip
def test_whatever_bentoml_would_answer_has_our_headers_and_shape(
    port: int, method: str, target: str, status: int
) -> None:
    answer, body = ask(port, method, target)
    assert answer.status == status, body
    require_ours(answer)
    problem = json.loads(body)
    assert problem["message"]
    assert problem["expected"]
    assert problem["request_id"] == answer.headers["X-Request-Id"]


@pytest.mark.parametrize("target", ["/schema.json", "/docs.json"])
def test_bentomls_documents_have_our_headers(port: int, target: str) -> None:
    answer, body = ask(port, "GET", target)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    require_ours(answer)
    assert json.loads(body)
    assert ask(port, "HEAD", target)[1] == b""


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/schema.json"),
        ("GET", "/docs.json"),
        ("OPTIONS", "*"),
        ("OPTIONS", "/livez"),
        ("POST", "/readyz"),
        ("PURGE", "/livez"),
        ("DELETE", "/metrics"),
        ("GET", "/openapi.json"),
    ],
)
def test_another_host_is_refused_everywhere(port: int, method: str, target: str) -> None:
    answer, body = ask(port, method, target, host="evil.example")
    assert answer.status == 421, body
    require_ours(answer)
    assert "CV_ALLOWED_HOSTS" in json.loads(body)["expected"]


@pytest.mark.parametrize("target", ["/livez", "/healthz"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_probes_answer_by_address(port: int, method: str, target: str) -> None:
    answer, body = ask(port, method, target, host=f"10.1.2.3:{port}")
    assert (answer.status, body) == (200, b"\n" if method == "GET" else b"")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    require_ours(answer)


def test_prometheus_scrapes_by_address(port: int) -> None:
    answer, body = ask(port, "GET", "/metrics", host="10.1.2.3:4242")
    assert answer.status == 200
    assert b'route="/livez"' in body  # Counted by its route.
    assert b'route="/static_content/index.html"' not in body


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"CONNECT\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: service\r\nContent-Length: -1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: service\r\nHost: evil.example\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /" + 17_000 * b"a",
    ],
)
def test_what_never_becomes_a_request_is_a_400_that_tells_nothing(port: int, content: bytes) -> None:
    answer, body = send(port, content)
    assert (answer.status, body) == (400, b"Invalid HTTP request received.")
    assert answer.headers["Connection"] == "close"
    assert "Server" not in answer.headers
