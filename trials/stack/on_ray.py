"""Phases `ray` and `jobs`: two workers beside the core, scores of all digits and a run of Dagster by them."""

from __future__ import annotations

from collections import Counter

import httpx

from trials.findings import Findings
from trials.stack.stage import EXPERIMENT, Stage

START_SECONDS = 400.0
RUN_SECONDS = 240.0
JOB = "log_retention"
WORKERS = 2
_SCORE = (
    'images=$(dirname "$(find /data/home -type d -name test -path "*{experiment}*" | head -n 1)") && '
    "cv-platform score $images --model {version} --output {output} >&2 && sha256sum {output} && rm {output}"
)


def score_on_ray(stage: Stage, findings: Findings) -> None:
    """Starts the profile `ray`, and scores the digits in the code location's container once by each engine."""
    stage.checkout.change(COMPOSE_PROFILES="ray", RAY_WORKERS=str(WORKERS))
    stage.checkout.run("stack-up", stage.artifacts / "commands.log", seconds=START_SECONDS)
    found = stage.containers("ray-head", "ray-worker")
    well = sum(container.is_well for container in found)
    findings.add(
        f"the head and {WORKERS} workers healthy", f"{well} of {len(found)}", well == len(found) == 1 + WORKERS
    )

    version = stage.get("RAY_PORT", "/api/version")["ray_version"]
    refused = httpx.get(stage.url("RAY_PORT") + "/api/version", timeout=30).status_code
    findings.add("Ray's dashboard behind the login", f"Ray {version} with it, {refused} without", refused == 401)

    model = str(stage.health()["model_version"])
    by = {engine: _scores_sha256(stage, model, engine) for engine in ("local", "ray")}
    equal = "equal" if by["local"] == by["ray"] else "different"
    findings.add("scores of all digits by Ray, with the bytes of local", f"{equal}: {by['ray'][:16]}", equal == "equal")
    tasks = stage.get("RAY_PORT", "/api/v0/tasks?limit=10000&detail=1")["data"]["result"]["result"]
    # Other tasks ask nodes for their versions. A shard's task has the shard's name, so that only its function tells.
    shards = [task for task in tasks if task["func_or_class_name"] == "_work" and task["state"] == "FINISHED"]
    by_node = sorted(Counter(shard["node_id"] for shard in shards).values())
    findings.add(f"shards on each of {WORKERS} workers", f"{by_node}", len(by_node) == WORKERS)


def run_as_job(stage: Stage, findings: Findings) -> None:
    """Restarts the stack with RUN_JOBS=1, and has Dagster do a run in a job of the cluster."""
    stage.checkout.change(COMPOSE_PROFILES="ray", RAY_WORKERS=str(WORKERS), RUN_JOBS="1")
    log = stage.artifacts / "commands.log"
    stage.checkout.run("stack-up", log, seconds=START_SECONDS)
    try:
        run = stage.dagster.launch(JOB, {"ops": {"delete_expired_log": {"config": {"is_dry_run": True}}}})
        end = stage.dagster.wait(run, seconds=RUN_SECONDS)
        jobs = [job for job in stage.get("RAY_PORT", "/api/jobs/") if run in str(job["submission_id"])]
    finally:
        stage.checkout.change(RUN_JOBS="")
        stage.checkout.run("stack-up", log, seconds=START_SECONDS)
    states = [job["status"] for job in jobs]
    findings.add(
        "a run of Dagster as a job of Ray",
        f"{end.status}, jobs: {states}" + (f": {end.problem}" if end.problem else ""),
        end.status == "SUCCESS" and states == ["SUCCEEDED"],
    )


def _scores_sha256(stage: Stage, version: str, engine: str) -> str:
    command = _SCORE.format(experiment=EXPERIMENT, version=version, output=f"/data/home/scores-{engine}.parquet")
    said = stage.checkout.compose("exec", "-T", "-e", f"CV_COMPUTE={engine}", "dagster-code", "sh", "-c", command)
    return said.split()[0]
