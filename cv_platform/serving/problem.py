"""A refusal, wherever it is decided: what happened, what would have been accepted, and the HTTP status that fits.

How it reaches a client is decided in `http/problems.py`; nothing here knows of a web framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RETRY_SECONDS = 5
CLIENT_GONE = 499
"""Status of a request whose client left before there was an answer; nginx says so, too. Nobody receives it."""


class Problem(Exception):
    """A refusal with what was expected.

    Args:
        status_code: HTTP status code.
        message: what happened and what to do next.
        expected: what would have been accepted.
        headers: such as Retry-After.
        extra: further fields of the JSON body.
        logged: the message as the request log keeps it, where it is not to have what was received; None: as it is.
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        expected: str,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
        logged: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.message = message
        self.expected = expected
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})
        self.logged = logged


def try_later(status_code: int, message: str, *, expected: str, seconds: int = RETRY_SECONDS) -> Problem:
    """Returns a problem that goes away by itself: the answer says when to come again."""
    return Problem(status_code, message, expected=expected, headers={"Retry-After": str(seconds)})


def client_gone() -> Problem:
    """Returns what is counted and logged of a request whose client left before its body was complete."""
    return Problem(CLIENT_GONE, "The client went away before its body was complete.", expected="a complete body")
