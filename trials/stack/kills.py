"""Phases `kills` and `reboot`: containers die, one after the other under load and all at once; all has to come back.

`docker kill` would prove nothing: Docker takes it for a person's wish and does not start the container again. Here the
processes in the container are killed, as the kernel does it when memory ends.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cv_platform.containers import engine
from cv_platform.containers.engine import Container
from cv_platform.errors import ServiceError
from trials.findings import Findings, wait_until
from trials.stack.experiment import job_runs
from trials.stack.stage import EXPERIMENT, Stage, add_rows
from trials.traffic import Outcome, failures, statuses

CONCURRENCY = 4
RETURN_SECONDS = 150.0
REBOOT_SECONDS = 300.0
LOAD_SECONDS = 60.0
AROUND = 100
"""Answers before a kill, and after the return."""


@dataclass(frozen=True)
class Victim:
    """A service of which one container is killed."""

    service: str
    most_failures: int
    """Requests that may fail: those that were in flight in the container itself."""


VICTIMS = (
    Victim("postgres", 0),
    Victim("service", CONCURRENCY),
    Victim("dagster-daemon", 0),
    Victim("dagster-code", 0),
    Victim("mlflow", 0),
)


def kill_each(stage: Stage, findings: Findings) -> None:
    """Kills a container of each of the `VICTIMS` under load; nothing that was answered may be lost."""
    for victim in VICTIMS:
        with stage.traffic(concurrency=CONCURRENCY) as traffic:
            before = traffic.wait_for(AROUND, seconds=LOAD_SECONDS)
            killed = stage.container(victim.service)
            seconds = kill_and_wait(killed)
            after = traffic.wait_for(AROUND, seconds=LOAD_SECONDS)
        outcomes = traffic.outcomes
        failed = failures(outcomes)
        findings.add(
            f"{killed.service} killed: ≤ {victim.most_failures} failed, healthy within {RETURN_SECONDS:.0f} s",
            f"{statuses(outcomes)}{_which(failed)}, healthy after {seconds:.0f} s",
            before and after and len(failed) <= victim.most_failures,
        )
        add_rows(findings, stage, outcomes)
    job_runs(stage, findings, "a drift report after all kills", f"{EXPERIMENT}_drift_report", tries=5)


def reboot(stage: Stage, findings: Findings) -> None:
    """Kills every container at the same moment, as a machine's reboot does; then stops and starts them in order."""
    rows, version = _kept(stage)
    running = [container for container in stage.containers() if container.state == "running"]
    begin = time.monotonic()
    started = [_started(container) for container in running]
    for container in running:
        _kill_processes(container)
    wait_until(
        lambda: all(_started(c) != before for c, before in zip(running, started, strict=True)) and stage.is_well(),
        seconds=REBOOT_SECONDS,
        what="every container started again and healthy",
    )
    findings.add(
        "all containers killed at once: back by themselves",
        f"{len(running)} healthy after {time.monotonic() - begin:.0f} s, started by the engine in no order",
        True,
    )
    _same(stage, findings, rows, version)
    begin = time.monotonic()
    log = stage.artifacts / "commands.log"
    stage.checkout.run("stack-down", log)
    left = [container.name for container in stage.containers()]
    down = time.monotonic() - begin
    stage.checkout.run("stack-up", log)
    findings.add(
        "stack-down, stack-up: no container left between, all healthy afterwards",
        f"{len(left)} left after {down:.0f} s, healthy after {time.monotonic() - begin - down:.0f} s more",
        not left and stage.is_well(),
    )
    _same(stage, findings, rows, version)
    answers = stage.predict([digit.png for digit in stage.digits[:50]])
    identifiers = {str(answer.get("prediction_id")) for answer in answers if answer["status"] == 200}
    missing = stage.missing_rows(identifiers)
    findings.add(
        "predictions afterwards: 50 × 200, each with its row",
        f"{len(identifiers)} × 200, {len(identifiers) - missing} rows",
        len(identifiers) == len(answers) and not missing,
    )


def kill_and_wait(container: Container, *, seconds: float = RETURN_SECONDS) -> float:
    """Kills all processes of a container, and returns the seconds until the engine has it healthy again.

    Raises:
        ServiceError: it was not healthy in time.
    """
    before = _started(container)
    begin = time.monotonic()
    _kill_processes(container)
    wait_until(
        lambda: _started(container) != before and _health(container) == "healthy",
        seconds=seconds,
        what=f"{container.name} to be healthy again",
    )
    return time.monotonic() - begin


def _kill_processes(container: Container) -> None:
    # -1: everything but the container's init, which ends with its child, and the shell itself.
    command = ["docker", "exec", container.id, "sh", "-c", "kill -9 -1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if "executable file not found" in done.stdout + done.stderr:
        raise ServiceError(f"Expected a shell in {container.name}. Received: {done.stdout}{done.stderr}")


def _started(container: Container) -> str:
    return engine.docker("inspect", "--format", "{{.State.StartedAt}}", container.id)


def _health(container: Container) -> str:
    state = json.loads(engine.docker("inspect", "--format", "{{json .State}}", container.id))
    return state["Health"]["Status"] if state["Running"] else "not running"


def _kept(stage: Stage) -> tuple[int, str]:
    rows = int(stage.query("SELECT count(*) FROM predictions")[0][0])
    return rows, str(stage.health().get("model_version"))


def _same(stage: Stage, findings: Findings, rows: int, version: str) -> None:
    now, served = _kept(stage)
    evaluation = stage.dagster.latest(EXPERIMENT, "evaluation")
    run = str(evaluation.get("mlflow_run_id"))
    status = stage.get("MLFLOW_PORT", "/api/2.0/mlflow/runs/get", run_id=run)["run"]["info"]["status"]
    projects = [project["name"] for project in stage.get("EVIDENTLY_PORT", "/api/projects")]
    known = served == version == evaluation.get("version") and status == "FINISHED" and EXPERIMENT in projects
    findings.add(
        "rows, the served model, Dagster's history, MLflow's run and Evidently's project still there",
        f"{now} rows of {rows}, {served}, evaluation of {evaluation.get('version')}, MLflow {status}, {projects}",
        now >= rows and known,
    )


def _which(failed: Sequence[Outcome]) -> str:
    if not failed:
        return ""
    shown = Counter(f"{outcome.status or 'none'}: {outcome.error[:120]}" for outcome in failed)
    return " (" + "; ".join(f"{count} × {text}" for text, count in shown.most_common(3)) + ")"
