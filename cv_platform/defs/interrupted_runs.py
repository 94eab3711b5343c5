"""Runs that died with the container of their code location: marked as failed, so that Dagster goes on with them.

Where runs are processes of that container, nobody else notices their death: Dagster's default launcher has no health
check for its workers, so they would count as running for ever, and hold the places of others. Once they have failed,
`run_retries` in dagster.yaml goes on with the step that was interrupted. A sensor does it, not the start of the
container: a retry needs a code location that the daemon has loaded again.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import dagster as dg

GRPC_TAG = ".dagster/grpc_info"
"""Of a run that the default launcher has started: where the server is whose process it is, as JSON."""


def interrupted_runs_sensor() -> dg.SensorDefinition:
    """Returns the sensor that ends interrupted runs; it has work in the stack in containers alone."""

    @dg.sensor(
        name="interrupted_runs",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks runs as failed that ended with the container of the code location; Dagster retries them.",
    )
    def interrupted_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        origin = context.code_location_origin
        host = getattr(origin, "host", None)  # Of a server that somebody else starts; others are the daemon's children.
        if host is None:
            return dg.SkipReason("Runs are no processes of a code location in a container.")
        ended = end_interrupted_runs(context.instance, host, started=container_start())
        return dg.SkipReason(f"Ended: {', '.join(ended)}." if ended else "Every run is at work.")

    return interrupted_runs


def end_interrupted_runs(instance: dg.DagsterInstance, host: str, *, started: float) -> list[str]:
    """Marks runs of a code location as failed, or as canceled where somebody wanted that; returns their ids.

    Args:
        instance: of Dagster.
        host: of the code location.
        started: Unix time in seconds since when its container runs; what began before is no process of it any more.
    """
    ended: list[str] = []
    statuses = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    for record in instance.get_run_records(dg.RunsFilter(statuses=statuses)):
        run = record.dagster_run
        is_of_host = json.loads(run.tags.get(GRPC_TAG, "{}")).get("host") == host
        if not is_of_host or record.start_time is None or record.start_time >= started:
            continue
        if run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, "The code location ended, and the run with it.")
        else:
            instance.report_run_failed(run, "The code location ended while the run was at work, and the run with it.")
        ended.append(run.run_id)
    return ended


def container_start(proc: Path = Path("/proc")) -> float:
    """Returns since when the first process of this container runs, as Unix time in seconds (Linux only)."""
    boot = re.search(r"^btime (\d+)$", (proc / "stat").read_text(encoding="ascii"), re.MULTILINE)
    assert boot is not None
    # The name, in parentheses, may hold spaces. https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html: field 22.
    ticks = (proc / "1" / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return int(boot[1]) + int(ticks) / os.sysconf("SC_CLK_TCK")
