"""Asks Dagster, in processes of its own: materialises assets (`defs.materialize`), and lists unfinished runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cv_platform.errors import CvPlatformError
from cv_platform.local.environment import REPOSITORY

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
    command = [sys.executable, "-m", "cv_platform.defs.runs.unfinished"]
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
    module: str = "cv_platform.definitions",
) -> None:
    """Materialises `selection` in a process of its own.

    Args:
        selection: as `dagster asset materialize --select` takes it.
        environment: see `environment.platform_environment`; with `CV_HOME`.
        log: receives everything that Dagster prints.
        say: is given a line per finished asset, per check that did not pass, and where a training goes on.
        config: run config.
        module: that has the definitions.

    Raises:
        CvPlatformError: the run failed; the message says which asset, why, and where the log is, without a traceback.
    """
    command = [sys.executable, "-m", "cv_platform.defs.materialize", module, selection]
    if config is not None:
        command += ["--config-json", json.dumps(config)]
    failed = ""
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command, env={**environment, **LAST_LINES}, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=file, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            message = json.loads(line)
            if "said" in message:
                say(message["said"])
            failed += message.get("failed", "")
    if process.returncode:
        reason = "\n".join(f"  {line}" for line in (failed or _last_word(process.returncode)).splitlines())
        raise CvPlatformError(
            f"{selection.removeprefix('key:')} was not materialised completely (status {process.returncode}).\n"
            f"{reason}\n  The whole log, with tracebacks: {log}"
        )


def _last_word(status: int) -> str:
    if status > 0:
        return "Dagster's process ended without a word."
    name = signal.Signals(-status).name
    memory = ": often the system's answer to a full memory" if name == "SIGKILL" else ""
    return f"Dagster's process was ended by {name}{memory}."
