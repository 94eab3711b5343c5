"""Load upon a server, from a process of its own, so that its work is in nobody else's CPU time.

`python -m benchmarks.load` reads a `LoadPlan` as JSON from standard input, keeps `concurrency` requests in flight on
connections that stay open, and writes a `LoadResult` as JSON to standard output. Requests are made before, and
httptools reads the answers: what this process takes of the cores, the server lacks.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import httptools
import numpy as np

from benchmarks.harness import Record

REQUEST_TIMEOUT_SECONDS = 120.0
_READ_BYTES = 256 * 1024


class LoadPlan(Record):
    """What to send, how often, for how long."""

    url: str
    """Where the images are posted, as the multipart field `file`."""
    images: list[Path]
    """Files, sent in turn."""
    concurrency: int
    seconds: float
    """New requests are sent for so long; those in flight then are waited for."""
    minimum_requests: int
    """At least so many are sent, however long it takes: a percentile needs them."""


class LoadResult(Record):
    """What came back."""

    wall_seconds: float
    """From the first request to the last answer."""
    latencies_ms: list[float]
    statuses: dict[int, int]
    """Answers by status; 0 counts the requests that got none."""
    answer_bytes: int

    @property
    def requests(self) -> int:
        """Number of requests sent."""
        return len(self.latencies_ms)

    @property
    def failures(self) -> int:
        """Number of requests that were not answered with 200."""
        return self.requests - self.statuses.get(200, 0)

    def percentile_ms(self, percent: float) -> float:
        """Returns a percentile of the latencies."""
        return float(np.percentile(self.latencies_ms, percent))


def send(plan: LoadPlan) -> LoadResult:
    """Runs a plan in a process of its own and returns what it saw."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"],
        input=plan.model_dump_json(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=plan.seconds + 2 * REQUEST_TIMEOUT_SECONDS,
        cwd=Path(__file__).resolve().parent.parent,
    )
    return LoadResult.model_validate_json(done.stdout)


def multipart(content: bytes, *, name: str = "image.jpg", media_type: str = "image/jpeg") -> tuple[bytes, str]:
    """Returns `(body, content type)` of a form with one field `file`."""
    boundary = uuid.uuid4().hex
    head = (
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n'
        f"Content-Type: {media_type}\r\n\r\n"
    )
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _message(target: SplitResult, image: Path) -> bytes:
    body, content_type = multipart(image.read_bytes(), name=image.name)
    path = target.path + (f"?{target.query}" if target.query else "")
    head = f"POST {path} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Connection:
    """A connection that stays open, by which one request after the other goes."""

    def __init__(self, target: SplitResult) -> None:
        self._address = target.hostname or "", target.port or 80
        self._socket: socket.socket | None = None
        self._size, self._is_complete = 0, False

    def exchange(self, message: bytes) -> tuple[int, int]:
        """Returns the answer's status and the bytes of its body."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, REQUEST_TIMEOUT_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._size, self._is_complete = 0, False
        answer = httptools.HttpResponseParser(self)
        self._socket.sendall(message)
        while not self._is_complete:
            if not (received := self._socket.recv(_READ_BYTES)):
                raise ConnectionError("The server has closed the connection.")
            answer.feed_data(received)
        if not answer.should_keep_alive():
            self.close()
        return answer.get_status_code(), self._size

    def on_body(self, body: bytes) -> None:
        """Is called by httptools."""
        self._size += len(body)

    def on_message_complete(self) -> None:
        """Is called by httptools."""
        self._is_complete = True

    def close(self) -> None:
        """Closes it; the next request opens another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def run(plan: LoadPlan) -> LoadResult:
    """Sends the plan's requests from threads of this process."""
    target = urlsplit(plan.url)
    messages = [_message(target, path) for path in plan.images]
    begin = time.perf_counter()
    lock = threading.Lock()
    sent = 0
    latencies: list[float] = []
    statuses: dict[int, int] = {}
    received = 0

    def next_message() -> bytes | None:
        nonlocal sent
        with lock:
            if sent >= plan.minimum_requests and time.perf_counter() - begin >= plan.seconds:
                return None
            sent += 1
            return messages[sent % len(messages)]

    def client() -> None:
        nonlocal received
        connection = _Connection(target)
        while (message := next_message()) is not None:
            start = time.perf_counter()
            try:
                status, size = connection.exchange(message)
            except (OSError, httptools.HttpParserError):
                connection.close()
                status, size = 0, 0
            elapsed_ms = 1e3 * (time.perf_counter() - start)
            with lock:
                latencies.append(elapsed_ms)
                statuses[status] = statuses.get(status, 0) + 1
                received += size
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(plan.concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return LoadResult(
        wall_seconds=time.perf_counter() - begin, latencies_ms=latencies, statuses=statuses, answer_bytes=received
    )


if __name__ == "__main__":
    sys.stdout.write(run(LoadPlan.model_validate_json(sys.stdin.read())).model_dump_json())
