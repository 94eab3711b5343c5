"""`cv-platform promote`: a person puts a version into production, and says why; also one that its gate has refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from cv_platform.audit import AuditLog, Note
from cv_platform.config import DeployConfig, ExperimentConfig
from cv_platform.errors import BundleNotFoundError, TrackingError, VerdictError
from cv_platform.record_store import RecordStore, record_stores
from cv_platform.records import Deployment, Evaluation, ModelIdentity
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

logger = logging.getLogger(__name__)


def promote_version(
    settings: Settings,
    version: str,
    experiments: Sequence[ExperimentConfig],
    *,
    note: Note,
    say: Callable[[str], None],
) -> str:
    """Makes the service of its experiment serve a version, and returns what came of it.

    A published version is load-tested and deployed at once. One that its gate has refused has no bundle yet: the
    override is kept, and Dagster makes bundle and deployment.

    Args:
        settings: the installation.
        version: of any model.
        experiments: those that the installation has, for the service.
        note: who promotes it, and why; the reason may not be blank.
        say: is given a line per finished asset.

    Raises:
        VerdictError: no reason is given.
        BundleNotFoundError: nobody knows the version.
        CvPlatformError: it could not be exported or deployed; the message says why.
    """
    if not note.because.strip():
        raise VerdictError('Expected a reason, which is kept with the version. Received: none. Say --because "…".')
    storage = CentralStorage(settings.storage_url)
    model_name = next((model for model, known in storage.stored_bundles() if known == version), None)
    if model_name is not None and version in storage.bundle_versions(model_name):
        return _deploy(settings, storage, ModelIdentity(model_name=model_name, version=version), experiments, note)
    for store in record_stores(settings.home):
        evaluation = store.latest(Evaluation)
        if evaluation is not None and evaluation.model.version == version:
            AuditLog(storage.url).overrule(evaluation.model.model_name, version, note)
            return _publish(settings, store, say)
    raise BundleNotFoundError(
        f"Expected a published version, or the latest model of an experiment. Received: {version}. Look for it on "
        f"Dagster's page, or in {settings.storage_url}; an older model that was never published is trained again."
    )


def _deploy(
    settings: Settings,
    storage: CentralStorage,
    model: ModelIdentity,
    experiments: Sequence[ExperimentConfig],
    note: Note,
) -> str:
    from cv_platform.deployment.rollout import deploy
    from cv_platform.tracking import CHAMPION, set_alias

    experiment = next((config for config in experiments if config.model.model_name == model.model_name), None)
    config = experiment.deploy if experiment else DeployConfig(service=settings.service_name)
    owner = storage.read_metadata(model.model_name, model.version).experiment
    name = experiment.name if experiment else owner or model.model_name
    result = deploy(model, config, experiment=name, storage=storage, cache=settings.home / "cache", note=note)
    try:
        set_alias(settings.mlflow_tracking_uri, model.model_name, CHAMPION, model.version)
    except TrackingError as err:  # The service serves the version already; MLflow only shows it.
        logger.warning("MLflow's alias %s was not moved: %s", CHAMPION, err)
    return result.message


def _publish(settings: Settings, store: RecordStore, say: Callable[[str], None]) -> str:
    from cv_platform.local.environment import new_run_log, platform_environment, prepare_home
    from cv_platform.local.graph import materialize

    prepare_home(settings)
    log: Path = new_run_log(settings.home / "logs", store.experiment)
    say(f"Its gate is overruled. Dagster makes its bundle and deploys it; log in {log}")
    selection = " or ".join(
        f'key:"{store.experiment}/{asset}"' for asset in ("bento", "challenger_replay", "deployment")
    )
    materialize(selection, platform_environment(settings), log=log, say=say)
    deployment = store.latest(Deployment)
    return deployment.message if deployment else "It is deployed."
