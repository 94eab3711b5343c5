"""Bounds on a connection that Uvicorn leaves open: how long a head and an unread answer may take, and its age.

Uvicorn's h11 protocol bounds the size of a head, and ignores wishes for other protocols. It waits for ever for the
first byte, for the rest of a head, and for a client that takes nothing of its answers; `make up` has no nginx in front
that would end these (`test_half_a_head_and_silence_are_ended`, `test_a_client_that_never_reads_is_cut_off`). And
whichever worker is first takes all the connections that wait: eight clients at once were one worker's in half of the
trials, and would stay with it. So a connection ends, announced, with the first answer after its time, as gRPC's do
(`MAX_CONNECTION_AGE`), and the next may be another worker's.

BentoML leaves the choice of the protocol to Uvicorn ("auto") and has no option for it: `bound_connections` puts ours in
its place, in a worker, before BentoML makes the server. https://www.uvicorn.org/settings/#implementation
"""

from __future__ import annotations

import asyncio
import random
import socket
from typing import Any

import h11
from uvicorn import config as uvicorn_config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol


class BoundedProtocol(H11Protocol):
    """Uvicorn's protocol for HTTP/1.1, with bounds; the arguments are Uvicorn's own.

    Attributes:
        head_seconds: longest time for a head, from the connection's start. From an answer on, Uvicorn's keep-alive time
            comes on top; whatever is sent meanwhile, such as the rest of a body that nobody reads, does not prolong it.
        kept_seconds: longest time for which a connection takes further requests; at random down to half of that, so
            that what came together does not come again together.
        untaken_seconds: longest time for which a client may take nothing of what is written; beyond, a reset. Where the
            system has no TCP_USER_TIMEOUT, as macOS, there is no bound.
    """

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
        self._deadline: asyncio.TimerHandle | None = None
        self._kept_until = self.loop.time() + random.uniform(0.5, 1.0) * self.kept_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begins to wait for the first head."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self.untaken_seconds * 1_000)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self._wait_at_most(self.head_seconds)

    def handle_events(self) -> None:
        """Starts what has arrived whole."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_waiting()
            if self.loop.time() > self._kept_until:
                self.cycle.default_headers = [*self.cycle.default_headers, CLOSE_HEADER]

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless an answer has begun; closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        self.transport.close()

    def on_response_complete(self) -> None:
        """Goes on to the next request, or waits for its head."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._wait_at_most(self.timeout_keep_alive + self.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops waiting."""
        self._stop_waiting()
        super().connection_lost(exc)

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
