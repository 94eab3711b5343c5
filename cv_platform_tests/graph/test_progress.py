"""How far a work on shards is, as Dagster's own log of the run has it."""

from __future__ import annotations

import os
import re

import dagster as dg
import pytest
import yaml

from cv_platform.compute import map_shards, progress
from cv_platform.compute.local import LocalEngine
from cv_platform_tests.support.stack_files import REPOSITORY
from cv_platform_tests.unit.compute.tasks import process_id, shards


@dg.asset
def counted() -> None:
    engine = LocalEngine(2, worth_seconds=0)
    made = map_shards(process_id, shards(5), engine=engine, title="Counting", total=10)
    assert os.getpid() not in {process for _, process in made}


@pytest.mark.parametrize("file", ["dagster.yaml", "docker/dagster/dagster.yaml"])
def test_the_progress_of_other_processes_is_among_a_runs_events(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False)
    python_logs = yaml.safe_load((REPOSITORY / file).read_text())["python_logs"]
    with dg.instance_for_test(overrides={"python_logs": python_logs}) as instance:
        run = dg.materialize([counted], instance=instance)
        said = [event.user_message for event in instance.all_logs(run.run_id)]
    lines = [line for line in said if re.fullmatch(r"Counting: \d+ of 10 images, [\d,]+ per second, [\d:]+ left", line)]
    assert [line.split()[1] for line in lines] == ["2", "4", "6", "8", "10"]
