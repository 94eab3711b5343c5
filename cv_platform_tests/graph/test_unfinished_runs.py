"""What a garbage collection asks Dagster: in a process of its own, against a real instance."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.graph import unfinished_runs
from cv_platform.settings import Settings

MAKE_RUNS = """
import dagster as dg

@dg.job
def work():
    pass

with dg.DagsterInstance.get() as instance:
    for status in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.FAILURE):
        print(instance.create_run_for_job(work, status=status).run_id)
"""


def test_runs_are_unfinished_until_dagster_says_otherwise(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CV_HOME": str(tmp_path)})
    environment = platform_environment(settings)
    assert unfinished_runs(settings.dagster_home, environment) == []
    prepare_home(settings)
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MAKE_RUNS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert unfinished_runs(settings.dagster_home, environment) == [made.stdout.split()[1]]
