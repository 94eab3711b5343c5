"""The service's app over real HTTP, in a process of its own (`python -m` this module, PORT, LIMITS).

Settings come from the environment; LIMITS is JSON that replaces fields of `ServingLimits`, and of
`BoundedProtocol`. Uvicorn is set up as BentoML sets it up in its workers. The model is the one that computes by hand,
so the process starts in seconds and holds no model framework: what is looked at is everything around the model. With
`follows_pointer` it is the one that the production pointer names.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from cv_platform.local.http import free_port, wait_for_http
from cv_platform_tests.support.waiting import wait_until

START_SECONDS = 60.0


@dataclass(frozen=True)
class ServedApp:
    """A running one."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    killed: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """Ends it as a power cut would; then it need not be alive at the end of its block."""
        self.killed.set()
        self.process.kill()
        self.process.wait()

    def connect(self, timeout_seconds: float = 10.0) -> socket.socket:
        """Opens a connection to write to by hand."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_seconds)

    def wait_until_read(self, connection: socket.socket) -> None:
        """Returns once the service has taken from its socket all that `connection` has sent it (Linux tells)."""
        here, there = f":{connection.getsockname()[1]:04X}", f":{self.port:04X}"

        def is_read() -> bool:
            rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            # Of the service's end what waits to be read, of this one what waits to be sent: `tx_queue:rx_queue`.
            waiting = [
                int(queue, 16)
                for _, local, remote, _, queues, *_ in rows
                for own, other, queue in zip((there, here), (here, there), reversed(queues.split(":")), strict=True)
                if local.endswith(own) and remote.endswith(other)
            ]
            return not any(waiting)

        wait_until(is_read)

    def health(self) -> dict[str, Any]:
        """Returns what `/health_check` says; it has to be 200, soon."""
        response = httpx.get(f"{self.url}/health_check", timeout=5)
        assert response.status_code == 200, response.text
        return response.json()

    def peak_memory_bytes(self) -> int:
        """Returns the largest resident memory of the process so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])


@contextmanager
def serve_app(limits: dict[str, float], **environment: str) -> Iterator[ServedApp]:
    """Runs the app to the end of the block; it has to be alive then."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="cv-served-") as folder:
        log = Path(folder) / "served.log"
        variables = {"CV_HOME": f"{folder}/home", "CV_STORAGE": f"{folder}/storage", **environment}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "cv_platform_tests.support.served_app", str(port), json.dumps(limits)],
                env={**os.environ, **variables},
                cwd=Path(__file__).parents[2],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_for_http(
                f"http://127.0.0.1:{port}/health_check", seconds=START_SECONDS, alive=lambda: process.poll() is None
            )
            served = ServedApp(process, port, log)
            yield served
            assert process.poll() is None or served.killed.is_set(), (
                f"it ended with {process.returncode}:\n{log.read_text()[-3000:]}"
            )
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(port: int, changed_limits: dict[str, Any]) -> None:
    """Serves until it is told to stop."""
    import uvicorn

    from cv_platform.serving.app import create_app
    from cv_platform.serving.capacity.limits import ServingLimits
    from cv_platform.serving.http.connections import BoundedProtocol, bound_connections
    from cv_platform.serving.worker import open_worker
    from cv_platform.settings import Settings
    from cv_platform_tests.support.http_client import FixedModels

    settings = Settings.from_environment()
    for name in ("head_seconds", "kept_seconds", "untaken_seconds"):
        setattr(BoundedProtocol, name, changed_limits.pop(name, getattr(BoundedProtocol, name)))
    models = None if changed_limits.pop("follows_pointer", False) else FixedModels()
    limits = replace(ServingLimits.of(settings), **changed_limits)
    # As `_bentoml_impl/worker/service.py` of BentoML 1.4.39, whose "auto" is ours by then.
    bound_connections()
    with open_worker(settings, limits=limits, models=models) as worker:
        app = create_app(worker)
        config = uvicorn.Config(
            app, host="127.0.0.1", port=port, backlog=2048, log_config=None, timeout_keep_alive=5, server_header=False
        )
        uvicorn.Server(config).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
