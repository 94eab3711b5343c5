from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks.services import worker_pids
from cv_platform_tests.support.waiting import wait_until
from trials.findings import Findings
from trials.hostile_load import send_hostile
from trials.mutations import HostileUpload
from trials.soak.disk import on_a_small_disk
from trials.soak.stage import Scale
from trials.soak.workers import client_ports, kill_service
from trials.traffic import Traffic, failures, statuses


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers 200 with a prediction id, 503 to every fifth request, and cuts every seventh off."""

    protocol_version = "HTTP/1.1"
    requests = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:
            Handler.requests += 1
            number = Handler.requests
        if number % 7 == 0:
            self.close_connection = True
            return
        body = json.dumps({"prediction_id": f"id-{number}", "model_version": "v"}).encode()
        self.send_response(503 if number % 5 == 0 else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        return None


@pytest.fixture
def server_url() -> Iterator[str]:
    Handler.requests = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_traffic_remembers_each_request_by_its_answer(server_url: str) -> None:
    with Traffic(server_url, [b"one", b"two"], concurrency=3) as traffic:
        assert traffic.wait_for(40, seconds=30)
    outcomes = traffic.outcomes
    assert len(outcomes) == Handler.requests
    ids = [outcome.prediction_id for outcome in outcomes if outcome.status == 200]
    assert len(set(ids)) == len(ids) >= 40
    # Of 35 consecutive numbers 5 are multiples of 7, and 6 further ones multiples of 5.
    lost = sum(outcome.status == 0 for outcome in outcomes)
    assert lost == len(outcomes) // 7
    assert len(failures(outcomes)) == lost + sum(n % 5 == 0 and n % 7 != 0 for n in range(1, len(outcomes) + 1))
    assert f"none × {lost}" in statuses(outcomes)
    assert all(outcome.client_port for outcome in outcomes)


def test_traffic_survives_a_server_that_is_not_there() -> None:
    with Traffic("http://127.0.0.1:9", [b"one"], concurrency=2) as traffic:
        assert not traffic.wait_for(1, seconds=0.3)
    assert {outcome.status for outcome in traffic.outcomes} == {0}
    assert {outcome.client_port for outcome in traffic.outcomes} == {None}


def test_hostile_uploads_with_wrong_answers_are_named_and_kept(server_url: str, tmp_path: Path) -> None:
    result = send_hostile(
        server_url,
        lambda number: HostileUpload(f"upload-{number}", bytes([number])),
        14,
        concurrency=1,
        answer_seconds=10,
        failures=tmp_path / "failures",
    )
    # By order: 5 and 10 get 503, 7 and 14 nothing.
    assert dict(result.statuses) == {200: 10, 503: 2, 0: 2}
    kept = {path.name: path.read_bytes() for path in (tmp_path / "failures").iterdir()}
    assert kept == {f"upload-{number}": bytes([number]) for number in (4, 6, 9, 13)}
    assert [line.partition(":")[0] for line in result.wrong] == ["upload-4", "upload-6", "upload-9", "upload-13"]


def test_findings_say_what_did_not_hold() -> None:
    findings = Findings()
    findings.add("1 request", 1, True)
    findings.add("0 failed", "3 failed", False)
    check = findings.check("a. swaps")
    assert (check.expected, check.received, check.held) == ("1 request; 0 failed", "1; NOT: 3 failed", False)
    assert str(check) == "FAILED  a. swaps: expected 1 request; 0 failed. Received: 1; NOT: 3 failed."


def test_a_share_of_the_soak_keeps_its_least() -> None:
    assert Scale().count(10_000, least=400) == 10_000
    assert Scale(0.1).count(10_000, least=400) == 1_000
    assert Scale(0.001).count(10_000, least=400) == 400
    assert (Scale(0.5).seconds(60, least=5), Scale(0.01).seconds(60, least=5)) == (30, 5)


def test_a_small_disk_belongs_to_the_command_alone() -> None:
    command = on_a_small_disk(["serve", "a b"], "/home of/spool")
    assert command[0] == "unshare"
    assert ("--map-root-user" in command) == (os.geteuid() != 0)
    assert command[-1] == "mount -t tmpfs -o size=128m,mode=700 tmpfs '/home of/spool' && exec serve 'a b'"


def test_workers_are_the_processes_below_that_have_a_worker_id() -> None:
    start = (
        "import subprocess, sys, time; code = 'import time; time.sleep(300)'; "
        "[subprocess.Popen([sys.executable, '-c', code, *more]) for more in {}]; input()"
    )
    children = [["--worker-id", "1"], ["--other", "1"], ["--worker-id", "2"]]
    with subprocess.Popen([sys.executable, "-c", start.format(children)], stdin=subprocess.PIPE) as server:
        wait_until(lambda: len(worker_pids(server.pid)) == 2)
        workers = [psutil.Process(pid) for pid in worker_pids(server.pid)]
        assert [worker.cmdline()[-2:] for worker in workers] == [["--worker-id", "1"], ["--worker-id", "2"]]
        kill_service(server.pid)
    wait_until(lambda: not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers))


def test_the_clients_of_a_worker_are_those_that_are_connected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_server(("127.0.0.1", 0)):
        before = client_ports(os.getpid())
        with socket.create_connection(listening.getsockname()) as client:
            accepted, _ = listening.accept()
            with accepted:
                assert client.getsockname()[1] in client_ports(os.getpid()) - before
