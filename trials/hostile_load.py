"""Sends hostile uploads over connections that stay open, and names every answer that should not have been."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import multipart
from trials.mutations import HostileUpload

ALLOWED = frozenset({200, 400, 413, 415})
"""What a file that arrives whole may be answered with: taken, damaged, too large, no image."""
KEPT_OPEN_SECONDS = 2.0
"""A connection that has been idle for longer is not used again: the service closes it after 5 s, perhaps just then."""
_TOLD = 20


@dataclass
class HostileResult:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    """Answers by status; 0: none."""
    slowest_seconds: float = 0.0
    slowest: str = ""
    """Name of the upload that took longest."""
    wrong: list[str] = field(default_factory=list)
    """Uploads that were answered with what is not allowed, not at all, or too late: name, status and answer."""
    seconds: float = 0.0

    @property
    def sent(self) -> int:
        """How many were sent."""
        return sum(self.statuses.values())


def send_hostile(
    base_url: str,
    make: Callable[[int], HostileUpload],
    count: int,
    *,
    concurrency: int,
    answer_seconds: float,
    failures: Path,
) -> HostileResult:
    """Posts uploads 0 to `count` − 1 to `/predict`.

    Args:
        base_url: of the service.
        make: returns the upload of a number.
        count: how many.
        concurrency: connections, each with one request at a time.
        answer_seconds: longest time that an answer may take.
        failures: folder that receives the uploads with wrong answers, under their names; made when there is one.
    """
    target = urlsplit(base_url)
    result = HostileResult()
    lock = threading.Lock()
    numbers = iter(range(count))

    def client() -> None:
        connection = http.client.HTTPConnection(target.netloc, timeout=2 * answer_seconds)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                break
            making = time.monotonic()
            upload = make(number)
            if time.monotonic() - making > KEPT_OPEN_SECONDS:
                connection.close()
            begin = time.monotonic()
            status, answer = _post(connection, upload)
            seconds = time.monotonic() - begin
            with lock:
                result.statuses[status] += 1
                if seconds > result.slowest_seconds:
                    result.slowest_seconds, result.slowest = seconds, upload.name
                if status not in ALLOWED or seconds > answer_seconds:
                    failures.mkdir(parents=True, exist_ok=True)
                    (failures / upload.name[:200]).write_bytes(upload.content)
                    if len(result.wrong) < _TOLD:
                        result.wrong.append(f"{upload.name}: {status} after {seconds:.1f} s, {answer[:200]}")
        connection.close()

    begin = time.monotonic()
    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.seconds = time.monotonic() - begin
    return result


def _post(connection: http.client.HTTPConnection, upload: HostileUpload) -> tuple[int, str]:
    body, content_type = multipart(upload.content, name="upload", media_type="application/octet-stream")
    try:
        # An answer may come before the whole body is sent; then it is there to be read.
        with contextlib.suppress(BrokenPipeError):
            connection.request("POST", "/predict", body=body, headers={"Content-Type": content_type})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as err:
        connection.close()
        return 0, f"{type(err).__name__}: {err}"
