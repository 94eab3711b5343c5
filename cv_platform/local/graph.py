"""Materialises assets by the `dagster` CLI, and says in a line each what happened; the whole output goes to a log."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cv_platform.errors import CvPlatformError
from cv_platform.local.environment import REPOSITORY, dagster_command, run_logged
from cv_platform.local.run_output import RunOutput

LAST_LINES = {"DAGSTER_COMPUTE_LOG_TAIL_WAIT_AFTER_FINISH": "1"}
"""For a run's environment. Dagster 1.13 prints the steps' lines through `tail`, which it ends at once after the last
step. Without this second the last lines, such as why it failed, are lost on a busy machine:
https://github.com/dagster-io/dagster/issues/23336"""


def unfinished_runs(dagster_home: Path, environment: Mapping[str, str]) -> list[str]:
    """Returns the ids of the runs that Dagster holds for unfinished, wherever it keeps them.

    Raises:
        CvPlatformError: Dagster cannot say it.
    """
    if not (dagster_home / "dagster.yaml").is_file():
        return []  # Nothing was ever run here.
    command = [sys.executable, "-m", "cv_platform.defs.unfinished_runs"]
    result = subprocess.run(command, env=dict(environment), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CvPlatformError(
            f"Expected Dagster to list its unfinished runs. Received: {result.stderr.strip()[-2000:]}. "
            f"Check {dagster_home}/dagster.yaml and the database that it names."
        )
    return json.loads(result.stdout.splitlines()[-1])


def materialize(
    selection: str,
    environment: Mapping[str, str],
    *,
    log: Path,
    say: Callable[[str], None],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Materialises `selection` in a process of its own.

    Args:
        selection: as `dagster asset materialize --select` takes it.
        environment: see `environment.platform_environment`; with `CV_HOME`.
        log: receives everything that Dagster prints.
        say: is given a line per finished asset, and per check that did not pass.
        config: run config.

    Raises:
        CvPlatformError: the run failed; the message says which asset, why, and where the log is, without a traceback.
    """
    arguments = ["asset", "materialize", "--select", selection, "-m", "cv_platform.definitions"]
    if config is not None:
        arguments += ["--config-json", json.dumps(config)]
    output = RunOutput(say, Path(environment["CV_HOME"]) / "records")
    status = run_logged(dagster_command(*arguments), log, {**environment, **LAST_LINES}, output.read)
    if status == 0:
        return
    last_lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:]
    raise CvPlatformError(
        f"{selection.removeprefix('key:')} was not materialised completely (status {status}).\n"
        f"{output.failure(status, last_lines)}\n  The whole log, with tracebacks: {log}"
    )
