"""Phases b and d: SIGKILL of one worker, and of the whole service, under load."""

from __future__ import annotations

import time

from benchmarks.servers import Server
from benchmarks.services import worker_pids
from trials.findings import Findings, wait_until
from trials.soak.stage import WORKERS, Scale, Stage, add_rows
from trials.soak.workers import kill_service, kill_worker
from trials.traffic import Traffic, failures, statuses

RETURN_SECONDS = 60.0


def kill_one_worker(stage: Stage, server: Server, scale: Scale) -> Findings:
    """Kills one of the workers; BentoML starts another, and somebody adopts the spool that it left."""
    findings = Findings()
    kills = scale.count(3, least=1)
    with Traffic(server.base_url, stage.uploads) as traffic:
        connected: set[int] = set()
        returned: list[float] = []
        for _ in range(kills):
            traffic.wait_for(200, seconds=30)
            before = worker_pids(server.pid)
            connected |= kill_worker(before[0])
            returned.append(
                wait_until(
                    lambda gone=before[0]: _are_back(stage, server, gone),
                    seconds=RETURN_SECONDS,
                    what="another worker in the place of the killed one",
                )
            )
        traffic.wait_for(200, seconds=30)
    outcomes = traffic.outcomes
    failed = failures(outcomes)
    elsewhere = [outcome for outcome in failed if outcome.client_port not in connected]
    findings.add(
        f"{kills} kills, and at most one failure on each connection that the killed worker had",
        f"{statuses(outcomes)}; {len(failed)} failed, {len(elsewhere)} of them elsewhere, {len(connected)} connections",
        not elsewhere and len(failed) <= len(connected),
    )
    findings.add(f"{WORKERS} workers again", f"after {max(returned):.1f} s at most", len(returned) == kills)
    add_rows(findings, stage, outcomes)
    return findings


def _are_back(stage: Stage, server: Server, gone: int) -> bool:
    workers = set(worker_pids(server.pid)) - {gone}
    return len(workers) == WORKERS and workers <= set(stage.workers_on(server))


def kill_everything(stage: Stage, scale: Scale) -> Findings:
    """Kills the whole service and starts it again; what its workers had spooled is the successors' to bring home."""
    findings = Findings()
    with stage.service("killed") as server, Traffic(server.base_url, stage.uploads) as traffic:
        traffic.wait_for(scale.count(1000, least=100), seconds=60)
        kill_service(server.pid)
        killed = time.monotonic()
    left = len(list((stage.settings.home / "spool").glob("*.sqlite")))
    with stage.service("after the kill") as server:
        seconds = time.monotonic() - killed
        with Traffic(server.base_url, stage.uploads) as after:
            after.wait_for(100, seconds=30)
        outcomes = traffic.outcomes
        add_rows(findings, stage, outcomes)
        adopted = wait_until(
            lambda: len(list((stage.settings.home / "spool").glob("*.sqlite"))) <= WORKERS,
            seconds=60,
            what="the spools of the killed workers to be taken over",
        )
    findings.add(
        "answers again after the restart, none failed",
        f"{statuses(after.outcomes)} from {seconds:.1f} s on",
        bool(after.outcomes) and not failures(after.outcomes),
    )
    findings.add("the spools that were left are taken over", f"{left} within {adopted:.1f} s", True)
    return findings
