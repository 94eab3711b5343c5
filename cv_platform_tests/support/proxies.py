"""A proxy that counts what reaches it, and a server on loopback that says how often it was asked."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Counted:
    """A running server.

    Attributes:
        url: where it listens.
        asked: the first line of each request, in order.
    """

    url: str
    asked: list[str] = field(default_factory=list[str])


@contextmanager
def counting_server(status: int = 200) -> Iterator[Counted]:
    """Answers everything with `{}`; as a proxy it forwards nothing, so that whoever asks it does not get through."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            counted.asked.append(self.requestline)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = do_DELETE = do_CONNECT = answer

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        counted = Counted(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield counted
        finally:
            server.shutdown()
            thread.join()


def proxy_variables(address: str) -> dict[str, str]:
    """Returns every variable that names a proxy, in upper and lower case."""
    names = [f"{scheme}_PROXY" for scheme in ("HTTP", "HTTPS", "ALL")]
    return {variant: address for name in names for variant in (name, name.lower())}
