"""`mlflow` as a command whose server takes its place: `python -m cv_platform.local.mlflow_server server …`.

MLflow 3.17 checks its options, makes its tables, starts uvicorn as a child, and stays beside it to pass signals on,
with 200 MB that nothing uses. Only its job execution needs it. To be removed once `mlflow server` does that itself.
https://github.com/mlflow/mlflow/blob/master/mlflow/server/__init__.py
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NoReturn


def become(command: Sequence[str], *, extra_env: Mapping[str, str], **_: object) -> NoReturn:
    """Replaces this process, where MLflow would start a child."""
    os.execvpe(command[0], list(command), {**os.environ, **extra_env})


def main() -> None:
    """Runs MLflow's command line."""
    from mlflow import cli, server
    from mlflow.environment_variables import MLFLOW_SERVER_ENABLE_JOB_EXECUTION

    if not MLFLOW_SERVER_ENABLE_JOB_EXECUTION.get():
        server._exec_cmd = become  # pyright: ignore[reportPrivateImportUsage]
    cli.cli()


if __name__ == "__main__":
    main()
