"""Moves a service's production pointer, after a load test: what `PUT /update_model` and deployments have in common.

Waiting for the workers is not done here: `deployment.rollout` does it where somebody has the time to wait.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cv_platform.errors import BundleNotFoundError, DeploymentError
from cv_platform.serving.runtime import load_bundle
from cv_platform.storage import CentralStorage, ProductionPointer


def promote(
    storage: CentralStorage,
    *,
    service: str,
    model_name: str,
    version: str | None = None,
    cache: Path,
    threads: int | None = None,
) -> ProductionPointer:
    """Load-tests a version and makes it the one that `service` serves; every worker takes it up within seconds.

    Args:
        storage: central storage.
        service: whose pointer moves.
        model_name: the model.
        version: its version; None takes the newest published one.
        cache: folder for downloads.
        threads: see `runtime.load_bundle`.

    Returns:
        The new pointer, which remembers what was served before. Promoting what is served already confirms it anew and
        forgets nothing.

    Raises:
        BundleNotFoundError: there is no such model or version.
        CorruptBundleError: the bundle did not pass its load test; the pointer has not moved.
        StorageError: the storage cannot be reached or written.
    """
    if version is None:
        versions = storage.bundle_versions(model_name)
        if not versions:
            raise BundleNotFoundError(
                f"Expected a published model. Received: {model_name}, which has none. Materialise its bento first."
            )
        version = versions[-1]
    load_bundle(storage, model_name, version, cache=cache, threads=threads)
    current = storage.read_pointer(service)
    previous_model_name, previous_version = None, None
    if current is not None:
        previous_model_name, previous_version = current.model_name, current.version
        if (current.model_name, current.version) == (model_name, version):
            previous_model_name, previous_version = current.previous_model_name, current.previous_version
    pointer = ProductionPointer(
        model_name=model_name,
        version=version,
        previous_model_name=previous_model_name,
        previous_version=previous_version,
        since_utc=datetime.now(UTC),
    )
    storage.write_pointer(service, pointer)
    return pointer


def roll_back(storage: CentralStorage, *, service: str, cache: Path, threads: int | None = None) -> ProductionPointer:
    """Load-tests the version that `service` served before, and makes it the one it serves.

    A second rollback returns to where the first one started.

    Raises:
        DeploymentError: nothing was served before.
        BundleNotFoundError, CorruptBundleError, StorageError: see `promote`; the pointer has not moved.
    """
    current = storage.read_pointer(service)
    if current is None or current.previous_version is None or current.previous_model_name is None:
        raise DeploymentError(
            f"Expected a version that {service} served before. Received: none"
            + (
                f"; it serves {current.model_name} {current.version} since its first deployment."
                if current
                else "; nothing was deployed."
            )
            + " Promote a version by its name instead."
        )
    return promote(
        storage,
        service=service,
        model_name=current.previous_model_name,
        version=current.previous_version,
        cache=cache,
        threads=threads,
    )
