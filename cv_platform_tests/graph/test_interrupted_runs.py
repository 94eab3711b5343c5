"""Runs that died with the code location: ended, retried by Dagster, and not mistaken for others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from cv_platform.defs.runs.interrupted import GRPC_TAG, container_start, end_interrupted_runs, interrupted_runs_sensor

RETRIES = {"run_retries": {"enabled": True, "max_retries": 3, "retry_on_asset_or_op_failure": False}}
HOST = "dagster-code-location"


@dg.job
def work() -> None:
    pass


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=RETRIES) as instance:
        yield instance


def begin(instance: dg.DagsterInstance, host: str | None = HOST) -> str:
    """Makes a run that began just now, as the default launcher and the run's process leave it."""
    tags = {GRPC_TAG: json.dumps({"host": host, "port": 4000})} if host else {}
    run = instance.create_run_for_job(work, tags=tags)
    event = dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, work.name)
    instance.report_dagster_event(event, run.run_id)
    return run.run_id


def status(instance: dg.DagsterInstance, run_id: str) -> dg.DagsterRunStatus:
    found = instance.get_run_by_id(run_id)
    assert found is not None
    return found.status


def test_an_interrupted_run_fails_and_is_retried(instance: dg.DagsterInstance) -> None:
    run_id = begin(instance)
    assert end_interrupted_runs(instance, HOST, started=time.time() + 1) == [run_id]
    ended = instance.get_run_by_id(run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.FAILURE
    assert ended.tags["dagster/will_retry"] == "true"


def test_a_run_that_was_to_be_canceled_is(instance: dg.DagsterInstance) -> None:
    run_id = begin(instance)
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_run_canceling(run)
    assert end_interrupted_runs(instance, HOST, started=time.time() + 1) == [run_id]
    assert status(instance, run_id) == dg.DagsterRunStatus.CANCELED


def test_a_run_that_began_after_the_container_goes_on(instance: dg.DagsterInstance) -> None:
    started = time.time() - 1
    run_id = begin(instance)
    assert end_interrupted_runs(instance, HOST, started=started) == []
    assert status(instance, run_id) == dg.DagsterRunStatus.STARTED


@pytest.mark.parametrize("host", ["dagster-code-gpu-location", None])  # None: in a container of its own, or by hand.
def test_runs_elsewhere_stay_as_they_are(instance: dg.DagsterInstance, host: str | None) -> None:
    run_id = begin(instance, host)
    assert end_interrupted_runs(instance, HOST, started=time.time() + 1) == []
    assert status(instance, run_id) == dg.DagsterRunStatus.STARTED


def test_reads_when_the_first_process_began(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "stat").write_text("cpu  1 2 3\nbtime 1700000000\nprocesses 5\n")
    ticks = 90 * os.sysconf("SC_CLK_TCK")
    (tmp_path / "1" / "stat").write_text(f"1 (docker) init) S {' '.join(str(n) for n in range(4, 22))} {ticks} 23 24\n")
    assert container_start(tmp_path) == 1700000090.0


HOLD = """
import sys
from pathlib import Path
from cv_platform.defs.runs.interrupted import at_work
with at_work(sys.argv[1], Path(sys.argv[2])):
    print("at work", flush=True)
    sys.stdin.read()
"""


def test_a_run_whose_process_was_killed_fails_and_one_at_work_goes_on(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path))
    killed, alive = (begin(instance, host=None) for _ in range(2))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, run_id, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for run_id in (killed, alive)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"at work\n"
        look = interrupted_runs_sensor()
        nothing = look(dg.build_sensor_context(instance=instance))
        processes[0].kill()
        processes[0].wait()
        found = look(dg.build_sensor_context(instance=instance))
    finally:
        for process in processes:
            process.communicate()
    assert isinstance(nothing, dg.SkipReason)
    assert nothing.skip_message == "Every run is at work."
    assert isinstance(found, dg.SkipReason)
    assert found.skip_message == f"Ended: {killed}."
    assert status(instance, killed) == dg.DagsterRunStatus.FAILURE
    assert status(instance, alive) == dg.DagsterRunStatus.STARTED
    assert list((tmp_path / "dagster" / "at_work").iterdir()) == []
