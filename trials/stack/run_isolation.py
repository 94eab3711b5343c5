"""Phases `processes` and `containers`: a training dies with its container or with the code location, and is resumed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from cv_platform.containers import engine
from cv_platform.containers.run_container import RUN_LABEL
from cv_platform.errors import ServiceError
from trials.findings import Findings, wait_until
from trials.stack.kills import kill_and_wait
from trials.stack.stage import EXPERIMENT, Stage

EPOCHS = 3
"""Done before the kill."""
TRAINING_SECONDS = 240.0
RETRY_SECONDS = 240.0
END_SECONDS = 300.0
_RUNS = """
query Runs($root: String!) {
  runsOrError(filter: {tags: [{key: "dagster/root_run_id", value: $root}]}) {
    ... on Runs { results { runId status } }
  }
}
"""
_MESSAGES = """
query Messages($run: ID!) {
  logsForRun(runId: $run) { ... on EventConnection { events { ... on MessageEvent { message } } } }
}
"""


def resume_in_containers(stage: Stage, findings: Findings) -> None:
    """Restarts the stack with RUN_CONTAINERS=1, and kills the container of a training run."""
    socket = Path(engine.setting(stage.checkout.values, "DOCKER_SOCKET"))
    stage.checkout.change(RUN_CONTAINERS="1", DOCKER_GID=str(socket.stat().st_gid))
    log = stage.artifacts / "commands.log"
    stage.checkout.run("stack-up", log)
    try:
        _resume(stage, findings, "the run's container", _kill_container)
    finally:
        stage.checkout.change(RUN_CONTAINERS="")
        stage.checkout.run("stack-up", log)
    left = [container.name for container in stage.containers("run-gate")]
    findings.add("without RUN_CONTAINERS no service has Docker's socket", f"run-gate: {left or 'gone'}", not left)


def resume_after_code_location(stage: Stage, findings: Findings) -> None:
    """Kills the code location, of which runs are processes, during a training."""
    _resume(stage, findings, "the code location", lambda run: kill_and_wait(stage.container("dagster-code")))


def _resume(stage: Stage, findings: Findings, what: str, kill: Callable[[str], object]) -> None:
    run = stage.dagster.launch(f"{EXPERIMENT}_retrain")
    wait_until(
        lambda: len(_epochs(stage, run)) >= EPOCHS, seconds=TRAINING_SECONDS, what=f"{EPOCHS} epochs of the training"
    )
    kill(run)
    begin = time.monotonic()
    wait_until(lambda: bool(_retries(stage, run)), seconds=RETRY_SECONDS, what=f"{run} to be retried")
    seconds = time.monotonic() - begin
    retry = _retries(stage, run)[0]
    end = stage.dagster.wait(retry, seconds=END_SECONDS)
    done = [step for step, status in end.steps.items() if status == "SUCCESS"]
    again = {f"{EXPERIMENT}__{asset}" for asset in ("dataset", "validation_report", "packed_images")} & set(end.steps)
    findings.add(
        f"{what} killed in a training: retried within {RETRY_SECONDS:.0f} s, without the steps that were done",
        f"after {seconds:.0f} s; {end.status}, {len(done)} steps in {end.seconds:.0f} s, {len(again)} done again"
        + (f": {end.problem}" if end.problem else ""),
        end.status == "SUCCESS" and not again,
    )
    before, after = _epochs(stage, run), _epochs(stage, retry)
    # One epoch may be on disk and not in the log, when the kill came between.
    resumed = bool(after) and after == list(range(after[0], len(after) + after[0])) and 1 <= after[0] - before[-1] <= 2
    findings.add(
        "no epoch trained twice",
        f"epochs {before[0]} to {before[-1]}, then {f'{after[0]} to {after[-1]}' if after else 'none'}",
        resumed,
    )


def _kill_container(run: str) -> None:
    """Kills a run's container, and proves first that it has no more rights than the code location's."""
    found = engine.docker("ps", "--quiet", "--no-trunc", "--filter", f"label={RUN_LABEL}={run}").split()
    if len(found) != 1:
        raise ServiceError(f"Expected one container of the run {run}. Received: {len(found)}.")
    described = json.loads(engine.docker("inspect", found[0]))[0]
    user, host = described["Config"]["User"], described["HostConfig"]
    if user.split(":")[0] in ("", "0") or host["CapDrop"] != ["ALL"] or not host["ReadonlyRootfs"]:
        raise ServiceError(f"Expected a hardened container of the run {run}. Received: {user!r}, {host}.")
    engine.docker("kill", found[0])


def _epochs(stage: Stage, run: str) -> list[int]:
    """Returns the epochs that a run has logged as done."""
    events = stage.dagster.ask(_MESSAGES, run=run)["logsForRun"].get("events") or []
    found = [re.match(r"epoch (\d+)/\d+:", event.get("message") or "") for event in events]
    return [int(match[1]) for match in found if match]


def _retries(stage: Stage, run: str) -> list[str]:
    results = stage.dagster.ask(_RUNS, root=run)["runsOrError"].get("results") or []
    return [result["runId"] for result in results if result["runId"] != run]
