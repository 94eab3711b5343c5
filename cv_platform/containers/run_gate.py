"""The one door to Docker's engine: Dagster starts and stops the containers of its runs through it, and nothing else.

`python -m cv_platform.containers.run_gate PROJECT SERVICE` is the service `run-gate` of docker/compose.yaml;
dagster-docker's `DockerRunLauncher` talks to it as if it were the engine. Who may create containers of any kind is root
on the machine. Here a request decides a command of Dagster and the name of the run: everything else is a copy of the
code location's container, as Compose has made it (image, user, environment, volumes, networks, limits, rights). What
may be seen, started or stopped are such copies only.

https://docs.docker.com/reference/api/engine/
"""

from __future__ import annotations

import http.client
import json
import re
import secrets
import socket
import sys
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cv_platform.containers.run_container import COMPOSE_LABEL, RUN_LABEL, RunRequest, container_of_run

PORT = 2375
SOCKET = Path("/var/run/docker.sock")
KEPT = 20
"""Containers of ended runs that stay, for their logs and how they ended; older ones are removed with the next run."""
MOST_AT_ONCE = 10
"""Runs that work. dagster.yaml allows fewer (`max_concurrent_runs`); this holds for whoever else gets to the gate."""
_LARGEST_BODY_BYTES = 1 << 20
_ENGINE_SECONDS = 120.0
"""Longer than a run has for its end: `stop_grace_period` of the code location."""
_ID = r"[0-9a-f]{12,64}"
_PATH = re.compile(rf"(?:/v\d+\.\d+)?(/_ping|/version|/containers/create|/containers/{_ID}/(?:json|start|stop))")


@dataclass(frozen=True)
class Answer:
    """What the client gets.

    Attributes:
        status: of HTTP.
        body: JSON, or the engine's own text.
    """

    status: int
    body: bytes = b""

    @classmethod
    def of(cls, status: int, content: Any) -> Answer:
        """Returns an answer of JSON."""
        return cls(status, json.dumps(content).encode())

    @classmethod
    def refusal(cls, status: int, message: str) -> Answer:
        """Returns an error as the engine words them."""
        return cls.of(status, {"message": message})


class Engine:
    """The engine behind its socket."""

    def __init__(self, path: Path = SOCKET) -> None:
        self.path = path

    def ask(self, method: str, path: str, content: Any = None) -> Answer:
        """Sends one request in the engine's own version of its interface.

        Raises:
            OSError: there is no engine, or no answer in time.
        """
        connection = _SocketConnection(self.path)
        try:
            body = None if content is None else json.dumps(content)
            connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
            answer = connection.getresponse()
            return Answer(answer.status, answer.read())
        finally:
            connection.close()


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("engine", timeout=_ENGINE_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class RunGate:
    """Decides what becomes of a request.

    Args:
        engine: where the containers are.
        project: Compose's name of the stack.
        service: the code location, of whose container each run's is a copy.
    """

    def __init__(self, engine: Engine, project: str, service: str) -> None:
        self.engine = engine
        self.project = project
        self.service = service

    def answer(self, method: str, target: str, body: bytes) -> Answer:
        """Returns the answer to a request; whatever is not for runs is refused with 403."""
        url = urllib.parse.urlsplit(target)
        found = _PATH.fullmatch(url.path)
        path = found[1] if found else ""
        kind = re.sub(_ID, "…", path)
        if (method, path) in (("GET", "/_ping"), ("HEAD", "/_ping"), ("GET", "/version")):
            return self.engine.ask(method, path)
        if (method, path) == ("POST", "/containers/create"):
            return self._create(body)
        if (method, kind) == ("GET", "/containers/…/json"):
            return self._describe(path)
        if (method, kind) in (("POST", "/containers/…/start"), ("POST", "/containers/…/stop")):
            described = self._describe(path)
            if described.status != 200:
                return described
            if kind.endswith("start"):
                return self._start(path)
            seconds = urllib.parse.parse_qs(url.query).get("t", [""])[0]
            return self.engine.ask("POST", f"{path}?t={seconds}" if seconds.isdigit() else path)
        return Answer.refusal(403, f"Expected a request for the container of a run. Received: {method} {url.path}.")

    def _create(self, body: bytes) -> Answer:
        asked = RunRequest.read(body)
        if asked is None:
            return Answer.refusal(403, "Expected a command of Dagster with the labels of its run. Received: another.")
        template = self._template()
        if template is None:
            return Answer.refusal(
                503, f"Expected a container of {self.service} to copy. Received: none. See: make stack-status"
            )
        networks = sorted(template["NetworkSettings"]["Networks"])
        name = f"{self.project}-run-{asked.run_id[:8]}-{secrets.token_hex(2)}"
        copy = container_of_run(template, asked)
        created = self.engine.ask("POST", f"/containers/create?name={name}", copy)
        if created.status != 201:
            return _without_404(created)
        container_id = json.loads(created.body)["Id"]
        for network in networks:
            if network == copy["HostConfig"]["NetworkMode"]:
                continue
            quoted = urllib.parse.quote(network, safe="")
            joined = self.engine.ask("POST", f"/networks/{quoted}/connect", {"Container": container_id})
            if joined.status != 200:
                self.engine.ask("DELETE", f"/containers/{container_id}?force=true")
                return _without_404(joined)
        self._remove_old()
        return created

    def _start(self, path: str) -> Answer:
        working = [container for container in self._containers(RUN_LABEL) if container["State"] == "running"]
        if len(working) >= MOST_AT_ONCE:
            return Answer.refusal(503, f"Expected fewer than {MOST_AT_ONCE} runs at work. Received: {len(working)}.")
        return self.engine.ask("POST", path)

    def _template(self) -> Mapping[str, Any] | None:
        found = self._containers(
            f"{COMPOSE_LABEL}project={self.project}",
            f"{COMPOSE_LABEL}service={self.service}",
            f"{COMPOSE_LABEL}oneoff=False",
        )
        if not found:
            return None
        return json.loads(self.engine.ask("GET", f"/containers/{found[0]['Id']}/json").body)

    def _describe(self, path: str) -> Answer:
        """Answers with a run's container, without its environment; of others it knows nothing."""
        container_id = path.split("/")[2]
        seen = self.engine.ask("GET", f"/containers/{container_id}/json")
        if seen.status != 200:
            return seen
        container = json.loads(seen.body)
        labels = container["Config"]["Labels"]
        if RUN_LABEL not in labels or labels.get(f"{COMPOSE_LABEL}project") != self.project:
            return Answer.refusal(404, f"No such container: {container_id}")
        shown = {key: container[key] for key in ("Id", "Name", "Image", "Created", "State")}
        return Answer.of(200, {**shown, "Config": {"Labels": labels}})

    def _remove_old(self) -> None:
        ended = [
            container
            for container in self._containers(RUN_LABEL)
            if container["State"] in ("exited", "dead", "created")
        ]
        for container in ended[KEPT:]:
            self.engine.ask("DELETE", f"/containers/{container['Id']}")

    def _containers(self, *labels: str) -> list[Mapping[str, Any]]:
        """Returns the stack's containers with all these labels, the newest first."""
        filters = urllib.parse.quote(json.dumps({"label": [f"{COMPOSE_LABEL}project={self.project}", *labels]}))
        listed = self.engine.ask("GET", f"/containers/json?all=true&filters={filters}")
        if listed.status != 200:
            return []
        return sorted(json.loads(listed.body), key=lambda container: container["Created"], reverse=True)


def _without_404(answer: Answer) -> Answer:
    """Returns the engine's error; a client that reads 404 would ask for the image from a registry."""
    return Answer(500, answer.body) if answer.status == 404 else answer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    gate: RunGate

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > _LARGEST_BODY_BYTES or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            answer = Answer.refusal(413, f"Expected a body of at most {_LARGEST_BODY_BYTES} bytes, with its length.")
        else:
            body = self.rfile.read(int(length))
            try:
                answer = self.gate.answer(self.command, self.path, body)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as err:
                answer = Answer.refusal(502, f"Expected an answer of Docker's engine. Received: {err!r}.")
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        has_body = answer.status not in (204, 304)
        if has_body:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if has_body and self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:
        if not self.path.endswith("/_ping"):
            sys.stderr.write(f"{self.address_string()} {format % args}\n")
            sys.stderr.flush()


def serve(gate: RunGate, address: tuple[str, int]) -> ThreadingHTTPServer:
    """Returns the server, listening; `serve_forever` makes it answer."""
    server = ThreadingHTTPServer(address, type("Handler", (_Handler,), {"gate": gate}))
    server.daemon_threads = True
    return server


def main() -> None:
    """Answers until it is stopped."""
    project, service = sys.argv[1:]
    serve(RunGate(Engine(), project, service), ("0.0.0.0", PORT)).serve_forever()


if __name__ == "__main__":
    main()
