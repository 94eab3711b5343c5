"""Phase `roll`: the service's replicas are replaced under load, and no request notices."""

from __future__ import annotations

import time

from trials.findings import Findings
from trials.stack.stage import Stage, add_rows
from trials.traffic import failures, statuses

REQUESTS = 5_000
CONCURRENCY = 4
LOAD_SECONDS = 240.0


def roll_under_load(stage: Stage, findings: Findings) -> None:
    """Runs `make stack-roll` while requests run, at least `REQUESTS` of them."""
    old = {container.id for container in stage.containers("service")}
    with stage.traffic(concurrency=CONCURRENCY) as traffic:
        traffic.wait_for(200, seconds=60)
        before = len(traffic.outcomes)
        begin = time.monotonic()
        stage.checkout.run("stack-roll", stage.artifacts / "commands.log")
        seconds = time.monotonic() - begin
        during = len(traffic.outcomes) - before
        traffic.wait_for(max(200, REQUESTS - len(traffic.outcomes)), seconds=LOAD_SECONDS)
    outcomes = traffic.outcomes
    failed = failures(outcomes)
    new = {container.id for container in stage.containers("service")}
    findings.add(
        f"stack-roll under ≥ {REQUESTS} requests: 0 failed",
        f"{statuses(outcomes)}, {during} of them during the {seconds:.0f} s of the roll"
        + (f", first failure: {failed[0].error[:200]}" if failed else ""),
        len(outcomes) >= REQUESTS and not failed,
    )
    findings.add(
        "every replica another one",
        f"{len(new - old)} new for {len(old)} old",
        not new & old and len(new) == len(old) > 0,
    )
    add_rows(findings, stage, outcomes)
