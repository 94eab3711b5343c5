"""What a garbage collection asks Dagster: in a process of its own, against a real instance."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.graph import unfinished_runs
from cv_platform.settings import Settings


@dg.job
def work() -> None:
    pass


def test_runs_are_unfinished_until_dagster_says_otherwise(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CV_HOME": str(tmp_path)})
    environment = platform_environment(settings)
    assert unfinished_runs(settings.dagster_home, environment) == []
    prepare_home(settings)
    with dg.DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        statuses = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE)
        _, started, _ = (instance.create_run_for_job(work, status=status).run_id for status in statuses)
    assert unfinished_runs(settings.dagster_home, environment) == [started]
