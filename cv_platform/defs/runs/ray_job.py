"""A training in a job of a Ray cluster (`train.job_gpus`): `python -m cv_platform.defs.runs.ray_job FOLDER` there.

Dagster starts it and reads what it says by dagster-ray's client of Pipes; a run that is cancelled stops its job.
https://docs.dagster.io/guides/build/external-pipelines
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cv_platform.errors import ComputeError

if TYPE_CHECKING:
    import dagster as dg

    from cv_platform.settings import Settings


def ray_job(context: dg.AssetExecutionContext, settings: Settings, gpus: int | None) -> Callable[[Path], None] | None:
    """Returns what trains in a job what `together.train_elsewhere` has laid into a folder; None: there is to be no job.

    Raises:
        ComputeError: there is no Ray here, or nobody has said where its server of jobs is.
    """
    if gpus is None:
        return None
    if settings.ray_jobs_url is None:
        raise ComputeError(
            f"train.job_gpus: {gpus} needs the server of jobs of a Ray cluster. Received: no CV_RAY_JOBS_URL. Set it, "
            "such as http://192.168.1.10:8265, or leave train.job_gpus out."
        )
    try:
        from dagster_ray import PipesRayJobClient
    except ImportError as err:
        raise ComputeError(
            f"train.job_gpus: expected the package dagster-ray. Received: {err}. Install the extra: "
            "pip install 'cv-platform[ray]'."
        ) from err
    client = PipesRayJobClient(address=settings.ray_jobs_url)

    def launch(folder: Path) -> None:
        client.run(
            context=context,
            submit_job_params={
                "entrypoint": entrypoint(folder, sys.executable),
                "entrypoint_num_cpus": 1,
                "entrypoint_num_gpus": gpus,
            },
        )

    return launch


def entrypoint(folder: Path, python: str) -> str:
    """Returns the job's command, for a shell of a node: by the Python at a path, or the node's own if none is there."""
    arguments = shlex.join(["-m", "cv_platform.defs.runs.ray_job", str(folder)])
    return f'exec "$(command -v {shlex.quote(python)} || echo python)" {arguments}'


if __name__ == "__main__":
    from dagster_pipes import open_dagster_pipes

    from cv_platform.settings import prepare_process
    from cv_platform.training.together import main

    prepare_process()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    with open_dagster_pipes():
        main(Path(sys.argv[1]))
