"""Materialises assets by the `dagster` CLI, and says in a line each what happened; the whole output goes to a log."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cv_platform.errors import CvPlatformError
from cv_platform.stack.environment import REPOSITORY, dagster_command, run_logged

_FINISHED = re.compile(r'STEP_SUCCESS - Finished execution of step "(.+?)" in (.+?)\.?$')
_FAILED_CHECK = re.compile(r"ASSET_CHECK_EVALUATION - (Asset check .+ did not pass.*)$")
_PLATFORM_ERROR = re.compile(r"^cv_platform\.errors\.\w+: (.+)$")


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
        environment: see `environment.platform_environment`.
        log: receives everything that Dagster prints.
        say: is given a line per finished asset, and per check that did not pass.
        config: run config.

    Raises:
        CvPlatformError: the run failed; the message is the platform's own error, or the end of the log.
    """
    arguments = ["asset", "materialize", "--select", selection, "-m", "cv_platform.definitions"]
    if config is not None:
        arguments += ["--config-json", json.dumps(config)]
    errors: list[str] = []

    def read(line: str) -> None:
        text = line.rstrip()
        if found := _FINISHED.search(text):
            say(f"    {found[1].replace('__', '/')}: {found[2]}")
        elif found := _FAILED_CHECK.search(text):
            say(f"    {found[1]}")
        elif (found := _PLATFORM_ERROR.match(text)) and found[1] not in errors:
            errors.append(found[1])

    status = run_logged(dagster_command(*arguments), log, environment, read)
    if status == 0:
        return
    end = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-40:])
    why = "\n".join(errors) or f"the end of its output:\n{end}"
    raise CvPlatformError(f"Materialising {selection} failed ({status}): {why}\nThe whole log: {log}")
