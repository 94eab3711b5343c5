"""The artifacts of MLflow runs, folder by folder; imported late, as MLflow takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cv_platform.errors import TrackingError

_PAGE = 1000


@dataclass(frozen=True)
class RunArtifacts:
    """One run's folder.

    Attributes:
        run_id: MLflow's.
        folder: `<artifact root>/<experiment>/<run_id>`.
        series: runs of one series succeed each other: experiment and stage.
        started_ms: since 1970.
        is_deleted: in MLflow; or MLflow does not know it any more.
    """

    run_id: str
    folder: Path
    series: tuple[str, str]
    started_ms: int
    is_deleted: bool


def run_artifacts(tracking_uri: str, root: Path) -> list[RunArtifacts]:
    """Lists the folders of runs below `root`, newest first.

    Raises:
        TrackingError: MLflow's database cannot be read; or it knows none of these runs, so it is another one's.
    """
    folders = [folder for folder in root.glob("*/*") if folder.is_dir() and _is_run_id(folder.name)]
    if not folders:
        return []
    known = _runs(tracking_uri)
    if not any(folder.name in known for folder in folders):
        # A run that is not known counts as deleted: with an empty, older or other database all of them would.
        raise TrackingError(
            f"Expected MLflow to know at least one run of the {len(folders)} whose files are in {root}, such as "
            f"{folders[0].name}. Received: {len(known)} runs, none of them. Nothing is deleted. Check that "
            "MLFLOW_TRACKING_URI and CV_MLFLOW_ARTIFACTS mean the same server, and that its database is the right one."
        )
    found = []
    for folder in folders:
        run = known.get(folder.name)
        started = int(folder.stat().st_mtime * 1000) if run is None else run.info.start_time
        stage = "" if run is None else run.data.tags.get("stage", "")
        is_deleted = run is None or run.info.lifecycle_stage == "deleted"
        found.append(RunArtifacts(folder.name, folder, (folder.parent.name, stage), started, is_deleted))
    return sorted(found, key=lambda run: run.started_ms, reverse=True)


def _runs(tracking_uri: str) -> dict[str, Any]:
    from mlflow import MlflowClient
    from mlflow.entities import ViewType
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    client = MlflowClient(tracking_uri, registry_uri=tracking_uri)
    found: dict[str, Any] = {}
    try:
        experiments = [e.experiment_id for e in client.search_experiments(view_type=ViewType.ALL)]
        token = None
        while True:
            page = client.search_runs(experiments, run_view_type=ViewType.ALL, max_results=_PAGE, page_token=token)
            found |= {run.info.run_id: run for run in page}
            token = page.token
            if not token:
                return found
    except (MlflowException, SQLAlchemyError, OSError) as err:
        raise TrackingError(f"Cannot list the runs: {err}. Check MLFLOW_TRACKING_URI.") from err


def _is_run_id(name: str) -> bool:
    return len(name) == 32 and all(character in "0123456789abcdef" for character in name)
