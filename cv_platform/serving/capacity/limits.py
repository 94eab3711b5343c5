"""How much a worker takes on at once, and how large a request may be.

`Gate` counts what is in progress. `BodyLimit` ends a request whose body is larger than allowed (by its Content-Length
before a byte is read, and by counting when there is none, so that no more than the limit is ever read) or arrives too
slowly.

Both are per worker; the reverse proxy in front has limits of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_platform.serving.capacity.cores import available_cores, share_cores
from cv_platform.serving.capacity.memory import available_memory_bytes
from cv_platform.serving.http.problems import Problem, problem_response, try_later
from cv_platform.settings import Settings

FORM_OVERHEAD_BYTES = 16_384
"""What a multipart body may hold beside the file: boundaries, part headers, the field `explain`."""
SMALL_BODY_BYTES = 65_536
"""Largest body of every route that takes no file."""
BATCH_UPLOADS = 8
"""A batch's files together have at most as many bytes as so many largest uploads; it counts as so many, too."""
BATCH_PREDICTIONS = 2
"""A batch may take as long as so many of the slowest predictions."""
SHRINK_IMAGE = "Shrink or recompress the image."
"""What to do about an upload that is too large."""
PROMOTION_SECONDS = 100.0
"""Longest wait for a model to be fetched and load-tested."""
_WAITING_PER_THREAD = 16
_MEMORY_EIGHTHS = 5
_APPEND_ALLOWANCE_SECONDS = 30.0


@dataclass(frozen=True)
class ServingLimits:
    """What one worker allows itself.

    Attributes:
        max_in_flight: predictions running or waiting for a thread; beyond, 429.
        max_uploads: bodies being received; beyond, 429.
        max_small_bodies: requests with any other body in progress; beyond, 429.
        max_batch_files: images of one batch; beyond, 422.
        predict_threads: predictions that run at the same time.
        model_threads: threads of one model call; None leaves it to the framework.
        upload_seconds: longest time for receiving an upload; beyond, 408.
        small_body_seconds: longest time for receiving any other body; beyond, 408.
        predict_seconds: longest time for a prediction; beyond, 504.
        memory_bytes: of uploads and decoded images together, see `request_memory`; beyond, 429.
    """

    max_in_flight: int = 64
    max_uploads: int = 128
    max_small_bodies: int = 64
    max_batch_files: int = 32
    predict_threads: int = 2
    model_threads: int | None = 1
    upload_seconds: float = 30.0
    small_body_seconds: float = 10.0
    predict_seconds: float = 30.0
    memory_bytes: int = 2**30

    @classmethod
    def of(cls, settings: Settings, *, cores: int | None = None, memory_bytes: int | None = None) -> Self:
        """Returns the limits of each of the installation's workers.

        Without a setting of its own a worker computes its share of the cores at the same time, and takes on sixteen
        predictions for each of its threads beside one full batch; of the memory all workers' requests get five
        eighths, as the processes and their models need some themselves.

        Args:
            settings: of the installation.
            cores: of this machine; None asks it.
            memory_bytes: what this process may use; None asks the machine.
        """
        share = share_cores(
            cores or available_cores(), workers=settings.service_workers, predict_threads=settings.predict_threads
        )
        in_flight = settings.max_in_flight or (_WAITING_PER_THREAD * share.predict_threads + settings.max_batch_files)
        # A larger batch would never be admitted: it is refused for good, not with advice to come again.
        files = min(settings.max_batch_files, in_flight, settings.rate_limit_per_minute or in_flight)
        return cls(
            max_in_flight=in_flight,
            max_batch_files=files,
            predict_threads=share.predict_threads,
            model_threads=share.model_threads,
            predict_seconds=settings.predict_timeout_seconds,
            memory_bytes=settings.request_memory_bytes
            or (memory_bytes or available_memory_bytes()) * _MEMORY_EIGHTHS // (8 * settings.service_workers),
        )

    @property
    def longest_seconds(self) -> float:
        """Seconds after which no request of this worker is still to be answered by it."""
        predicting = self.upload_seconds + BATCH_PREDICTIONS * self.predict_seconds
        promoting = self.small_body_seconds + PROMOTION_SECONDS
        return max(predicting, promoting) + _APPEND_ALLOWANCE_SECONDS


class Gate:
    """Admits up to `limit` at a time; safe to use from any thread."""

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"Expected a limit of 1 or more. Received: {limit}.")
        self.limit = limit
        self._inside = 0
        self._lock = threading.Lock()

    @property
    def inside(self) -> int:
        """How many are in progress."""
        return self._inside

    @property
    def is_full(self) -> bool:
        """Whether the next one would be refused."""
        return self._inside >= self.limit

    def enter(self, places: int = 1) -> bool:
        """Takes places, all or none, or returns False when there are not so many; never waits."""
        with self._lock:
            if self._inside + places > self.limit:
                return False
            self._inside += places
            return True

    def leave(self, places: int = 1) -> None:
        """Gives places back; once for all that an `enter` which returned True has taken."""
        with self._lock:
            self._inside -= places


@dataclass(frozen=True)
class BodyAllowance:
    """What a route's body may be: at most `max_bytes`, complete within `seconds`; of a larger one `advice` is given."""

    max_bytes: int
    seconds: float
    advice: str = "Send less."


class BodyLimit:
    """ASGI middleware: refuses bodies that are too large (413, having read no more than allowed) or too slow (408).

    Args:
        app: what it stands before.
        allowance_for: what the body of a request to this path may be.
        small_bodies: places of the requests with a body whose route counts no uploads itself; beyond, 429.
    """

    def __init__(
        self, app: ASGIApp, *, allowance_for: Callable[[str], BodyAllowance], small_bodies: Gate | None = None
    ) -> None:
        self.app = app
        self.allowance_for = allowance_for
        self.small_bodies = small_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        allowance = self.allowance_for(scope["path"].removeprefix(scope.get("root_path", "")))
        headers = Headers(scope=scope)
        problem = _declared_problem(headers, allowance)
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
        gate = self.small_bodies if has_body and allowance.max_bytes <= SMALL_BODY_BYTES else None
        if problem is None and gate is not None and not gate.enter():
            problem, gate = overloaded("requests with a body", gate.limit), None
        if problem is not None:
            await problem_response(scope, problem)(scope, receive, send)
            return
        try:
            await self.app(scope, _bounded(receive, allowance), send)
        finally:
            if gate is not None:
                gate.leave()


def _declared_problem(headers: Headers, allowance: BodyAllowance) -> Problem | None:
    """Returns what is wrong with a request's Content-Length; None where it is right, or where there is none."""
    declared = headers.getlist("content-length")
    if not declared:
        return None
    lengths = {value.strip() for value in declared}
    length = lengths.pop()
    # `isdigit` alone would accept digits of other scripts.
    if lengths or not (length.isascii() and length.isdigit()):
        return Problem(
            400, "Content-Length is not one number of bytes. Send one.", expected="one Content-Length, in digits"
        )
    digits = length.lstrip("0") or "0"
    # By the number of digits first: Python refuses to convert thousands of them.
    if len(digits) > 18 or int(digits) > allowance.max_bytes:
        return too_large(allowance.max_bytes, f"{length[:40]} bytes (Content-Length)", advice=allowance.advice)
    return None


def _bounded(receive: Receive, allowance: BodyAllowance) -> Receive:
    """Returns `receive` with an end: of bytes, and of time until the body is complete."""
    deadline = asyncio.get_running_loop().time() + allowance.seconds
    seen = 0
    is_complete = False

    async def bounded() -> Message:
        nonlocal seen, is_complete
        if is_complete:  # What follows is the client's going away, for which nobody is in a hurry.
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError as err:
            raise Problem(
                408,
                f"The body was not complete after {allowance.seconds:g} s. Send it again.",
                expected=f"a body within {allowance.seconds:g} s",
                headers={"Connection": "close"},
            ) from err
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if seen > allowance.max_bytes:
                received = f"more than {allowance.max_bytes} bytes"
                raise too_large(allowance.max_bytes, received, advice=allowance.advice)
        return message

    return bounded


def too_large(limit: int, received: str, *, advice: str = SHRINK_IMAGE) -> Problem:
    """Returns the 413 of a body of more than `limit` bytes; the connection closes, as the rest stays unread."""
    return Problem(
        413,
        f"Expected at most {limit} bytes. Received: {received}. {advice}",
        expected=f"a body of at most {limit} bytes",
        headers={"Connection": "close"},
        extra={"max_bytes": limit},
    )


def overloaded(what: str, limit: int) -> Problem:
    """Returns the 429 of a worker that has `limit` of `what` in progress."""
    return try_later(
        429,
        f"This worker is busy with {limit} {what}. Try again.",
        expected=f"fewer than {limit} {what} at a time",
        seconds=1,
    )
