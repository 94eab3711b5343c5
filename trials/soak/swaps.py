"""Phase a: the model changes again and again under load."""

from __future__ import annotations

import statistics
import time

from benchmarks.servers import Server, process_memory_bytes
from benchmarks.services import worker_pids
from trials.findings import Findings, wait_until
from trials.soak.stage import SWAP_SECONDS, WORKERS, Scale, Stage, add_rows
from trials.traffic import Traffic, failures, statuses

REQUESTS = 10_000
SWAPS = 20
SETTLED_AFTER = 5
"""Swaps until the allocator has what it needs; what grows after them is lost memory."""
MOST_GROWTH = 0.10
LOAD_SECONDS = 240.0


def swap_under_load(stage: Stage, server: Server, scale: Scale) -> Findings:
    """Moves production from version to version, each confirmed by every worker, while requests run."""
    findings = Findings()
    requests, swaps = scale.count(REQUESTS, least=400), scale.count(SWAPS, least=SETTLED_AFTER + 2)
    workers = worker_pids(server.pid)
    memory: list[list[float]] = []
    seconds: list[float] = []
    with Traffic(server.base_url, stage.uploads) as traffic:
        begin = time.monotonic()
        traffic.wait_for(requests // (swaps + 1), seconds=30)
        memory.append(_memory_mib(workers))
        for swap in range(swaps):
            version = stage.versions[(swap + 1) % len(stage.versions)]
            status = stage.move_production(server, version)
            if status != 200:
                findings.add(f"swap {swap + 1} accepted", f"status {status}", False)
                break
            seconds.append(
                wait_until(
                    lambda version=version: list(stage.workers_on(server).values()) == [version] * WORKERS,
                    seconds=SWAP_SECONDS,
                    what=f"both workers on {version}",
                )
            )
            traffic.wait_for(requests // (swaps + 1) // 2, seconds=30)
            memory.append(_memory_mib(workers))
        traffic.wait_for(max(0, requests - len(traffic.outcomes)), seconds=LOAD_SECONDS)
        duration = time.monotonic() - begin
    outcomes = traffic.outcomes
    failed = failures(outcomes)
    findings.add(
        f"≥ {requests} requests during {swaps} swaps, 0 failed",
        f"{statuses(outcomes)} during {len(seconds)} swaps in {duration:.0f} s"
        + (f", first failure: {failed[0].error[:200]}" if failed else ""),
        len(outcomes) >= requests and len(seconds) == swaps and not failed,
    )
    findings.add(
        f"answers of all {len(stage.versions)} versions",
        f"{len({outcome.model_version for outcome in outcomes} & set(stage.versions))}",
        set(stage.versions) <= {outcome.model_version for outcome in outcomes},
    )
    same = worker_pids(server.pid) == workers
    findings.add("the same workers throughout", "the same" if same else "others", same)
    growth = [_growth([sample[index] for sample in memory]) for index in range(len(workers))]
    shown = ", ".join(
        f"{first:.0f} → {settled:.0f} → {last:.0f} MiB ({share:+.1%})" for first, settled, last, share in growth
    )
    findings.add(
        f"memory of each worker (PSS) at most {MOST_GROWTH:.0%} larger at the end than after {SETTLED_AFTER} swaps",
        f"start → after {SETTLED_AFTER} → end: {shown}",
        all(share <= MOST_GROWTH for *_, share in growth),
    )
    add_rows(findings, stage, outcomes)
    return findings


def _memory_mib(workers: list[int]) -> list[float]:
    return [(process_memory_bytes(pid) or 0) / 2**20 for pid in workers]


def _growth(samples: list[float]) -> tuple[float, float, float, float]:
    """Returns the memory at the start, after the first swaps and at the end, and the growth between the last two.

    Medians of three: requests under way come and go between two samples.
    """
    settled = statistics.median(samples[SETTLED_AFTER - 1 : SETTLED_AFTER + 2])
    last = statistics.median(samples[-3:])
    return samples[0], settled, last, last / settled - 1
