"""Moves a service to another model version and stays until every running worker confirms it, or puts it back.

The pointer itself is moved by `serving.promotion`; here is the waiting, and the way back. A challenger that is tried
out on live traffic first is the service's own affair (`serving.model.probation`), which ends that, whoever waits here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from cv_platform.audit import AuditLog, Note, this_user
from cv_platform.config import DeployConfig
from cv_platform.errors import ChallengerReturnedError, DeploymentError, PointerMovedError, StorageError
from cv_platform.probation import Probation
from cv_platform.records import Deployment, ModelIdentity
from cv_platform.serving.model.promotion import PROMOTION_LOCK, Claim, Move, Promoter, end_probation
from cv_platform.serving.model.worker_watch import HEARTBEAT_STALE_SECONDS, WorkerWatch
from cv_platform.storage import CentralStorage, ProductionPointer, WorkerHeartbeat

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_PROMOTION_SECONDS = 120.0
"""Longest wait for an update that somebody else has started: it load-tests a model."""


def require_service(config: DeployConfig, *, experiment: str, storage: CentralStorage) -> None:
    """Refuses, before hours of training, what `deploy` would refuse after them: a service that is another experiment's.

    Raises:
        DeploymentError: it is; the message says what to do.
        StorageError: central storage cannot be read.
    """
    Claim(experiment, config.takes_over).require(storage, config.service, storage.read_pointer(config.service))


def deploy(
    model: ModelIdentity,
    config: DeployConfig,
    *,
    experiment: str,
    storage: CentralStorage,
    cache: Path,
    note: Note | None = None,
) -> Deployment:
    """Makes `config.service` serve a version of `experiment`: load test, pointer, confirmation by every running worker.

    With `config.canary` or `config.shadow`, what serves already stays until the version has been tried out beside it.
    The service ends that by itself; a call that joins one under way, as a retry does, waits for its end.

    Args:
        model: a published version.
        config: the service, and how long its workers have.
        experiment: whose model it is.
        storage: central storage.
        cache: folder for downloads.
        note: who deploys it, and why; None: who runs this process, without a reason.

    Raises:
        BundleNotFoundError, CorruptBundleError: the bundle did not pass its load test; nothing has moved.
        DeploymentError: the service is another experiment's, or a worker did not take the version (the message names it
            and its error), or no worker runs to try it out; the pointer is back where it was.
        ChallengerReturnedError: it was tried out and sent back.
        StorageError: central storage cannot be reached. A version that is being tried out goes on being so.
    """
    claim, note = Claim(experiment, config.takes_over), note or Note(this_user())
    promoter = _promoter(storage, config.service, cache)

    def make(has_lived: bool) -> Move:
        tried = _try_out(promoter, model, config, claim, note, has_lived=has_lived)
        return tried or promoter.promote(model.model_name, model.version, claim=claim, note=note)

    return _move(promoter, make, confirm_timeout_seconds=config.confirm_timeout_seconds)


def rollback(
    service: str,
    storage: CentralStorage,
    cache: Path,
    *,
    note: Note | None = None,
    confirm_timeout_seconds: float = 60.0,
) -> Deployment:
    """Makes `service` serve what it served before, with the same care as a deployment.

    Raises:
        DeploymentError: nothing was served before, or a worker did not take it.
        BundleNotFoundError, CorruptBundleError, StorageError: see `deploy`.
    """
    promoter = _promoter(storage, service, cache)
    return _move(promoter, lambda _: promoter.roll_back(note), confirm_timeout_seconds=confirm_timeout_seconds)


def _promoter(storage: CentralStorage, service: str, cache: Path) -> Promoter:
    return Promoter(storage, service, cache, lock=cache / PROMOTION_LOCK, wait_seconds=_PROMOTION_SECONDS)


def _try_out(
    promoter: Promoter, model: ModelIdentity, config: DeployConfig, claim: Claim, note: Note, *, has_lived: bool
) -> Move | None:
    """Tries a version out and returns its promotion; None where nothing asks for it, or there is no champion yet."""
    storage, service, terms = promoter.storage, promoter.service, config.probation
    serves = storage.read_pointer(service)
    if terms is None or serves is None or (serves.model_name, serves.version) == (model.model_name, model.version):
        return None
    if not has_lived:
        raise DeploymentError(
            f"Expected a running worker of {service}, to try {model} out on its traffic (deploy.canary, "
            "deploy.shadow). Received: none. Start the service, or leave both out of the config."
        )
    begun = promoter.begin_probation(
        model.model_name, model.version, terms, is_shadow=config.shadow, claim=claim, note=note
    )
    if begun is None or begun.pointer.probation is None or begun.before is None:
        return None
    logger.info("%s is tried out on the traffic of %s", model, service)
    try:
        pointer = _wait_for_end(storage, service, begun.pointer.probation, 60 * terms.give_up_minutes)
    except StorageError:  # The service goes on, and ends it; a retry waits for it.
        raise
    except BaseException:
        _give_up(storage, service, begun.pointer.probation.probation_id)
        raise
    return Move(begun.before.model_copy(update={"probation": None}), pointer)


def _wait_for_end(
    storage: CentralStorage, service: str, probation: Probation, give_up_seconds: float
) -> ProductionPointer:
    name = f"{probation.model_name} {probation.version}"
    deadline = time.monotonic() + give_up_seconds + _PROMOTION_SECONDS
    while True:
        pointer = storage.read_pointer(service)
        found = pointer.probation if pointer else None
        if pointer is None or found is None or found.probation_id != probation.probation_id:
            raise DeploymentError(
                f"Expected {name} on probation at {service}. Received: somebody has moved the pointer meanwhile, to "
                f"{f'{pointer.model_name} {pointer.version}' if pointer else 'nothing'}. `cv-platform audit` says who."
            )
        if found.state == "promoted":
            return pointer
        if found.state == "returned":
            raise ChallengerReturnedError(
                f"Expected {name} to stand its probation at {service}. Received: it was sent back. {found.reason}. "
                f"{found}. {pointer.model_name} {pointer.version} goes on.",
                found.model_dump(mode="json"),
            )
        if time.monotonic() >= deadline:
            raise DeploymentError(
                f"Expected {service} to end the probation of {name} within {give_up_seconds / 60:g} minutes. "
                "Received: no end. The previous version stays in production. Look whether the service runs."
            )
        time.sleep(_LOOK_SECONDS)


def _give_up(storage: CentralStorage, service: str, probation_id: str) -> None:
    """Sends a challenger back that nobody waits for any more, if it is still on probation."""
    try:
        pointer, found = storage.read_pointer(service), storage.read_probation(service)
        if pointer and found and found.probation_id == probation_id and found.is_running:
            reason = "Who deployed it did not wait for its end"
            ended = found.model_copy(update={"state": "returned", "reason": reason})
            end_probation(storage, service, pointer, ended)
    except (StorageError, DeploymentError):
        logger.exception("The probation at %s goes on until the service ends it", service)


def _move(promoter: Promoter, make: Callable[[bool], Move], *, confirm_timeout_seconds: float) -> Deployment:
    storage, service = promoter.storage, promoter.service
    watch = WorkerWatch(storage, service)
    # Before anything moves: afterwards a version that kills its workers looks as if none had run.
    has_lived = _any_lives(watch)
    started = time.monotonic()
    move = make(has_lived)
    pointer, before = move.pointer, move.before
    try:
        confirmed, dead = _wait_for_workers(watch, service, pointer, confirm_timeout_seconds, has_lived=has_lived)
    except BaseException:  # An interrupted run too must not leave a version that nobody confirmed.
        _put_back(storage, service, move)
        raise
    seconds = time.monotonic() - started
    model = ModelIdentity(model_name=pointer.model_name, version=pointer.version)
    message = (
        f"{service} serves {model}: confirmed by {len(confirmed)} worker(s) in {seconds:.1f} s"
        if confirmed
        else f"{service} will serve {model}: no service is running; the next start serves it"
    )
    if dead:
        message += f". Listed, but without a heartbeat for {HEARTBEAT_STALE_SECONDS:g} s: {', '.join(dead)}"
    if pointer.probation is not None:
        message += f". On probation, {pointer.probation}"
    logger.info("%s", message)
    return Deployment(
        service=service,
        model=model,
        previous_version=before.version if before else None,
        confirmed_workers=confirmed,
        seconds=seconds,
        message=message,
    )


def _any_lives(watch: WorkerWatch) -> bool:
    """Watches until it is known of every worker whether it lives: a beat or two, longer where one has died."""
    deadline = time.monotonic() + 3 * HEARTBEAT_STALE_SECONDS
    while True:
        states = {worker.state for worker in watch.look()}
        if "unknown" not in states or time.monotonic() >= deadline:
            return not states <= {"dead"}
        time.sleep(_LOOK_SECONDS)


def _wait_for_workers(
    watch: WorkerWatch, service: str, pointer: ProductionPointer, timeout_seconds: float, *, has_lived: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the ids of the workers that confirmed, and of those that are listed and were watched without a beat.

    Only a worker that is seen to beat confirms, and every worker has to, unless it is seen to be dead. One that dies
    while it waits no longer counts, one that starts does. All of them dying is no confirmation.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        workers = watch.look()
        refused = [
            worker.beat
            for worker in workers
            if worker.beat.failed_pointer_utc == pointer.since_utc and worker.beat.failed_version == pointer.version
        ]
        if refused:
            raise DeploymentError(
                f"Expected every worker of {service} to take {pointer.model_name} {pointer.version}. Received: "
                + "; ".join(f"{beat.worker_id}: {beat.last_swap_error}" for beat in refused)
                + ". The previous version stays in production."
            )
        live = [worker.beat for worker in workers if worker.state == "live"]
        confirmed = tuple(beat.worker_id for beat in live if _confirms(beat, pointer))
        dead = tuple(worker.beat.worker_id for worker in workers if worker.state == "dead")
        waiting = [worker.beat for worker in workers if worker.beat.worker_id not in {*confirmed, *dead}]
        has_lived = has_lived or bool(live)
        if not waiting and (confirmed or not has_lived):
            return confirmed, dead
        if time.monotonic() >= deadline:
            missing = ", ".join(f"{beat.worker_id} (runs {beat.version or 'nothing'})" for beat in waiting)
            raise DeploymentError(
                f"Expected every worker of {service} to take {pointer.model_name} {pointer.version} within "
                f"{timeout_seconds:g} s. Received: no answer from "
                f"{missing or 'any worker: those that ran have stopped'}. The previous version stays in production. "
                "Look at the service's log, or raise deploy.confirm_timeout_seconds."
            )
        time.sleep(_LOOK_SECONDS)


def _confirms(beat: WorkerHeartbeat, pointer: ProductionPointer) -> bool:
    return (beat.model_name, beat.version) == (pointer.model_name, pointer.version)


def _put_back(storage: CentralStorage, service: str, move: Move) -> None:
    """Undoes the move, unless somebody else has moved the pointer since."""
    to = f"{move.before.model_name} {move.before.version}" if move.before else "nothing"
    note = Note(this_user(), f"{move.pointer.model_name} {move.pointer.version} was not confirmed by the workers")
    try:
        with AuditLog(storage.url).noted("return", f"{service}: {to}", note):
            storage.swap_pointer(service, move.pointer, move.before)
    except PointerMovedError as err:
        logger.warning("The pointer of %s stays where somebody else has put it: %s", service, err)
    except StorageError:
        logger.exception("The pointer of %s still names %s %s", service, move.pointer.model_name, move.pointer.version)
