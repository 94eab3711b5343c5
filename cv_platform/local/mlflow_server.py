"""`mlflow` as a command that is its server itself: `python -m cv_platform.local.mlflow_server server …`.

MLflow 3.17 checks its options, makes its tables, starts uvicorn as a child that imports everything again (a tenth of
the CPU time of `make up`), and stays beside it to pass signals on, with 200 MB that nothing uses. Only its job
execution needs it. To be removed once `mlflow server` does that itself.
https://github.com/mlflow/mlflow/blob/master/mlflow/server/__init__.py
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

# Before MLflow: it checks hosts and origins only where it finds uvicorn imported.
import uvicorn


def serve(command: Sequence[str], *, extra_env: Mapping[str, str], **_: object) -> None:
    """Runs `python -m uvicorn …` in this process, where MLflow would start a child; ends with it."""
    os.environ.update(extra_env)
    uvicorn.main(list(command[command.index("uvicorn") + 1 :]))


def main() -> None:
    """Runs MLflow's command line."""
    from mlflow import cli, server
    from mlflow.environment_variables import MLFLOW_SERVER_ENABLE_JOB_EXECUTION

    if not MLFLOW_SERVER_ENABLE_JOB_EXECUTION.get():
        server._exec_cmd = serve  # pyright: ignore[reportPrivateImportUsage]
    cli.cli()


if __name__ == "__main__":
    main()
