"""Phase `monitoring`: every target answers, every panel and rule has its data, an alert comes and goes."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from cv_platform.containers import engine
from trials.findings import Findings, wait_until
from trials.pace import allowed
from trials.stack.experiment import job_runs, send_window
from trials.stack.promql import Answer, check_queries
from trials.stack.stage import EXPERIMENT, Stage

PROFILE = "monitoring"
ALERT = "DriftFound"
CONFIGURATION = "/etc/prometheus/stack"
TARGETS_SECONDS = 90.0
DATA_SECONDS = 120.0
"""Rates need two measurements, a quarter of a minute apart, of traffic."""
ALERT_SECONDS = 120.0
_LOOK_SECONDS = 5.0


def monitor(stage: Stage, findings: Findings) -> None:
    """Starts the profile `monitoring` and looks at it through nginx; needs what the phase `predict` has left."""
    _start(stage, findings)
    _rules(stage, findings)
    job_runs(stage, findings, "the nightly retention, launched by GraphQL: some panels show it", "log_retention")
    with httpx.Client(base_url=stage.url("PROMETHEUS_PORT"), auth=stage.login, timeout=30) as session:
        with stage.traffic(concurrency=1):
            _wait_for_targets(session, findings)
            answers = _answers(stage, session)
        lacking = [str(answer) for answer in answers if not answer.gave_data]
        findings.add(
            "data for every expression of the dashboards and alert rules",
            f"{len(answers) - len(lacking)} of {len(answers)}"
            + (f"; not: {'; '.join(lacking[:5])}" if lacking else ""),
            bool(answers) and not lacking,
        )
        _alert(stage, findings, session)


def _start(stage: Stage, findings: Findings) -> None:
    described = json.loads(stage.checkout.compose("--profile", PROFILE, "config", "--format", "json"))["services"]
    images = {name: of["image"] for name, of in described.items() if PROFILE in of.get("profiles", [])}
    absent = {name for name, image in images.items() if not engine.docker("image", "ls", "--quiet", image)}
    if absent:  # An engine without a registry starts what it has.
        present = sorted(images.keys() - absent)
        stage.checkout.compose("--profile", PROFILE, "up", "--detach", "--no-deps", *present)
    else:
        stage.checkout.change(COMPOSE_PROFILES=PROFILE)
        stage.checkout.run("stack-up", stage.artifacts / "commands.log")
    stage.wait_until_well()
    findings.add(
        f"the profile `{PROFILE}` healthy",
        f"{len(images) - len(absent)} services of {len(images)}"
        + (f"; without {', '.join(sorted(absent))}, whose image this engine lacks" if absent else ""),
        len(images) > len(absent),
    )


def _rules(stage: Stage, findings: Findings) -> None:
    """Has promtool, of Prometheus' image, judge configuration and rules, and run the rules' own tests."""
    command = f"cd {CONFIGURATION} && promtool check config prometheus.yml && promtool test rules tests/*.yml"
    said = stage.checkout.compose("--profile", PROFILE, "exec", "-T", "prometheus", "sh", "-c", command)
    tests = len(list((stage.checkout.folder / "docker" / "prometheus" / "tests").glob("*.yml")))
    successes = said.count("SUCCESS")
    findings.add(
        f"configuration, rules and {tests} files of their tests as promtool wants them",
        f"{successes} times SUCCESS",
        tests > 0 and successes >= 1 + tests,
    )


def _answers(stage: Stage, session: httpx.Client) -> list[Answer]:
    """Asks every expression until each gives data, or `DATA_SECONDS` are over."""
    deadline = time.monotonic() + allowed(DATA_SECONDS)
    while True:
        answers = check_queries(stage.url("PROMETHEUS_PORT"), session)
        if all(answer.gave_data for answer in answers) or time.monotonic() > deadline:
            return answers
        time.sleep(_LOOK_SECONDS)


def _alert(stage: Stage, findings: Findings, session: httpx.Client) -> None:
    """Lets a report with drift fire an alert, and one without end it."""
    if stage.dagster.latest(EXPERIMENT, "drift_report").get("verdict") != "drift":
        send_window(stage, findings, is_shifted=True)
    fired = wait_until(
        lambda: "firing" in _states(session) and _is_told(stage), seconds=ALERT_SECONDS, what=f"{ALERT} to fire"
    )
    _passed_on(stage, findings)
    send_window(stage, findings, is_shifted=False)
    resolved = wait_until(
        lambda: not _states(session) and not _is_told(stage), seconds=ALERT_SECONDS, what=f"{ALERT} to resolve"
    )
    findings.add(
        f"{ALERT} fires, Alertmanager has it, and it resolves after a report without drift",
        f"fired (waited {fired:.0f} s), resolved {resolved:.0f} s after the report",
        True,
    )


def _passed_on(stage: Stage, findings: Findings) -> None:
    """Has the code location ask Prometheus, as its sensor `service_alerts` does."""
    script = (
        "import os; from cv_platform.monitoring.service_alerts import firing; "
        "print([one.title for one in firing(os.environ['PROMETHEUS_URL'], but_for=())])"
    )
    said = stage.checkout.compose("exec", "-T", "dagster-code", "python", "-c", script).strip()
    findings.add("what fires is seen by the sensor that passes it on", said, ALERT in said)


def _targets(session: httpx.Client) -> list[dict[str, Any]]:
    return session.get("/api/v1/targets").raise_for_status().json()["data"]["activeTargets"]


def _wait_for_targets(session: httpx.Client, findings: Findings) -> None:
    begin, limit = time.monotonic(), allowed(TARGETS_SECONDS)
    while True:
        targets, took = _targets(session), time.monotonic() - begin
        down = sorted(target["labels"]["job"] for target in targets if target["health"] != "up")
        if (targets and not down) or took > limit:
            break
        time.sleep(_LOOK_SECONDS)
    findings.add(
        "every target up in Prometheus",
        f"{len(targets) - len(down)} of {len(targets)} after {took:.0f} s"
        + (f"; not: {', '.join(down)}" if down else ""),
        bool(targets) and not down,
    )


def _states(session: httpx.Client) -> set[str]:
    alerts = session.get("/api/v1/alerts").raise_for_status().json()["data"]["alerts"]
    return {alert["state"] for alert in alerts if alert["labels"]["alertname"] == ALERT}


def _is_told(stage: Stage) -> bool:
    alerts = stage.get("ALERTMANAGER_PORT", "/api/v2/alerts", active="true")
    return any(alert["labels"]["alertname"] == ALERT for alert in alerts)
