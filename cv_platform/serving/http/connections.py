"""Bounds on a connection that Uvicorn leaves open: heads, what is sent ahead, an unread answer, and its age.

Uvicorn's protocol by httptools, whose parser is llhttp's in C, takes a quarter less of the event loop's time than the
one by h11, and bounds nothing. It waits for ever for the first byte, for the rest of a head, and for a client that
takes nothing of its answers; `make up` has no nginx in front that would end these
(`test_half_a_head_and_silence_are_ended`, `test_a_client_that_never_reads_is_cut_off`). And whichever worker is first
takes all the connections that wait: eight clients at once were one worker's in half of the trials, and would stay with
it. So a connection ends, announced, with the first answer after its time, as gRPC's do (`MAX_CONNECTION_AGE`), and the
next may be another worker's.

BentoML leaves the choice of the protocol to Uvicorn ("auto") and has no option for it: `bound_connections` puts ours in
its place, in a worker, before BentoML makes the server. https://www.uvicorn.org/settings/#implementation
"""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any

import httptools
from uvicorn import config as uvicorn_config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_INVALID = "Invalid HTTP request received."


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's protocol for HTTP/1.1, with bounds; the arguments are Uvicorn's own.

    Attributes:
        head_bytes: largest head, and of what is sent beside a body, such as the lengths of chunks, beyond as much as
            the body.
        sent_ahead: most requests that wait for those before on their connection. What is beyond is refused once these
            are answered.
        head_seconds: longest time for a head, from the connection's start. From an answer on, Uvicorn's keep-alive time
            comes on top; whatever is sent meanwhile, such as the rest of a body that nobody reads, does not prolong it.
        kept_seconds: longest time for which a connection takes further requests; at random down to half of that, so
            that what came together does not come again together.
        untaken_seconds: longest time for which a client may take nothing of what is written; beyond, a reset. Where the
            system has no TCP_USER_TIMEOUT, as macOS, there is no bound.
    """

    head_bytes = 16_384
    sent_ahead = 64
    head_seconds = 15.0
    kept_seconds = 60.0
    untaken_seconds = 30.0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Uvicorn believes the X-Forwarded-For of whoever is on this machine; who believes whom is `Guard`'s affair.
        if isinstance(self.app, ProxyHeadersMiddleware):
            self.app = self.app.app
        # Else a connection whose client asks for websockets goes to a protocol without bounds.
        self.ws_protocol_class = None
        self.access_log = False  # The app has its own.
        self._beside_bytes = 0
        self._is_broken = False
        self._answered: RequestResponseCycle | None = None
        """The last that has begun to be answered; `cycle`, the last that came, may still wait."""
        self._deadline: asyncio.TimerHandle | None = None
        self._kept_until = self.loop.time() + random.uniform(0.5, 1.0) * self.kept_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self.untaken_seconds * 1_000)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._wait_at_most(self.head_seconds)

    def data_received(self, data: bytes) -> None:
        """Takes what has arrived; a wish for another protocol is ignored, where httptools ends with the head."""
        while data and not self._is_broken:
            self._beside_bytes += len(data)
            try:
                self.parser.feed_data(data)
                data = b""
            except httptools.HttpParserUpgrade as wish:
                data = self._head_without_wish() + data[wish.args[0] :]
                self._beside_bytes = 0
                self.parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError:
                self.send_400_response(_INVALID)
            else:
                if self._beside_bytes > self.head_bytes:
                    self.send_400_response(_INVALID)
        if self._is_broken:  # Nobody takes what else is sent: the client has to wait.
            self.flow.pause_reading()

    def on_headers_complete(self) -> None:
        """Starts what has arrived, or lets it wait for what is before it.

        Raises:
            ValueError: it is refused, by 400.
        """
        names = [name for name, _ in self.headers]
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > self.head_bytes:
            raise ValueError("Expected a smaller head.")
        if names.count(b"host") != 1 and (self.parser.get_http_version() != "1.0" or b"host" in names):
            raise ValueError("Expected one Host.")
        if len(self.pipeline) >= self.sent_ahead:
            raise ValueError("Expected fewer requests ahead.")
        if self.parser.should_upgrade():  # `data_received` does this again without the wish.
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("Expected a request for this service.")
            return
        super().on_headers_complete()
        if not self.url.startswith(b"/"):  # As to a proxy, with another Host: there is nothing.
            self.scope["path"] = self.url.decode("ascii", "replace")
        self._stop_waiting()
        if self.loop.time() > self._kept_until:
            self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]

    def on_body(self, body: bytes) -> None:
        """Takes a part of a body."""
        self._beside_bytes -= 2 * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends a request."""
        self._beside_bytes = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP once all before it are answered, unless its own answer has begun; then closes."""
        self._is_broken = True
        if self.pipeline and self.pipeline[0][0].more_body:  # Only half of it is HTTP.
            self.pipeline.popleft()
        cycle = self._answered
        if self.pipeline or not (cycle is None or cycle.response_complete or cycle.more_body):
            return
        if cycle is None or cycle.response_complete or not cycle.response_started:
            super().send_400_response(msg)
        self.transport.close()

    def on_response_complete(self) -> None:
        """Goes on to the next request, or waits for its head."""
        is_last = not self.pipeline
        super().on_response_complete()
        if is_last and self._is_broken and not self.transport.is_closing():
            super().send_400_response(_INVALID)
        elif is_last:
            self._wait_at_most(self.timeout_keep_alive + self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops waiting, and tells what is being answered; Uvicorn tells the last that came."""
        self._stop_waiting()
        self.pipeline.clear()
        super().connection_lost(exc)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def _head_without_wish(self) -> bytes:
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _wait_at_most(self, seconds: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bound_connections() -> None:
    """Makes servers that this process makes from now on bound their connections, unless they choose a protocol."""
    uvicorn_config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
