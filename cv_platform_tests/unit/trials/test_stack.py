from __future__ import annotations

import http.server
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Report
from benchmarks.options import REPOSITORY
from cv_platform.containers.env_file import env_problems, read_env
from cv_platform.containers.preflight import PORTS
from cv_platform.errors import ServiceError
from trials.__main__ import main
from trials.findings import Findings
from trials.options import STACK_EXTRA_PHASES, STACK_PHASES, Options
from trials.stack import run as stack_run
from trials.stack.checkout import PROJECT, Checkout, free_ports, own_values, with_values
from trials.stack.dagster_api import DagsterApi
from trials.stack.run import BUDGET_SECONDS, PHASES, bounded
from trials.stack.scans import listeners, places_of, process_status
from trials.stack.stage import Stage
from trials.stack.up import size_of


def test_the_tested_stack_shares_nothing_with_the_users(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "copy")
    checkout.make({"CV_SERVICE_REPLICAS": "3"})
    values = checkout.values
    assert checkout.project == values["STACK_NAME"] == PROJECT != "cv-platform"
    assert Checkout(tmp_path / "nothing").project == PROJECT
    assert env_problems(checkout.folder / "docker" / ".env.example", checkout.env_file) == []
    assert checkout.env_file.stat().st_mode & 0o777 == 0o600
    ports = [int(values[name]) for name in PORTS]
    assert len(set(ports)) == len(PORTS)
    assert set(ports).isdisjoint(int(port) for port in PORTS.values())
    assert values["BIND_ADDRESS"] == "127.0.0.1"
    assert values["CV_SERVICE_REPLICAS"] == "3"
    example = read_env(REPOSITORY / "docker" / ".env.example")
    assert {name: values[name] for name in example if name.startswith("CV_LOG_")} == {
        name: value for name, value in example.items() if name.startswith("CV_LOG_")
    }
    # What its commands need, and nothing of the user's.
    assert (checkout.folder / "Makefile").exists()
    assert (checkout.folder / "cv_platform" / "containers" / "__main__.py").exists()
    assert not {".venv", ".git", "build", "test-artifacts", "backups"} & {
        path.name for path in checkout.folder.iterdir()
    }


def test_each_copy_has_other_secrets(tmp_path: Path) -> None:
    secrets = []
    for name in ("one", "two"):
        checkout = Checkout(tmp_path / name)
        checkout.make({})
        secrets.append(checkout.values["POSTGRES_PASSWORD"])
    assert secrets[0] != secrets[1]


def test_a_changed_setting_leaves_the_others_and_the_mode(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path / "copy")
    checkout.make({})
    before = checkout.values
    checkout.change(COMPOSE_PROFILES="monitoring")
    assert checkout.values == {**before, "COMPOSE_PROFILES": "monitoring"}
    assert checkout.env_file.stat().st_mode & 0o777 == 0o600


def test_the_callers_variables_do_not_reach_the_tested_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = Checkout(tmp_path / "copy")
    checkout.make({})
    monkeypatch.setenv("STACK_NAME", "of-the-user")
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", "of-the-user")
    assert {"STACK_NAME", "COMPOSE_PROJECT_NAME"}.isdisjoint(checkout.environment())
    assert "PATH" in checkout.environment()


def test_values_of_an_env_file_are_replaced_in_place_or_added() -> None:
    text = "# A=comment\nA=1\nB=2\n"
    assert with_values(text, {"B": "3", "C": "4"}) == "# A=comment\nA=1\nB=3\nC=4\n"


def test_no_container_gets_more_cpus_than_the_machine_has() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = own_values({"SMALL_CPUS": "0.5", "LARGE_CPUS": f"{cores + 1}.0"})
    assert values["LARGE_CPUS"] == f"{cores}.0"
    assert "SMALL_CPUS" not in values


def test_ports_are_not_those_that_clients_get() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(20_000 <= port < 30_000 for port in ports)


def test_a_phase_that_takes_too_long_is_broken_off() -> None:
    with pytest.raises(ServiceError, match="Expected kills to end"), bounded(0.05, "kills"):
        time.sleep(30)
    with pytest.raises(ServiceError, match="none left"), bounded(-1.0, "kills"):
        pytest.fail("It began without time.")
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_every_phase_of_the_options_can_be_played_and_has_a_bound() -> None:
    assert tuple(PHASES) == (*STACK_PHASES, *STACK_EXTRA_PHASES)
    assert all(0 < phase.seconds < BUDGET_SECONDS <= 1200 for phase in PHASES.values())


def chosen_phases(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, ...]:
    """Returns which phases `python -m trials stack` plays; none is played here."""
    chosen: list[Options] = []

    def run(options: Options) -> Report:
        chosen.append(options)
        raise ServiceError("Not here.")

    monkeypatch.setattr(stack_run, "run", run)
    assert main(["stack", *arguments]) == 1
    return tuple(chosen[0].phases)


def test_the_long_phases_are_played_when_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    default = chosen_phases(monkeypatch)
    assert default == ("up", "digits", "predict", "monitoring", "scans", "kills", "roll", "tls", "reboot", "restore")
    assert chosen_phases(monkeypatch, "--phases", "up,processes,containers") == ("up", "processes", "containers")


def test_unknown_phases_of_the_stack_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["stack", "--phases", "up,lunch"])
    assert "--phases of up,digits,predict" in capsys.readouterr().err


def test_findings_become_a_check_each() -> None:
    findings = Findings()
    findings.add("1 request", 1, True)
    findings.add("0 failed", "3 failed", False)
    checks = findings.checks("kills")
    assert [(check.what, check.received, check.held) for check in checks] == [
        ("kills", "1", True),
        ("kills", "3 failed", False),
    ]
    assert not findings.held


def test_sizes_are_read_as_docker_words_them() -> None:
    assert size_of("1.5GiB ") == 1.5 * 2**30
    assert size_of(" 123.4MiB") == 123.4 * 2**20
    assert size_of("0B") == 0
    assert size_of("--") == 0


def test_secrets_are_reported_by_name_only() -> None:
    found = places_of(
        {"A_PASSWORD": "hunter2hunter2", "B_TOKEN": "x" * 16}, {"a log": "… hunter2hunter2 …", "a label": ""}
    )
    assert found == ["A_PASSWORD in a log"]


def test_listening_sockets_and_rights_are_read_from_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    line = "   {}: {}:{} 00000000:0000 {} 00000000:00000000 00:00000000 00000000 0 0 1 1\n"
    # 0x1F90 = 8080 listens on 127.0.0.1; 0x1F91 on all addresses; 0x1F92 is a connection.
    rows = [("0100007F", "1F90", "0A"), ("00000000", "1F91", "0A"), ("0100007F", "1F92", "01")]
    (tmp_path / "net" / "tcp").write_text("head\n" + "".join(line.format(n, *row) for n, row in enumerate(rows)))
    assert listeners(tmp_path) == {("127.0.0.1", 8080), ("0.0.0.0", 8081)}

    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text(
        "Name:\tpython\nUid:\t10001\t10001\t10001\t10001\nCapEff:\t0000000000000000\n"
    )
    assert process_status(7, tmp_path)["Uid"].split() == ["10001"] * 4
    assert process_status(8, tmp_path) == {}


class Dagster(http.server.BaseHTTPRequestHandler):
    """Answers GraphQL as Dagster does: a run that is QUEUED, STARTED, and then ends as `ending` says."""

    ending = "SUCCESS"
    asked: list[dict[str, Any]]
    looks = 0

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({**asked, "authorization": self.headers["Authorization"]})
        body = json.dumps({"data": self._answer(asked["query"], asked["variables"])}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "repositoriesOrError" in query:
            return {"repositoriesOrError": {"nodes": [{"name": "__repository__", "location": {"name": "cv_platform"}}]}}
        if "launchRun" in query:
            if variables["parameters"]["selector"]["jobName"] != "digits_experiment":
                return {"launchRun": {"__typename": "PipelineNotFoundError", "message": "no such job"}}
            return {"launchRun": {"__typename": "LaunchRunSuccess", "run": {"runId": "r1"}}}
        if "logsForRun" in query:
            failure = {"stepKey": "digits__bento", "error": {"message": "outer", "cause": {"message": "disk full\n"}}}
            return {"logsForRun": {"events": [{}, failure]}}
        if "assetOrError" in query:
            entries = [{"label": "accuracy", "floatValue": 0.99}, {"label": "version", "text": "v7"}, {"label": "plot"}]
            return {"assetOrError": {"assetMaterializations": [{"runId": "r1", "metadataEntries": entries}]}}
        Dagster.looks += 1
        status = ["QUEUED", "STARTED", Dagster.ending][min(Dagster.looks, 3) - 1]
        steps = [{"stepKey": "digits__bento", "status": "SUCCESS" if status == "SUCCESS" else "FAILURE"}]
        return {"runOrError": {"status": status, "startTime": 100.0, "endTime": 160.5, "stepStats": steps}}

    def log_message(self, format: str, *args: object) -> None:
        return None


@contextmanager
def dagster(ending: str) -> Iterator[DagsterApi]:
    Dagster.ending, Dagster.asked, Dagster.looks = ending, [], 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dagster)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield DagsterApi(f"http://127.0.0.1:{server.server_address[1]}", "admin", "secret", look_seconds=0.01)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_run_is_launched_and_waited_for_with_the_login() -> None:
    with dagster("SUCCESS") as api:
        run = api.launch("digits_experiment", {"resources": {}})
        end = api.wait(run, seconds=10)
        metadata = api.latest("digits", "evaluation")
    assert (end.status, end.seconds, end.problem) == ("SUCCESS", 60.5, "")
    assert end.steps == {"digits__bento": "SUCCESS"}
    assert metadata == {"accuracy": 0.99, "version": "v7", "plot": None, "run_id": "r1"}
    # base64 of "admin:secret".
    assert {asked["authorization"] for asked in Dagster.asked} == {"Basic YWRtaW46c2VjcmV0"}


def test_a_failed_run_says_which_step_and_why() -> None:
    with dagster("FAILURE") as api:
        end = api.wait("r1", seconds=10)
    assert (end.status, end.problem) == ("FAILURE", "digits__bento: disk full")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda api: api.launch("lunch"), "Expected Dagster to launch lunch"),
        (lambda api: DagsterApi("http://127.0.0.1:9", "a", "b").ask("{ version }"), "Expected an answer"),
    ],
)
def test_what_dagster_refuses_is_an_error_with_its_words(act: Callable[[DagsterApi], Any], message: str) -> None:
    with dagster("SUCCESS") as api, pytest.raises(ServiceError, match=message):
        act(api)


@pytest.mark.parametrize(
    ("asked", "served", "played"),
    [
        ({"ray"}, None, {"ray", "digits"}),
        ({"ray"}, "a version", {"ray"}),
        ({"up", "kills"}, "of the stack before", {"up", "kills", "digits"}),
        ({"up"}, None, {"up"}),
    ],
)
def test_a_phase_by_name_has_a_model_to_ask(
    asked: set[str], served: str | None, played: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "health", lambda stage: {"status_code": 200, "model_version": served})
    assert stack_run._with_a_model(Stage(Checkout(tmp_path), tmp_path), asked) == played
