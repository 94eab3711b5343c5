"""Answers to what never becomes a request: garbage, and heads that are too large or too slow.

The connection writes them itself; they have the shape and the headers of every other answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from uuid import uuid4

from cv_platform.serving.http.security import ANSWER_HEADERS


def bare_answer(status: HTTPStatus, message: str, *, expected: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Returns a refusal as it goes over the wire, after which the connection is closed.

    Args:
        status: the answer's.
        message: what happened.
        expected: what would have been accepted.
        headers: further ones, such as the server's Date.
    """
    request_id = uuid4().hex
    body = json.dumps({"message": message, "expected": expected, "request_id": request_id}).encode()
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}".encode(),
        *(name + b": " + value for name, value in headers),
        b"content-type: application/json",
        f"content-length: {len(body)}".encode(),
        b"connection: close",
        f"X-Request-Id: {request_id}".encode(),
        *(f"{name}: {value}".encode() for name, value in ANSWER_HEADERS.items()),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
