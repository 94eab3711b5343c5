"""Moves a service's production pointer, after a load test: what `PUT /update_model` and deployments have in common.

Waiting for the workers is not done here: `deployment.rollout` does it where somebody has the time to wait.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cv_platform.database.file_lock import exclusive
from cv_platform.errors import BundleNotFoundError, DeploymentError, PromotionBusyError, ServiceError
from cv_platform.serving.runtime import load_bundle
from cv_platform.storage import CentralStorage, ProductionPointer

PROMOTION_LOCK = "promotion.lock"
"""Name of the lock file in the folder `cache` of an installation's home."""


def promote(
    storage: CentralStorage,
    *,
    service: str,
    model_name: str,
    version: str | None = None,
    cache: Path,
    lock: Path,
    wait_seconds: float = 0.0,
    threads: int | None = None,
) -> ProductionPointer:
    """Load-tests a version and makes it the one that `service` serves; every worker takes it up within seconds.

    Args:
        storage: central storage.
        service: whose pointer moves.
        model_name: the model.
        version: its version; None takes the newest published one.
        cache: folder for downloads.
        lock: file that is locked meanwhile, the same for all processes of an installation (`PROMOTION_LOCK`): two
            promotions at once would cost memory for two models, and forget one of the versions served before.
        wait_seconds: how long to wait for another promotion to end.
        threads: see `runtime.load_bundle`.

    Returns:
        The new pointer, which remembers what was served before. Promoting what is served already confirms it anew and
        forgets nothing.

    Raises:
        BundleNotFoundError: there is no such model or version.
        CorruptBundleError: the bundle did not pass its load test; the pointer has not moved.
        PromotionBusyError: another promotion was under way all that time.
        StorageError: the storage cannot be reached or written.
    """
    with _only_one(lock, wait_seconds):
        return _promote(storage, service=service, model_name=model_name, version=version, cache=cache, threads=threads)


def roll_back(
    storage: CentralStorage,
    *,
    service: str,
    cache: Path,
    lock: Path,
    wait_seconds: float = 0.0,
    threads: int | None = None,
) -> ProductionPointer:
    """Load-tests the version that `service` served before, and makes it the one it serves.

    A second rollback returns to where the first one started. Arguments as for `promote`.

    Raises:
        DeploymentError: nothing was served before.
        BundleNotFoundError, CorruptBundleError, PromotionBusyError, StorageError: see `promote`; the pointer has not
            moved.
    """
    with _only_one(lock, wait_seconds):
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
        return _promote(
            storage,
            service=service,
            model_name=current.previous_model_name,
            version=current.previous_version,
            cache=cache,
            threads=threads,
        )


@contextmanager
def _only_one(lock: Path, wait_seconds: float) -> Generator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(lock, timeout_seconds=wait_seconds))
        except ServiceError as err:
            raise PromotionBusyError(
                f"Expected to be the only update within {wait_seconds:g} s. Received: another update or rollback is "
                "running. Wait for it, then look at /models/current."
            ) from err
        yield


def _promote(
    storage: CentralStorage, *, service: str, model_name: str, version: str | None, cache: Path, threads: int | None
) -> ProductionPointer:
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
