from __future__ import annotations

import base64
import email
import email.policy
import json
import logging
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from typing_extensions import override

from cv_platform.monitoring.alerts import send_alert


class Receiver(HTTPServer):
    """Takes JSON posts on loopback; paths below /refuse are answered with 500."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
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


class MailServer(socketserver.TCPServer):
    """Takes mail on loopback as RFC 5321 has it: enough of it for a client that neither logs in nor encrypts."""

    def __init__(self) -> None:
        self.mails: list[bytes] = []
        super().__init__(("127.0.0.1", 0), MailHandler)


class MailHandler(socketserver.StreamRequestHandler):
    @override
    def handle(self) -> None:
        assert isinstance(self.server, MailServer)
        self.wfile.write(b"220 ready\r\n")
        while line := self.rfile.readline():
            verb = line[:4].upper()
            if verb == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                self.server.mails.append(b"".join(iter(self.rfile.readline, b".\r\n")))
            self.wfile.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 ok\r\n")
            if verb == b"QUIT":
                return


def test_a_mail_server_gets_the_words_and_the_pictures() -> None:
    with MailServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"mailto://127.0.0.1:{server.server_address[1]}?from=cv@example.org&to=anna@example.org&mode=insecure"
        assert send_alert([url], "digits: drift", "Report: file:///reports/1", b"\xff\xd8 a picture") == []
        server.shutdown()
        thread.join()
    (mail,) = (email.message_from_bytes(one, policy=email.policy.default) for one in server.mails)
    assert (mail["Subject"], mail["To"]) == ("digits: drift", "anna@example.org")
    body, (picture,) = mail.get_body(("plain", "html")), list(mail.iter_attachments())
    assert body is not None
    assert "Report: file:///reports/1" in body.get_content()
    assert (picture.get_content_type(), picture.get_content()) == ("image/jpeg", b"\xff\xd8 a picture")


def test_a_webhook_gets_the_pictures(receiver: Receiver) -> None:
    assert send_alert([f"json://127.0.0.1:{receiver.server_port}/"], "title", "body", b"\xff\xd8 a picture") == []
    (picture,) = receiver.received[0]["attachments"]
    assert (picture["mimetype"], base64.b64decode(picture["base64"])) == ("image/jpeg", b"\xff\xd8 a picture")


def test_without_addresses_nothing_is_sent() -> None:
    assert send_alert([], "title", "body") == []
