"""Requests that stay in flight while something happens, and what became of each of them."""

from __future__ import annotations

import http.client
import itertools
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from benchmarks.load import multipart
from trials.pace import allowed

ANSWER_SECONDS = 40.0
"""Longest wait for one answer; longer is a failure."""
_REQUESTS_PER_CONNECTION = 25
"""Then a client connects anew: else the worker that was first to accept would have all connections for good."""
_PAUSE_SECONDS = 0.05
"""After a refused connection, so that a service that starts is not drowned in attempts."""


@dataclass(frozen=True)
class Outcome:
    """One request and its answer; status 0: there was none."""

    ended: float
    """On `time.monotonic`'s clock."""
    seconds: float
    status: int
    client_port: int | None
    """Of the connection that it was sent on; None: there was no connection."""
    prediction_id: str | None = None
    model_version: str | None = None
    error: str = ""


class Traffic:
    """Keeps `concurrency` requests in flight on connections that stay open for a while, as long as the block lasts.

    Args:
        base_url: of the service.
        uploads: JPEG files, sent in turn.
        concurrency: requests in flight.
        is_unique: whether a number is put behind each file's end, so that the log keeps each upload by itself.
        trusting: the certificates that an https:// service may have.
    """

    def __init__(
        self,
        base_url: str,
        uploads: Sequence[bytes],
        *,
        concurrency: int = 8,
        is_unique: bool = False,
        trusting: ssl.SSLContext | None = None,
    ) -> None:
        self._target = urlsplit(base_url)
        self._trusting = trusting
        self._uploads = uploads
        self._is_unique = is_unique
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._outcomes: list[Outcome] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._client, daemon=True) for _ in range(concurrency)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(ANSWER_SECONDS + 10)

    @property
    def outcomes(self) -> list[Outcome]:
        """All so far, in the order of their ends."""
        with self._changed:
            return list(self._outcomes)

    def wait_for(self, answers: int, *, seconds: float) -> bool:
        """Returns True once there are so many further answers with 200, False after what `seconds` come to here."""
        deadline = time.monotonic() + allowed(seconds)
        wanted = self._answered() + answers
        while self._answered() < wanted:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with self._changed:
                self._changed.wait(min(left, 0.5))
        return True

    def _answered(self) -> int:
        with self._changed:
            return sum(outcome.status == 200 for outcome in self._outcomes)

    def _client(self) -> None:
        connection = self._connection()
        for turn in itertools.count(1):
            if self._stopping.is_set():
                break
            number = next(self._numbers)
            content = self._uploads[number % len(self._uploads)]
            body, content_type = multipart(content + number.to_bytes(8, "big") if self._is_unique else content)
            outcome = _send(connection, body, content_type)
            with self._changed:
                self._outcomes.append(outcome)
                self._changed.notify_all()
            if outcome.status == 0:
                connection.close()
                self._stopping.wait(_PAUSE_SECONDS)
            elif turn % _REQUESTS_PER_CONNECTION == 0:
                connection.close()
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._target.scheme == "https":
            return http.client.HTTPSConnection(self._target.netloc, timeout=ANSWER_SECONDS, context=self._trusting)
        return http.client.HTTPConnection(self._target.netloc, timeout=ANSWER_SECONDS)


def statuses(outcomes: Sequence[Outcome]) -> str:
    """Returns the answers by status, such as `200 × 9999, none × 1`."""
    counted = Counter(outcome.status for outcome in outcomes)
    return ", ".join(f"{status or 'none'} × {count}" for status, count in sorted(counted.items())) or "no answer"


def failures(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Returns the requests that were not answered with 200."""
    return [outcome for outcome in outcomes if outcome.status != 200]


def _send(connection: http.client.HTTPConnection, body: bytes, content_type: str) -> Outcome:
    begin = time.monotonic()
    port: int | None = None
    try:
        if connection.sock is None:
            connection.connect()
        open_socket: Any = connection.sock
        port = int(open_socket.getsockname()[1])
        connection.request("POST", "/predict", body=body, headers={"Content-Type": content_type})
        response = connection.getresponse()
        content, status = response.read(), response.status
        answer = json.loads(content) if status == 200 else {}
    except (OSError, http.client.HTTPException, ValueError) as err:
        end = time.monotonic()
        return Outcome(end, end - begin, 0, port, error=f"{type(err).__name__}: {err}")
    end = time.monotonic()
    return Outcome(
        end,
        end - begin,
        status,
        port,
        prediction_id=answer.get("prediction_id"),
        model_version=answer.get("model_version"),
        error="" if status == 200 else content[:300].decode(errors="replace"),
    )
