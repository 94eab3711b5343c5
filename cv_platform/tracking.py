"""MLflow runs, and the registry of models with its aliases: a thin layer, imported late.

No autologging: `mlflow.tensorflow.autolog` needs tensorboard, and `mlflow.keras.autolog` made a fit five times slower.
What is logged is logged by name. Every failure of MLflow becomes a `TrackingError`. Upstream:
https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html.

MLflow's telemetry is switched off by the process's environment (`MLFLOW_DISABLE_TELEMETRY=true` or `DO_NOT_TRACK=true`)
before MLflow is imported; this module reads and writes no environment variable.
"""

from __future__ import annotations

import logging
import math
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from cv_platform.errors import TrackingError

logger = logging.getLogger(__name__)

RUN_KEY_TAG = "cv_platform.run_key"
"""Tag by which a run is found again after its process died."""
VERSION_TAG = "cv_platform.version"
"""Tag of a registered model version: our version, as in storage; MLflow's own is a number."""
CHAMPION = "champion"
"""Alias of the version in production."""
CHALLENGER = "challenger"
"""Alias of the version that was trained last, which the gate judges next."""

_PARAM_LENGTH = 6000
_BATCH = 100
_CURVE_BATCH = 1000
"""What MLflow takes in one request."""


class MlflowRun:
    """One active run. Made by `start_run`.

    Raises:
        TrackingError: (all methods) MLflow cannot be reached, or refuses the value.
    """

    def __init__(self, tracking_uri: str, run_id: str, experiment_id: str) -> None:
        self.tracking_uri = tracking_uri
        self.run_id = run_id
        self.experiment_id = experiment_id
        self._client = _client(tracking_uri)

    def __reduce__(self) -> tuple[type[MlflowRun], tuple[str, str, str]]:
        """Travels to other processes by its address: a client does not."""
        return MlflowRun, (self.tracking_uri, self.run_id, self.experiment_id)

    def url(self, base_url: str) -> str:
        """Returns the run's page below the address of an MLflow server."""
        return run_url(base_url, self.experiment_id, self.run_id)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags; values are written as text."""
        from mlflow.entities import RunTag

        with _errors(f"tag run {self.run_id}"):
            self._client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs nested settings under dotted names (`train.augment.sometimes`), one hundred at a time.

        A parameter of a run never changes: a resumed run may log the same value again, not another.
        """
        from mlflow.entities import Param

        entries = [Param(name, str(value)[:_PARAM_LENGTH]) for name, value in flatten(params).items()]
        with _errors(f"log parameters of run {self.run_id}"):
            for start in range(0, len(entries), _BATCH):
                self._client.log_batch(self.run_id, params=entries[start : start + _BATCH])

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Logs numbers at `step` in one request; those that are not finite are left out, with a warning."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if len(finite) < len(metrics):
            logger.warning("not logged to MLflow, as not finite: %s", ", ".join(sorted(set(metrics) - set(finite))))
        entries = [Metric(name, value, now, step) for name, value in finite.items()]
        with _errors(f"log metrics of run {self.run_id}"):
            for start in range(0, len(entries), _BATCH):
                self._client.log_batch(self.run_id, metrics=entries[start : start + _BATCH])

    def log_curve(self, name: str, points: Mapping[int, float]) -> None:
        """Logs a number by step, a thousand steps in a request."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        entries = [Metric(name, value, now, step) for step, value in points.items()]
        with _errors(f"log {name} of run {self.run_id}"):
            for start in range(0, len(entries), _CURVE_BATCH):
                self._client.log_batch(self.run_id, metrics=entries[start : start + _CURVE_BATCH])

    def log_artifact(self, path: Path, folder: str | None = None) -> str:
        """Copies a file into the run's artifacts and returns its path there."""
        with _errors(f"log {path.name} to run {self.run_id}"):
            self._client.log_artifact(self.run_id, str(path), folder)
        return f"{folder}/{path.name}" if folder else path.name

    @contextmanager
    def child(self, name: str, tags: Mapping[str, Any] | None = None) -> Iterator[MlflowRun]:
        """Makes a run that MLflow shows below this one; it ends as one of `start_run` does.

        Raises:
            TrackingError: MLflow cannot be reached or refuses.
        """
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        all_tags = {MLFLOW_PARENT_RUN_ID: self.run_id, **{key: str(value) for key, value in (tags or {}).items()}}
        with _errors(f"start {name}"):
            made = self._client.create_run(self.experiment_id, tags=all_tags, run_name=name)
        status = "FAILED"
        try:
            yield MlflowRun(self.tracking_uri, made.info.run_id, self.experiment_id)
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            status = "KILLED"
            raise
        finally:
            _end(self._client, made.info.run_id, status)

    def end_killed(self, run_id: str) -> None:
        """Ends another run of this experiment as KILLED, if it still counts as running: its process is known dead."""
        with _errors(f"end run {run_id}"):
            for left in self._client.search_runs(
                [self.experiment_id], f"attributes.run_id = '{run_id}' and attributes.status = 'RUNNING'"
            ):
                self._client.set_terminated(left.info.run_id, "KILLED")

    def register_model_version(
        self, model_name: str, version: str, *, artifact_path: str, tags: Mapping[str, Any] | None = None
    ) -> str:
        """Registers a logged artifact as a version of `model_name`; see `register_model_version`."""
        return register_model_version(self, model_name, version, artifact_path=artifact_path, tags=tags)

    def set_alias(self, model_name: str, alias: str, version: str) -> None:
        """Points `alias` at our `version` of `model_name`; see `set_alias`."""
        set_alias(self.tracking_uri, model_name, alias, version)


@contextmanager
def start_run(
    tracking_uri: str,
    experiment: str,
    *,
    run_name: str,
    run_key: str | None = None,
    tags: Mapping[str, Any] | None = None,
    description: str = "",
    experiment_tags: Mapping[str, Any] | None = None,
    artifact_root: Path | str | None = None,
) -> Iterator[MlflowRun]:
    """Makes a run active while the block lasts: a new one, or the one that carries `run_key`.

    MLflow notes what the machine does meanwhile, as metrics `system/…`. Any run that is still active in this process
    is ended first, so that two experiments never mix. The run ends as FINISHED, as FAILED when the block raises, as
    KILLED when it is interrupted.

    Args:
        tracking_uri: `sqlite:///…/mlflow.db` (its folder is made) or a server's address.
        experiment: its name; made when missing.
        run_name: shown in MLflow.
        run_key: unique within the experiment, such as the Dagster run id and the stage; a run that carries it is
            resumed.
        tags: of the run.
        description: of the run, in Markdown.
        experiment_tags: of the experiment.
        artifact_root: folder or URL below which a *new* experiment keeps its artifacts. A folder is for databases
            opened directly; a server (http) keeps artifacts where it was told to.

    Raises:
        TrackingError: MLflow cannot be reached or refuses.
    """
    import mlflow

    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # It tells of each start and end.
    with _errors(f"start the run {run_name} in {experiment}"):
        while mlflow.active_run() is not None:
            mlflow.end_run()
        _make_folder(tracking_uri)
        mlflow.set_tracking_uri(tracking_uri)
        client = _client(tracking_uri)
        experiment_id = _experiment_id(client, experiment, _artifact_location(tracking_uri, artifact_root, experiment))
        for name, value in (experiment_tags or {}).items():
            client.set_experiment_tag(experiment_id, name, str(value))
        all_tags = {name: str(value) for name, value in (tags or {}).items()}
        existing = _find_run(client, experiment_id, run_key) if run_key else None
        if run_key:
            all_tags[RUN_KEY_TAG] = run_key
        # An explicit id: an MLFLOW_RUN_ID or an experiment that somebody made active must not decide.
        active = mlflow.start_run(
            run_id=existing,
            experiment_id=experiment_id,
            run_name=None if existing else run_name,
            tags=all_tags or None,
            description=description or None,
            # A thread of MLflow's: processor, memory, disk, network and GPUs every ten seconds.
            log_system_metrics=True,
        )
        run = MlflowRun(tracking_uri, active.info.run_id, experiment_id)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        status = "KILLED"
        raise
    finally:
        _end(client, run.run_id, status)


def register_model_version(
    run: MlflowRun, model_name: str, version: str, *, artifact_path: str, tags: Mapping[str, Any] | None = None
) -> str:
    """Registers an artifact of `run` as a version of `model_name` and returns MLflow's number for it.

    Registering the same `version` again returns the number that it has.

    Args:
        run: whose artifact it is.
        model_name: registered model; made when missing.
        version: ours; becomes the tag `cv_platform.version`.
        artifact_path: as `MlflowRun.log_artifact` returned it.
        tags: further tags of the version.

    Raises:
        TrackingError: MLflow cannot be reached or refuses.
    """
    from mlflow.exceptions import MlflowException

    client = _client(run.tracking_uri)
    with _errors(f"register {model_name} {version}"):
        try:
            client.create_registered_model(model_name)
        except MlflowException as err:
            if err.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = _find_version(client, model_name, version)
        if known is not None:
            return str(known.version)
        # Not `models:/…` with a flavour: logging one resolves a Python environment for seconds, and nothing here would
        # load it.
        created = client.create_model_version(
            model_name,
            source=f"runs:/{run.run_id}/{artifact_path}",
            run_id=run.run_id,
            tags={VERSION_TAG: version, **{name: str(value) for name, value in (tags or {}).items()}},
        )
        return str(created.version)


def set_alias(tracking_uri: str, model_name: str, alias: str, version: str) -> None:
    """Points `alias` (such as "champion") at our `version` of `model_name`, away from any other.

    Raises:
        TrackingError: that version is not registered, or MLflow cannot be reached.
    """
    client = _client(tracking_uri)
    with _errors(f"set the alias {alias} of {model_name}"):
        found = _find_version(client, model_name, version)
        if found is None:
            raise TrackingError(
                f"Expected a registered version of {model_name}. Received: {version}. "
                "Materialise its model with MLflow tracking first."
            )
        client.set_registered_model_alias(model_name, alias, found.version)


def end_leftover_runs(tracking_uri: str, *, dagster_run_id: str) -> int:
    """Ends as FAILED what a killed process of a Dagster run has left RUNNING; returns how many runs those were.

    They are found by `run_key`, which starts with the Dagster run id and a colon, or by dagster-mlflow's tag.

    Raises:
        TrackingError: MLflow cannot be reached.
    """
    client = _client(tracking_uri)
    quoted = dagster_run_id.replace("'", "")
    conditions = (f"tags.`{RUN_KEY_TAG}` LIKE '{quoted}:%'", f"tags.dagster_run_id = '{quoted}'")
    with _errors(f"end the MLflow runs that Dagster run {dagster_run_id} left"):
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        left = {
            run.info.run_id
            for condition in conditions
            for run in client.search_runs(experiments, f"{condition} and attributes.status = 'RUNNING'")
        }
        for run_id in left:
            client.set_terminated(run_id, "FAILED")
    return len(left)


def head_commit(repository: Path, *, otherwise: str | None = None) -> str | None:
    """Returns the commit that `repository` stands at; `otherwise` outside git, as in an image."""
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return otherwise
    # Without a commit, it prints "HEAD" and fails.
    return result.stdout.strip() if result.returncode == 0 else otherwise


def run_url(base_url: str, experiment_id: str, run_id: str) -> str:
    """Returns a run's page below the address of an MLflow server."""
    return f"{base_url.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs/{quote(run_id)}"


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one level with dotted names; sequences stay values."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _client(tracking_uri: str) -> Any:
    from mlflow import MlflowClient

    # The registry too: left out, it follows whatever the process has set.
    return MlflowClient(tracking_uri, registry_uri=tracking_uri)


def _make_folder(tracking_uri: str) -> None:
    parts = urlsplit(tracking_uri)
    if parts.scheme.startswith("sqlite") and parts.path not in {"", "/"}:
        # sqlite:////absolute and sqlite:///relative: the path starts after the third slash.
        Path(parts.path[1:]).parent.mkdir(parents=True, exist_ok=True)


def _experiment_id(client: Any, name: str, artifact_location: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException as err:
            if err.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # Another process was faster.
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _artifact_location(tracking_uri: str, artifact_root: Path | str | None, experiment: str) -> str | None:
    folder = re.sub(r"[^A-Za-z0-9_.-]", "_", experiment)
    if isinstance(artifact_root, str) and "://" in artifact_root:
        return f"{artifact_root.rstrip('/')}/{folder}"
    if artifact_root is None or tracking_uri.startswith(("http://", "https://")):
        return None
    return (Path(artifact_root).absolute() / folder).as_uri()


def _find_run(client: Any, experiment_id: str, run_key: str) -> str | None:
    quoted = run_key.replace("'", "")
    # A finished run is history: the same key again is a repetition, with a run of its own.
    query = f"tags.`{RUN_KEY_TAG}` = '{quoted}' and attributes.status != 'FINISHED'"
    runs = client.search_runs([experiment_id], query, max_results=1)
    return runs[0].info.run_id if runs else None


def _find_version(client: Any, model_name: str, version: str) -> Any | None:
    token = None
    while True:
        page = client.search_model_versions(f"name='{model_name}'", max_results=200, page_token=token)
        for found in page:
            if found.tags.get(VERSION_TAG) == version:
                return found
        token = page.token
        if not token:
            return None


def _end(client: Any, run_id: str, status: str) -> None:
    """Ends the run, without hiding an exception that is under way."""
    import mlflow

    try:
        active = mlflow.active_run()
        if active is not None and active.info.run_id == run_id:
            mlflow.end_run(status)
        else:  # Somebody ended it or started another inside the block.
            client.set_terminated(run_id, status)
    except _mlflow_errors() as err:
        logger.warning("MLflow run %s could not be ended as %s: %s", run_id, status, err)


def _mlflow_errors() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


@contextmanager
def _errors(action: str) -> Iterator[None]:
    try:
        yield
    except _mlflow_errors() as err:
        raise TrackingError(
            f"Cannot {action}: {err}. Check MLFLOW_TRACKING_URI, and that the MLflow server runs if it names one."
        ) from err
