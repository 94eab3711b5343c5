"""What a connection may cost before there is a request, how long it is kept, and what a half-closed one still gets.

Uvicorn's fast parser reads heads of any size, for any time, and waits for ever for the first byte and for the rest of a
body that nobody reads; a middleware only sees requests whose head is complete. Whichever worker is first takes all the
connections that wait: eight clients at once were one worker's in half of the trials, and would stay with it. So a
connection ends, announced, with the first answer after its time, as gRPC's do (`MAX_CONNECTION_AGE`), and the next may
be another worker's. A client that has closed its sending side still reads: it gets the answers to what it has sent
whole (RFC 9112, section 9.6). One that takes nothing of its answers is cut off: they, the request whose answer waits
behind them, and the service's stop would wait for it for ever.

BentoML leaves the choice of the protocol to Uvicorn ("auto") and has no option
for it: `bound_connections` puts ours in its place, in a worker, before BentoML makes the server.
https://www.uvicorn.org/settings/#implementation, https://docs.python.org/3/library/asyncio-protocol.html
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import random
import sys
import termios
from http import HTTPStatus
from typing import Any

from uvicorn import config as uvicorn_config

from cv_platform.serving.http.bare_answers import bare_answer
from cv_platform.serving.http.plain_http import PlainHttpProtocol


class BoundedProtocol(asyncio.Protocol):
    """Uvicorn's protocol for HTTP/1.1, with bounds; the arguments are Uvicorn's own.

    Attributes:
        head_seconds: longest time for a head, from the connection's start or the head's first byte; beyond, 408, or
            nothing where nothing was sent. From an answer on, Uvicorn's keep-alive time comes on top; whatever is sent
            meanwhile, such as the rest of a body that nobody has read, does not prolong it.
        max_head_bytes: largest head, and at most one read from the socket more; beyond, 431.
        kept_seconds: longest time for which a connection takes further requests; at random down to half of that, so
            that what came together does not come again together.
        untaken_seconds: longest time for which a client may take nothing of what is written; beyond, a reset.
        closing_seconds: the same once the connection is closed, or the service stops; every so often we look.
    """

    head_seconds = 15.0
    max_head_bytes = 65_536
    kept_seconds = 60.0
    untaken_seconds = 30.0
    closing_seconds = 5.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._inner: Any = PlainHttpProtocol(*arguments, **options)
        self._after_answer = self._inner.on_response_complete
        self._inner.on_response_complete = self._answered
        self._transport: Any = None
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None
        self._kept_until = 0.0
        self._is_cut_off = False
        self._look: asyncio.TimerHandle | None = None
        self._untaken_bytes = 0
        self._taken_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins to wait for the first head."""
        self._transport = transport
        self._kept_until = asyncio.get_running_loop().time() + random.uniform(0.5, 1.0) * self.kept_seconds
        # Paused is then whatever has anything to write, also what was closed with it: `pause_writing` sees them all.
        # Not 0: with TLS, uvloop pauses at the limit and not above it.
        self._transport.set_write_buffer_limits(high=1, low=0)
        self._inner.connection_made(transport)
        self._wait_at_most(self.head_seconds)

    def data_received(self, data: bytes) -> None:
        """Hands the bytes on, and counts those that belong to no request yet."""
        before = self._inner.cycle
        is_between = before is None or not before.more_body
        self._inner.data_received(data)
        if self._transport.is_closing() or self._inner.is_garbled:
            self._stop_waiting()
        elif not is_between or self._inner.cycle is not before:
            self._head_bytes = 0
            if self._inner.cycle is not before:
                self._stop_waiting()
            if asyncio.get_running_loop().time() > self._kept_until:
                self._end_after(self._inner.cycle)
        elif data.strip(b"\r\n"):  # Empty lines before a request line are allowed.
            if not self._head_bytes:
                self._wait_at_most(self.head_seconds)
            self._head_bytes += len(data)
            if self._head_bytes > self.max_head_bytes:
                self._refuse(
                    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"at most {self.max_head_bytes} bytes of headers"
                )

    def eof_received(self) -> bool | None:
        """Ends the connection, but not before the answers to what has arrived whole."""
        if self._inner.is_garbled:
            return True
        newest = self._inner.cycle
        waiting = self._inner.pipeline
        if newest is None or newest.response_complete or (newest.more_body and not waiting):
            return self._inner.eof_received()
        if newest.more_body:  # The rest will never come: the connection ends with the answer before.
            self._is_cut_off = True
            waiting.popleft()
            if not waiting:
                return True
            newest = waiting[0][0]
        self._end_after(newest)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Hands it on."""
        self._stop_waiting()
        self._stop_looking()
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Hands it on, and begins to look whether the client takes anything."""
        self._inner.pause_writing()
        loop = asyncio.get_running_loop()
        self._stop_looking()
        self._untaken_bytes = self._count_untaken()
        self._taken_at = loop.time()
        self._look = loop.call_later(min(self.closing_seconds, self.untaken_seconds), self._look_again)

    def resume_writing(self) -> None:
        """Hands it on."""
        self._stop_looking()
        self._inner.resume_writing()

    def _answered(self) -> None:
        if self._is_cut_off and not self._inner.pipeline:
            self._transport.close()
        self._after_answer()
        if self._transport.is_closing() or not self._inner.cycle.response_complete:
            self._stop_waiting()
        else:
            self._wait_at_most(self._inner.timeout_keep_alive + self.head_seconds)

    def _wait_at_most(self, seconds: float) -> None:
        """Gives the connection up after that time, or when it was to be given up already, whatever is earlier."""
        loop = asyncio.get_running_loop()
        if self._deadline is None or loop.time() + seconds < self._deadline.when():
            self._stop_waiting()
            self._deadline = loop.call_later(seconds, self._give_up)

    def _look_again(self) -> None:
        """Cuts the client off if it has taken nothing for its time; one that reads slowly keeps its connection."""
        loop = asyncio.get_running_loop()
        untaken = self._count_untaken()
        if untaken < self._untaken_bytes:
            self._taken_at = loop.time()
        self._untaken_bytes = untaken
        is_last = self._transport.is_closing() or self._inner.is_stopping
        ends_at = self._taken_at + (self.closing_seconds if is_last else self.untaken_seconds)
        if loop.time() >= ends_at:
            self._stop_looking()
            self._transport.abort()
        else:
            # Not later than in `closing_seconds`: meanwhile it may be closed.
            self._look = loop.call_at(min(ends_at, loop.time() + self.closing_seconds), self._look_again)

    def _count_untaken(self) -> int:
        """Returns how many bytes the peer has not acknowledged.

        The kernel's are among them: it asks for more only when a third of its buffer is free, and of its up to 4 MB a
        slow reader takes a third in minutes.
        """
        queued = bytes(4)
        with contextlib.suppress(OSError):  # Not every system tells of a socket's queue.
            queued = fcntl.ioctl(self._transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self._transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def _stop_looking(self) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _end_after(self, newest: Any) -> None:
        """Makes the connection end with this request's answer, which says so unless it has begun."""
        newest.keep_alive = False

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"complete headers within {self.head_seconds:g} s")

    def _refuse(self, status: HTTPStatus, expected: str) -> None:
        """Closes the connection; says why, unless nobody asked or an earlier request is still being answered."""
        self._stop_waiting()
        cycle = self._inner.cycle
        if self._head_bytes and (cycle is None or cycle.response_complete):
            message = f"{status.phrase}. Expected {expected}."
            headers = self._inner.server_state.default_headers
            self._transport.write(bare_answer(status, message, expected=expected, headers=headers))
        self._transport.close()


def bound_connections() -> None:
    """Makes servers that this process makes from now on bound their connections, unless they choose a protocol."""
    uvicorn_config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
