"""Phase c: PostgreSQL goes away under load, in the two ways there are: it is stopped, and it hangs."""

from __future__ import annotations

import time

from benchmarks.servers import Server
from trials.findings import Findings
from trials.soak.stage import Scale, Stage, add_rows
from trials.traffic import Traffic, failures, statuses

STOPPED_SECONDS = 60.0
FROZEN_SECONDS = 15.0


def lose_the_database(stage: Stage, server: Server, scale: Scale) -> Findings:
    """Stops PostgreSQL, starts it, freezes it, thaws it; predictions and health must not notice."""
    findings = Findings()
    stopped, frozen = scale.seconds(STOPPED_SECONDS, least=5), scale.seconds(FROZEN_SECONDS, least=5)
    with Traffic(server.base_url, stage.uploads, concurrency=4) as traffic:
        traffic.wait_for(50, seconds=30)
        with stage.database_stopped():
            health = _health_during(stage, server, stopped)
        traffic.wait_for(50, seconds=30)
        with stage.database_frozen():
            health += _health_during(stage, server, frozen)
        traffic.wait_for(50, seconds=30)
    outcomes = traffic.outcomes
    failed = failures(outcomes)
    findings.add(
        f"PostgreSQL stopped for {stopped:.0f} s and hung for {frozen:.0f} s: 0 failed",
        statuses(outcomes) + (f", first failure: {failed[0].error[:200]}" if failed else ""),
        not failed,
    )
    green = sum(status == 200 for status in health)
    findings.add("/health_check 200 all the time", f"{green} of {len(health)}", green == len(health))
    add_rows(findings, stage, outcomes)
    return findings


def _health_during(stage: Stage, server: Server, seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    seen: list[int] = []
    while time.monotonic() < deadline:
        seen.append(stage.get(server, "/health_check")[0])
        time.sleep(0.5)
    return seen
