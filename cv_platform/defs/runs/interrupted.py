"""Runs whose process is gone: marked as failed, so that Dagster goes on with them, and others get their place.

A run at work holds a lock, which the system takes from it when it dies: every run, and a sensor, looks for such runs.

Where runs are processes of a code location in a container that ended, its start says so. Nobody else notices: Dagster's
default launcher has no health check for its workers, so they would count as running for ever. Once they have failed,
`run_retries` in dagster.yaml goes on with the step that was interrupted. A sensor does it, not the start of the
container: a retry needs a code location that the daemon has loaded again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from cv_platform.files import is_locked, open_lock, try_lock
from cv_platform.settings import Settings

_AT_WORK = Path("dagster", "at_work")
"""Folder of the locks in CV_HOME; DAGSTER_HOME may be another, and read-only, as it is in the containers."""
GRPC_TAG = ".dagster/grpc_info"
"""Of a run that the default launcher has started: where the server is whose process it is, as JSON."""


def interrupted_runs_sensor() -> dg.SensorDefinition:
    """Returns the sensor that ends interrupted runs."""

    @dg.sensor(
        name="interrupted_runs",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Marks runs as failed whose process is gone; Dagster retries them.",
    )
    def interrupted_runs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        origin = context.code_location_origin
        host = getattr(origin, "host", None)  # Of a server that somebody else starts; others are the daemon's children.
        ended = end_dead_runs(context.instance, Settings.from_environment().home)
        if host is not None:
            ended += end_interrupted_runs(context.instance, host, started=container_start())
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
        _end(instance, run, "The code location ended, and the run with it.")
        ended.append(run.run_id)
    return ended


@contextmanager
def at_work(run_id: str, home: Path) -> Iterator[None]:
    """Holds the lock by which others see that the run's process lives."""
    folder = home / _AT_WORK
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run_id}.lock"
    beside = path.with_name(f".{path.name}")
    handle = open_lock(beside)
    try_lock(handle)
    beside.rename(path)  # Locked before anybody finds it.
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def end_dead_runs(instance: dg.DagsterInstance, home: Path) -> list[str]:
    """Marks runs of this machine as failed, or as canceled, whose process was killed; returns their ids."""
    ended: list[str] = []
    for path in sorted((home / _AT_WORK).glob("[!.]*.lock")):
        run = None if is_locked(path) else instance.get_run_by_id(path.stem)
        if run is None:
            continue
        if not run.is_finished:
            _end(instance, run, "The run's process was killed.")
            ended.append(run.run_id)
        path.unlink(missing_ok=True)
    return ended


def _end(instance: dg.DagsterInstance, run: dg.DagsterRun, reason: str) -> None:
    if run.status == dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, reason)
    else:
        instance.report_run_failed(run, reason)


def container_start(proc: Path = Path("/proc")) -> float:
    """Returns since when the first process of this container runs, as Unix time in seconds (Linux only)."""
    boot = re.search(r"^btime (\d+)$", (proc / "stat").read_text(encoding="ascii"), re.MULTILINE)
    assert boot is not None
    # The name, in parentheses, may hold spaces. https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html: field 22.
    ticks = (proc / "1" / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return int(boot[1]) + int(ticks) / os.sysconf("SC_CLK_TCK")
