"""Uvicorn's fast parser for HTTP/1.1 without other protocols: a request with `Upgrade` is read as if it had none.

The parser under it stops behind a head with `Upgrade` and would take the request's body for the next request. A server
may ignore the header (RFC 9110, section 7.8), and Java's HttpClient sends it by default: such a request is read anew.

Uvicorn knows the newest request of a connection only. Here the one that is being answered is known, too: it hears of
the connection's end, and nonsense behind it does not cost its answer.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cv_platform.serving.http.bare_answers import bare_answer


class PlainHttpProtocol(HttpToolsProtocol):
    """Answers requests of HTTP/1.1 only; the arguments are Uvicorn's own.

    Attributes:
        is_garbled: what came last is no HTTP: nothing more is read, and 400 follows the answers that are due.
        is_stopping: the service waits for this connection's end.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Else Uvicorn hands a connection whose client asks for websockets over to a protocol without our bounds.
        self.ws_protocol_class = None
        self.is_garbled = False
        self.is_stopping = False
        self._is_head = False
        self._answering: Any = None

    def data_received(self, data: bytes) -> None:
        """Parses the bytes; what is no HTTP, and `CONNECT`, gets 400, behind the answers to what came whole before."""
        if self.is_garbled:
            return
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while (end_of_head := self._feed(rest)) is not None:
                rest = rest[end_of_head:]
                head = self._head_without_upgrade()
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # As Uvicorn's.
                self.parser.feed_data(head)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self._end_garbled()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tells the request that is being answered, which would else write on, or wait for ever for its client."""
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Goes on to the next request, or to the 400 behind the last."""
        if self.is_garbled and not self.pipeline and not self.transport.is_closing():
            self.send_400_response("Invalid HTTP request received.")
        super().on_response_complete()

    def shutdown(self) -> None:
        """Ends the connection with the answers that are due."""
        self.is_stopping = True
        super().shutdown()

    def on_message_begin(self) -> None:
        """Begins a head."""
        self._is_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keeps a header; trailers, of which there may be any number, are read and forgotten."""
        if self._is_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Starts the request, unless it will be read anew."""
        self._is_head = False
        if not self.parser.should_upgrade():
            if not self.url.startswith(b"/"):
                self._take_host_of_target()
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Notes that the body is whole, also where the answer did not wait for it."""
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self.cycle.more_body = False

    def send_400_response(self, msg: str) -> None:
        """Answers what is no request of ours, and closes the connection."""
        self.transport.write(
            bare_answer(HTTPStatus.BAD_REQUEST, msg, expected="HTTP/1.1", headers=self.server_state.default_headers)
        )
        self.transport.close()

    def _take_host_of_target(self) -> None:
        """Replaces the header by the name in a target like `http://name/path` (RFC 9112, section 3.2.2)."""
        _, mark, rest = self.url.partition(b"://")
        if mark:
            authority = re.split(rb"[/?#]", rest, maxsplit=1)[0]
            # In place: the scope has this list.
            self.headers[:] = [(name, value) for name, value in self.headers if name != b"host"]
            self.headers.append((b"host", authority))

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _end_garbled(self) -> None:
        newest = self.cycle
        is_due = bool(newest and not newest.response_complete and not newest.more_body)
        if self.pipeline and not is_due:
            self.pipeline.popleft()  # The newest, whose body is broken; those before it are whole.
            is_due = True
        self.is_garbled = is_due
        if not is_due:
            self.send_400_response("Invalid HTTP request received.")

    def _feed(self, data: memoryview) -> int | None:
        """Returns where a head ends that asks for another protocol, if one does."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return upgrade.args[0]
        return None

    def _head_without_upgrade(self) -> bytes:
        method = self.parser.get_method()
        if method == b"CONNECT":  # It has no body: whatever follows is for somebody else.
            raise httptools.HttpParserError("CONNECT")
        start = b" ".join([method, self.url, b"HTTP/" + self.parser.get_http_version().encode()])
        headers = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([start, *headers, b"", b""])
