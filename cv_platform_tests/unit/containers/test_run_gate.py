"""The gate before Docker's engine: asked by dagster-docker's own client, in front of an engine of the test's own."""

from __future__ import annotations

import json
import re
import socketserver
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import docker.errors
import httpx
import pytest

import docker
from cv_platform.containers.run_container import RUN_LABEL, RunRequest, container_of_run
from cv_platform.containers.run_gate import KEPT, MOST_AT_ONCE, Engine, RunGate, serve

RUN_ID = "10604b2c-29af-4c58-8c1b-4ecec57ccfae"
COMMAND = ["dagster", "api", "execute_run", "{}"]
LABELS = {"dagster/run_id": RUN_ID, "dagster/job_name": "digits_retrain"}
STACK = {"com.docker.compose.project": "stack", "com.docker.compose.service": "dagster-code"}
CODE_ID, OTHER_ID = "c" * 64, "d" * 64


class FakeEngine:
    """Answers as Docker's engine does, of containers that it keeps in memory."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.networks: dict[str, list[str]] = {}
        self.containers: dict[str, dict[str, Any]] = {}
        self.add(CODE_ID, {**STACK, "com.docker.compose.oneoff": "False", "com.docker.compose.config-hash": "1"})
        self.add(OTHER_ID, {"com.docker.compose.project": "other", RUN_LABEL: RUN_ID})

    def add(self, container_id: str, labels: dict[str, str], *, state: str = "running", created: int = 0) -> None:
        """Adds a container with everything that a code location's has."""
        self.containers[container_id] = {
            "Id": container_id,
            "Name": f"/{container_id[:4]}",
            "Created": created,
            "Image": "sha256:" + "1" * 64,
            "State": {"Status": state},
            "Config": {
                "Env": ["DATABASE_URL=postgresql://request_log:secret@postgres/request_log"],
                "User": "10001:10001",
                "WorkingDir": "/app",
                "StopTimeout": 60,
                "Labels": labels,
            },
            "HostConfig": {
                "NetworkMode": "stack_back",
                "Binds": ["/configs:/app/configs:ro"],
                "CapDrop": ["ALL"],
                "ReadonlyRootfs": True,
                "Memory": 6 << 30,
                "RestartPolicy": {"Name": "unless-stopped"},
            },
            "NetworkSettings": {"Networks": {"stack_back": {}, "stack_front": {}}},
        }

    def answer(self, method: str, target: str, content: Any) -> tuple[int, Any]:
        """Returns status and body of an answer."""
        self.requests.append(f"{method} {target}")
        url = urllib.parse.urlsplit(target)
        query = urllib.parse.parse_qs(url.query)
        parts = url.path.strip("/").split("/")
        if url.path == "/version":
            return 200, {"ApiVersion": "1.41", "Version": "20.10.24"}
        if url.path == "/_ping":
            return 200, "OK"
        if url.path == "/containers/json":
            wanted = set(json.loads(query["filters"][0])["label"])
            return 200, [
                {"Id": c["Id"], "State": c["State"]["Status"], "Created": c["Created"]}
                for c in self.containers.values()
                if wanted <= {form for n, v in c["Config"]["Labels"].items() for form in (n, f"{n}={v}")}
            ]
        if url.path == "/containers/create":
            new = f"{len(self.containers):064x}"
            self.add(new, content["Labels"], state="created", created=1000 + len(self.containers))
            self.containers[new]["asked"] = content
            return 201, {"Id": new, "Warnings": []}
        if parts[0] == "networks":
            self.networks.setdefault(parts[1], []).append(content["Container"])
            return 200, ""
        if parts[1] not in self.containers:
            return 404, {"message": f"No such container: {parts[1]}"}
        if method == "DELETE":
            del self.containers[parts[1]]
            return 204, ""
        if parts[2] == "json":
            return 200, self.containers[parts[1]]
        self.containers[parts[1]]["State"] = {"Status": {"start": "running", "stop": "exited"}[parts[2]]}
        return 204, ""


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def address(engine: FakeEngine, tmp_path: Path) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = engine.answer(self.command, self.path, json.loads(body) if body else None)
            self.send_response(status)
            self.end_headers()
            if status != 204:
                self.wfile.write(json.dumps(content).encode())

        do_POST = do_DELETE = do_GET

        def address_string(self) -> str:
            return "socket"

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    path = tmp_path / "docker.sock"
    gate = serve(RunGate(Engine(path), "stack", "dagster-code"), ("127.0.0.1", 0))
    with socketserver.ThreadingUnixStreamServer(str(path), Handler) as behind, running(behind), running(gate):
        yield f"127.0.0.1:{gate.server_address[1]}"


@pytest.fixture
def client(address: str) -> Iterator[docker.DockerClient]:
    client = docker.DockerClient(base_url=f"tcp://{address}")
    yield client
    client.close()


def make(client: docker.DockerClient, **other: Any) -> Any:
    return client.containers.create(image="dagster-code", command=COMMAND, detach=True, labels=LABELS, **other)


def test_a_run_is_a_copy_of_the_code_location_with_its_own_command(
    engine: FakeEngine, client: docker.DockerClient
) -> None:
    asked = engine.containers[make(client).id]["asked"]
    code = engine.containers[CODE_ID]
    assert asked["Cmd"] == COMMAND
    assert asked["Image"] == code["Image"]
    assert asked["Env"] == [*code["Config"]["Env"], "DAGSTER_RUN_JOB_NAME=digits_retrain"]
    assert {name: asked[name] for name in ("User", "WorkingDir", "StopTimeout")} == {
        "User": "10001:10001",
        "WorkingDir": "/app",
        "StopTimeout": 60,
    }
    kept = {name: value for name, value in code["HostConfig"].items() if name != "RestartPolicy"}
    assert {name: asked["HostConfig"][name] for name in kept} == kept
    assert asked["HostConfig"]["RestartPolicy"] == {"Name": "no"}


def test_a_run_is_in_every_network_of_the_code_location(engine: FakeEngine, client: docker.DockerClient) -> None:
    run = make(client)
    assert engine.containers[run.id]["asked"]["HostConfig"]["NetworkMode"] == "stack_back"
    assert engine.networks == {"stack_front": [run.id]}


def test_compose_takes_a_run_for_a_one_off_of_the_code_location(
    engine: FakeEngine, client: docker.DockerClient
) -> None:
    labels = engine.containers[make(client).id]["asked"]["Labels"]
    assert labels == {**STACK, "com.docker.compose.oneoff": "True", **LABELS, RUN_LABEL: RUN_ID}


def test_nothing_else_that_is_asked_for_becomes_part_of_a_run(engine: FakeEngine, client: docker.DockerClient) -> None:
    plain = engine.containers[make(client).id]["asked"]
    greedy = make(
        client,
        privileged=True,
        user="root",
        volumes=["/:/host:rw"],
        pid_mode="host",
        cap_add=["SYS_ADMIN"],
        network="host",
        environment={"LD_PRELOAD": "/tmp/x.so"},
        entrypoint="/bin/sh",
    )
    assert engine.containers[greedy.id]["asked"] == plain


def test_runs_are_started_seen_and_stopped(engine: FakeEngine, client: docker.DockerClient) -> None:
    run = make(client)
    run.start()
    assert client.containers.get(run.id).status == "running"
    run.stop(timeout=7)
    assert client.containers.get(run.id).status == "exited"
    assert f"POST /containers/{run.id}/stop?t=7" in engine.requests


def test_what_is_seen_of_a_run_has_no_passwords(client: docker.DockerClient) -> None:
    assert "secret" not in json.dumps(make(client).attrs)


@pytest.mark.parametrize("container_id", [CODE_ID, OTHER_ID])
def test_other_containers_are_neither_seen_nor_touched(
    engine: FakeEngine, client: docker.DockerClient, container_id: str
) -> None:
    for act in (client.api.inspect_container, client.api.start, client.api.stop):
        with pytest.raises(docker.errors.NotFound):
            act(container_id)
    assert engine.containers[container_id]["State"] == {"Status": "running"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/containers/json"),
        ("GET", "/v1.41/info"),
        ("GET", "/v1.41/images/json"),
        ("POST", "/v1.41/images/create"),
        ("POST", f"/v1.41/containers/{CODE_ID}/exec"),
        ("POST", f"/v1.41/containers/{CODE_ID}/kill"),
        ("GET", f"/v1.41/containers/{CODE_ID}/archive"),
        ("GET", f"/v1.41/containers/{CODE_ID}/../{CODE_ID}/json/"),
        ("GET", "/v1.41/containers/create"),
        ("POST", "/v1.41/volumes/create"),
        ("POST", "/v1.41/containers/create/../../build"),
    ],
)
def test_refuses_what_runs_do_not_need(engine: FakeEngine, address: str, method: str, path: str) -> None:
    answer = httpx.request(method, httpx.URL(f"http://{address}", raw_path=path.encode()))
    assert answer.status_code == 403
    assert method in answer.json()["message"]
    assert engine.requests == []


def test_refuses_methods_of_other_kinds(engine: FakeEngine, address: str) -> None:
    assert httpx.delete(f"http://{address}/v1.41/containers/{CODE_ID}").status_code == 501
    assert engine.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"Cmd": ["dagster", "api"]}',
        json.dumps({"Cmd": ["sh", "-c", "id"], "Labels": LABELS}).encode(),
        json.dumps({"Cmd": "dagster api", "Labels": LABELS}).encode(),
        json.dumps({"Cmd": ["dagster", "api", 1], "Labels": LABELS}).encode(),
        json.dumps({"Cmd": COMMAND, "Labels": {**LABELS, "dagster/run_id": "../../x"}}).encode(),
        json.dumps({"Cmd": COMMAND, "Labels": {**LABELS, "dagster/job_name": "a b"}}).encode(),
    ],
)
def test_creates_nothing_but_runs(engine: FakeEngine, address: str, body: bytes) -> None:
    answer = httpx.post(f"http://{address}/v1.41/containers/create", content=body)
    assert answer.status_code == 403
    assert engine.requests == []


def test_refuses_bodies_that_are_too_large_or_of_no_length(address: str) -> None:
    url = f"http://{address}/v1.41/containers/create"
    assert httpx.post(url, content=b" " * 2_000_000).status_code == 413
    assert httpx.post(url, content=iter([b"{}"])).status_code == 413


def test_without_a_code_location_says_what_is_missing(engine: FakeEngine, client: docker.DockerClient) -> None:
    del engine.containers[CODE_ID]
    with pytest.raises(docker.errors.APIError, match="Expected a container of dagster-code") as error:
        make(client)
    assert not isinstance(error.value, docker.errors.ImageNotFound)  # Else the client would ask a registry for it.


def test_keeps_the_newest_containers_of_ended_runs_and_every_running_one(
    engine: FakeEngine, client: docker.DockerClient
) -> None:
    of_run = {**STACK, "com.docker.compose.oneoff": "True", RUN_LABEL: RUN_ID}
    for number in range(KEPT + 5):
        engine.add(f"{number:064d}", of_run, state="exited", created=number)
    engine.add("e" * 64, of_run, created=1)
    made = make(client)
    left = set(engine.containers) - {CODE_ID, OTHER_ID, "e" * 64, made.id}
    assert "e" * 64 in engine.containers
    assert left == {f"{number:064d}" for number in range(6, KEPT + 5)}


def test_lets_no_more_than_some_runs_work_at_once(engine: FakeEngine, client: docker.DockerClient) -> None:
    of_run = {**STACK, "com.docker.compose.oneoff": "True", RUN_LABEL: RUN_ID}
    for number in range(MOST_AT_ONCE - 1):
        engine.add(f"{number:064d}", of_run)
    make(client).start()
    one_more = make(client)
    with pytest.raises(docker.errors.APIError, match=f"fewer than {MOST_AT_ONCE} runs"):
        one_more.start()
    assert engine.containers[one_more.id]["State"] == {"Status": "created"}


def test_an_engine_that_is_away_is_a_gateways_error(tmp_path: Path) -> None:
    gate = serve(RunGate(Engine(tmp_path / "none.sock"), "stack", "dagster-code"), ("127.0.0.1", 0))
    with running(gate):
        answer = httpx.get(f"http://127.0.0.1:{gate.server_address[1]}/_ping")
    assert answer.status_code == 502
    assert re.search("Expected an answer of Docker's engine", answer.json()["message"])


def test_a_run_of_a_gpus_code_location_has_its_devices() -> None:
    engine = FakeEngine()
    template = engine.containers[CODE_ID]
    template["HostConfig"]["DeviceRequests"] = [{"Driver": "nvidia", "Count": 1, "Capabilities": [["gpu"]]}]
    run = RunRequest.read(json.dumps({"Cmd": COMMAND, "Labels": LABELS}).encode())
    assert run is not None
    assert container_of_run(template, run)["HostConfig"]["DeviceRequests"] == template["HostConfig"]["DeviceRequests"]
