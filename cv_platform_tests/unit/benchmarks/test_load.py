from __future__ import annotations

import threading
from collections.abc import Iterator
from email.message import Message
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.harness import Alternative, measure_interleaved
from benchmarks.load import LoadPlan, LoadResult, multipart, run, send
from benchmarks.servers import Server, under_load
from cv_platform.errors import ServiceError


class UploadServer(ThreadingHTTPServer):
    """Keeps what was posted; answers 503 to files that hold `refuse`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def form_part(message: bytes) -> Message:
    """Returns the one part of a form."""
    [part] = BytesParser().parsebytes(message).get_payload()
    assert isinstance(part, Message)
    return part


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        content = form_part(head + body).get_payload(decode=True)
        assert isinstance(content, bytes)
        assert isinstance(self.server, UploadServer)
        self.server.files.append(content)
        self.send_response(503 if b"refuse" in content else 200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[UploadServer]:
    with UploadServer() as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    for path in paths:
        path.write_bytes(b"\xff\xd8" + path.name.encode() + b"\r\n\x00")
    return paths


def plan(server: UploadServer, images: list[Path], **values: object) -> LoadPlan:
    defaults = {"concurrency": 2, "seconds": 0.0, "minimum_requests": 10}
    return LoadPlan.model_validate({"url": f"{server.url}/predict", "images": images, **defaults, **values})


def test_form_holds_the_file_under_its_name() -> None:
    body, content_type = multipart(b"\xff\xd8bytes", name="a.jpg")
    part = form_part(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    assert part.get_param("name", header="content-disposition") == "file"
    assert part.get_filename() == "a.jpg"
    assert part.get_content_type() == "image/jpeg"
    assert part.get_payload(decode=True) == b"\xff\xd8bytes"


def test_sends_every_image_in_turn_and_counts_the_answers(server: UploadServer, images: list[Path]) -> None:
    result = run(plan(server, images))
    assert result.requests == len(server.files) == 10
    assert sorted(server.files) == sorted(5 * [path.read_bytes() for path in images])
    assert result.statuses == {200: 10}
    assert result.failures == 0
    assert result.answer_bytes == 40


def test_counts_refusals_and_missing_answers_as_failures(server: UploadServer, images: list[Path]) -> None:
    images[0].write_bytes(b"refuse")
    result = run(plan(server, images))
    assert result.statuses == {200: 5, 503: 5}
    assert result.failures == 5
    nobody = run(plan(server, images).model_copy(update={"url": "http://127.0.0.1:1/predict", "minimum_requests": 3}))
    assert nobody.statuses == {0: 3}
    assert nobody.failures == 3


def test_percentiles_are_of_the_latencies() -> None:
    result = LoadResult(
        wall_seconds=1.0, latencies_ms=[float(n) for n in range(1, 102)], statuses={200: 101}, answer_bytes=0
    )
    assert (result.percentile_ms(50), result.percentile_ms(99)) == (51.0, 100.0)


def test_load_comes_from_another_process(server: UploadServer, images: list[Path]) -> None:
    result = send(plan(server, images, minimum_requests=4))
    assert result.statuses == {200: 4}
    assert len(server.files) == 4


def test_speed_of_a_server_that_refuses_is_an_error(server: UploadServer, images: list[Path]) -> None:
    answers: list[int] = []
    images[0].write_bytes(b"refuse")
    measured = under_load(
        Server("example", 1, server.url),
        images,
        concurrency=1,
        seconds=0.0,
        minimum_requests=4,
        on_answers=answers.append,
    )
    with pytest.raises(
        ServiceError, match=r"expected 200 for every request\. Received: \{503: 2, 200: 2\}|\{200: 2, 503: 2\}"
    ):
        measure_interleaved([Alternative("example", measured)], rounds=1, warm_up=0)
    assert answers == [2]
