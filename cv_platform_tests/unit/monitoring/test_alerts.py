from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cv_platform.monitoring.alerts import send_alert


class Receiver(HTTPServer):
    """Takes JSON posts on loopback; paths below /refuse are answered with 500."""

    def __init__(self) -> None:
        self.received: list[dict[str, str]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Receiver)
        self.server.received.append(json.loads(body))
        self.send_response(500 if self.path.startswith("/refuse") else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_sends_title_and_body(receiver: Receiver) -> None:
    assert send_alert([f"json://127.0.0.1:{receiver.server_port}/"], "digits: drift", "What moved: everything") == []
    assert receiver.received[0]["title"] == "digits: drift"
    assert receiver.received[0]["message"] == "What moved: everything"


def test_one_failure_does_not_stop_the_others_and_never_repeats_an_address(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"127.0.0.1:{receiver.server_port}"
    urls = [f"json://user:s3cret@{address}/refuse", "nonsense s3cret", "://s3cret", f"json://{address}/ok"]
    with caplog.at_level(logging.DEBUG):
        failures = send_alert(urls, "title", "body")
    assert len(failures) == 3
    assert failures[0].startswith("Alert 1 (json)")
    assert failures[1].startswith("Alert 2 (unknown)")
    assert len(receiver.received) == 2
    said = " ".join([*failures, caplog.text])
    assert "s3cret" not in said
    assert "/refuse" not in said


def test_without_addresses_nothing_is_sent() -> None:
    assert send_alert([], "title", "body") == []
