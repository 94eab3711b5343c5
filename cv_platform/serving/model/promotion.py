"""Moves a service's production pointer, after a load test: what `PUT /update_model` and deployments have in common.

Beginning a probation and ending it are moves too, of the same pointer.

Waiting for the workers is not done here: `deployment.rollout` does it where somebody has the time to wait.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from cv_platform.audit import Action, AuditLog, Note, this_user
from cv_platform.config import CanaryConfig
from cv_platform.errors import (
    BundleNotFoundError,
    CorruptBundleError,
    DeploymentError,
    LockHeldError,
    PointerMovedError,
    PromotionBusyError,
)
from cv_platform.files import exclusive
from cv_platform.probation import Probation
from cv_platform.serving.model.runtime import load_bundle
from cv_platform.storage import BundleMetadata, CentralStorage, PointerMove, ProductionPointer

PROMOTION_LOCK = "promotion.lock"
"""Name of the lock file in the folder `cache` of an installation's home."""
_HISTORY = 50
_ATTEMPTS = 10
"""Moves by other hosts between reading the pointer and moving it, which each takes milliseconds."""


@dataclass(frozen=True)
class Claim:
    """Who wants a service.

    Attributes:
        experiment: its name.
        takes_over: the experiment whose place it may take; None: nobody's.
    """

    experiment: str
    takes_over: str | None = None

    def require(self, storage: CentralStorage, service: str, pointer: ProductionPointer | None) -> str | None:
        """Refuses what would silently take another experiment's place, and returns whose place it is.

        A pointer whose experiment nobody can tell, as its bundle is gone or damaged, stands in nobody's way.

        Raises:
            DeploymentError: `pointer` is another experiment's; the message says what to do.
            StorageError: the bundle's metadata cannot be read.
        """
        owner = None if pointer is None else pointer.experiment or _experiment(storage, pointer)
        if pointer is None or owner in (None, self.experiment, self.takes_over):
            return owner
        raise DeploymentError(
            f"Expected {service} to serve a model of {self.experiment}, or none yet. Received: it serves "
            f"{pointer.model_name} {pointer.version}, and belongs to the experiment {owner}. Give {self.experiment} a "
            f"service of its own (deploy.service: {self.experiment}), or let it take this one's place "
            f"(deploy.takes_over: {owner})."
        )


def _experiment(storage: CentralStorage, pointer: ProductionPointer) -> str | None:
    try:
        return storage.read_metadata(pointer.model_name, pointer.version).experiment
    except (BundleNotFoundError, CorruptBundleError):
        return None


@dataclass(frozen=True)
class Move:
    """A move of the production pointer.

    Attributes:
        before: what it replaced; None: nothing was deployed.
        pointer: where it is now.
    """

    before: ProductionPointer | None
    pointer: ProductionPointer


@dataclass(frozen=True)
class Promoter:
    """Moves the production pointer of one service.

    Attributes:
        storage: central storage.
        service: whose pointer moves.
        cache: folder for downloads.
        lock: file that is locked meanwhile, the same for all processes of an installation (`PROMOTION_LOCK`): two load
            tests at once would cost memory for two models. Other hosts are kept apart by `storage.swap_pointer`.
        wait_seconds: how long to wait for another promotion of this installation to end.
        threads: see `runtime.load_bundle`.
    """

    storage: CentralStorage
    service: str
    cache: Path
    lock: Path
    wait_seconds: float = 0.0
    threads: int | None = None

    def promote(
        self,
        model_name: str,
        version: str | None = None,
        *,
        claim: Claim | None = None,
        note: Note | None = None,
    ) -> Move:
        """Load-tests a version and makes it the one that the service serves; every worker takes it up within seconds.

        The new pointer remembers what was served before. Promoting what is served already confirms it anew and forgets
        nothing.

        Args:
            model_name: the model.
            version: its version; None takes the newest published one.
            claim: who promotes it; None: somebody who names model and service, and so may replace anybody's.

        Raises:
            BundleNotFoundError: there is no such model or version.
            CorruptBundleError: the bundle did not pass its load test; the pointer has not moved.
            DeploymentError: the service is another experiment's.
            PromotionBusyError: another promotion was under way all that time.
            StorageError: the storage cannot be reached or written.
        """
        with self._alone():
            if claim is not None:  # Before the load test, which takes its time.
                claim.require(self.storage, self.service, self.storage.read_pointer(self.service))
            metadata = self._load(model_name, version or self._newest(model_name))
            for _ in range(_ATTEMPTS):
                before = self.storage.read_pointer(self.service)
                owner = None
                if claim is not None:
                    owner = claim.require(self.storage, self.service, before)
                action = "take-over" if claim and owner not in (None, claim.experiment) else "promote"
                with suppress(PointerMovedError):  # By another host: its version is what this one replaces.
                    return self._move(before, metadata, action, note)
        raise self._busy()

    def begin_probation(
        self, model_name: str, version: str, terms: CanaryConfig, *, is_shadow: bool, claim: Claim, note: Note
    ) -> Move | None:
        """Load-tests a version and lets it be tried out beside what the service serves; None: it serves no other one.

        One that is on probation already goes on; another one's ends without a verdict.

        Args:
            model_name: the challenger.
            version: its version.
            terms: share, time and limits.
            is_shadow: it is asked beside the champion, too.
            claim: who promotes it.
            note: by whom, and why.

        Raises:
            BundleNotFoundError, CorruptBundleError, DeploymentError, PromotionBusyError, StorageError: see `promote`.
        """
        with self._alone():
            claim.require(self.storage, self.service, self.storage.read_pointer(self.service))
            metadata = self._load(model_name, version)
            for _ in range(_ATTEMPTS):
                before = self.storage.read_pointer(self.service)
                claim.require(self.storage, self.service, before)
                if before is None or (before.model_name, before.version) == (model_name, version):
                    return None
                former = before.probation
                if (
                    former
                    and former.state == "running"
                    and (former.model_name, former.version) == (model_name, version)
                ):
                    return Move(before, before)
                probation = Probation(
                    probation_id=secrets.token_hex(8),
                    model_name=model_name,
                    version=version,
                    experiment=metadata.experiment,
                    is_shadow=is_shadow,
                    since_utc=datetime.now(UTC),
                    by=note.by,
                    **terms.model_dump(),
                )
                move = _noted_move(probation, "probation", note)
                pointer = before.model_copy(update={"probation": probation, "history": _history(move, before)})
                with suppress(PointerMovedError):
                    _change(self.storage, self.service, before, pointer, move)
                    self.storage.remove_tallies(self.service)  # Of former ones; who has told already tells again.
                    return Move(before, pointer)
        raise self._busy()

    def roll_back(self, note: Note | None = None) -> Move:
        """Load-tests the version that the service served before, and makes it the one it serves.

        A second rollback returns to where the first one started.

        Raises:
            DeploymentError: nothing was served before.
            PromotionBusyError: another promotion was under way, or moved the pointer during the load test.
            BundleNotFoundError, CorruptBundleError, StorageError: see `promote`; the pointer has not moved.
        """
        with self._alone():
            current = self.storage.read_pointer(self.service)
            if current is None or current.previous_version is None or current.previous_model_name is None:
                raise DeploymentError(
                    f"Expected a version that {self.service} served before. Received: none"
                    + (
                        f"; it serves {current.model_name} {current.version} since its first deployment."
                        if current
                        else "; nothing was deployed."
                    )
                    + " Promote a version by its name instead."
                )
            metadata = self._load(current.previous_model_name, current.previous_version)
            try:
                return self._move(current, metadata, "rollback", note)
            except PointerMovedError as err:  # What would be gone back to is no longer what was meant.
                raise self._busy() from err

    @contextmanager
    def _alone(self) -> Generator[None]:
        with ExitStack() as held:
            try:
                held.enter_context(exclusive(self.lock, timeout_seconds=self.wait_seconds))
            except LockHeldError as err:
                raise self._busy() from err
            yield

    def _busy(self) -> PromotionBusyError:
        return PromotionBusyError(
            f"Expected to be the only update within {self.wait_seconds:g} s. Received: another update or rollback is "
            "running. Wait for it, then look at /models/current."
        )

    def _newest(self, model_name: str) -> str:
        versions = self.storage.bundle_versions(model_name)
        if not versions:
            raise BundleNotFoundError(
                f"Expected a published model. Received: {model_name}, which has none. Materialise its bento first."
            )
        return versions[-1]

    def _load(self, model_name: str, version: str) -> BundleMetadata:
        return load_bundle(self.storage, model_name, version, cache=self.cache, threads=self.threads).metadata

    def _move(
        self, before: ProductionPointer | None, metadata: BundleMetadata, action: Action, note: Note | None
    ) -> Move:
        note = note or Note(this_user())
        previous_model_name, previous_version = None, None
        if before is not None:
            previous_model_name, previous_version = before.model_name, before.version
            if (before.model_name, before.version) == (metadata.model_name, metadata.version):
                previous_model_name, previous_version = before.previous_model_name, before.previous_version
        move = _noted_move(metadata, action, note)
        pointer = ProductionPointer(
            model_name=move.model_name,
            version=move.version,
            previous_model_name=previous_model_name,
            previous_version=previous_version,
            since_utc=move.since_utc,
            experiment=metadata.experiment,
            history=_history(move, before),
        )
        _change(self.storage, self.service, before, pointer, move)
        return Move(before, pointer)


def end_probation(
    storage: CentralStorage, service: str, before: ProductionPointer, ended: Probation
) -> ProductionPointer:
    """Ends a probation, and returns the pointer: at the challenger if it is promoted, else at the champion as it was.

    Args:
        storage: central storage.
        service: whose pointer.
        before: the pointer as it was read, with the probation running.
        ended: the same with its state, reason and tally.

    Raises:
        PointerMovedError: somebody has moved the pointer since, maybe to end it as well. Nothing was changed.
        BundleNotFoundError: the challenger's bundle is gone.
        StorageError: the storage cannot be reached or written.
    """
    note = Note(f"the probation on {service}", f"{ended.reason}. {ended}"[:2000])
    if ended.state == "promoted":
        move = _noted_move(ended, "promote", note)
        pointer = ProductionPointer(
            model_name=ended.model_name,
            version=ended.version,
            previous_model_name=before.model_name,
            previous_version=before.version,
            since_utc=move.since_utc,
            experiment=ended.experiment,
            history=_history(move, before),
            probation=ended,
        )
    else:
        move = _noted_move(before, "return", note)
        pointer = before.model_copy(update={"probation": ended, "history": _history(move, before)})
    _change(storage, service, before, pointer, move)
    return pointer


def _noted_move(to: Probation | ProductionPointer | BundleMetadata, action: Action, note: Note) -> PointerMove:
    return PointerMove(
        model_name=to.model_name,
        version=to.version,
        since_utc=datetime.now(UTC),
        action=action,
        by=note.by,
        because=note.because,
    )


def _history(move: PointerMove, before: ProductionPointer | None) -> tuple[PointerMove, ...]:
    return (move, *(before.history if before else ()))[:_HISTORY]


def _change(
    storage: CentralStorage,
    service: str,
    before: ProductionPointer | None,
    pointer: ProductionPointer,
    move: PointerMove,
) -> None:
    """Replaces the pointer, and notes it in the audit log; what it names anew has to be there afterwards."""
    subject, note = f"{service}: {move.model_name} {move.version}", Note(move.by, move.because)
    with AuditLog(storage.url).noted(cast(Action, move.action), subject, note):
        storage.swap_pointer(service, before, pointer)
        try:
            storage.read_metadata(move.model_name, move.version)
        except BundleNotFoundError:  # Another host has collected it as garbage; see `CentralStorage.delete_bundle`.
            with suppress(PointerMovedError):
                storage.swap_pointer(service, pointer, before)
            raise
