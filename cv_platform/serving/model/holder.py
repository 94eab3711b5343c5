"""Holds the model that a worker serves, and swaps it while requests run.

A thread follows the production pointer: it loads the named version beside the current one, lets it pass its self-test,
and stores one attribute. A request takes `current()` once and keeps that reference, so no request sees a half-swapped
model. Whatever goes wrong (corrupt bundle, storage away, unreadable pointer) leaves the last good model serving. A
second thread writes the heartbeat, so that a long load does not look like a dead worker. A third one watches those of
the other workers.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from cv_platform.errors import CvPlatformError, StorageError
from cv_platform.serving.machine import release_memory
from cv_platform.serving.model.fallback import BUNDLED, load_fallback, write_fallback
from cv_platform.serving.model.probation import LiveProbation, ProbationKeeper
from cv_platform.serving.model.runtime import LoadedModel, fetch, load_bundle
from cv_platform.serving.model.shadow import ShadowPlace
from cv_platform.serving.model.worker_watch import HEARTBEAT_SECONDS, WorkerWatch
from cv_platform.serving.telemetry.metrics import ServingMetrics, SwapOutcome
from cv_platform.storage import ProductionPointer, WorkerHeartbeat

logger = logging.getLogger(__name__)

_POINTER_GONE = (
    "Expected the production pointer that named the model in use. Received: none. Check that the storage is mounted."
)


def make_worker_id() -> str:
    """Returns a name for this process, with its host, that is unique among the workers of a service."""
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())
    return f"{host}-{os.getpid()}"


@dataclass(frozen=True)
class Pace:
    """How often a `ModelHolder` does what.

    Attributes:
        poll_seconds: between two looks at the pointer.
        retry_seconds: how long a version that failed is left alone while the pointer does not move.
        forget_seconds: workers that died without saying goodbye are taken off the list by the others, after watching
            them for so long.
        tell_seconds: between two tellings of what was seen of a probation.
    """

    poll_seconds: float = 0.5
    retry_seconds: float = 60.0
    forget_seconds: float = 600.0
    tell_seconds: float = 2.0


class ModelSource(Protocol):
    """Where the routes get the model from; `ModelHolder` is the one of the service."""

    def current(self) -> LoadedModel | None:
        """Returns the model to answer a request with, or None while there is none."""
        ...

    def probation(self) -> LiveProbation | None:
        """Returns the challenger that answers some of the requests, or None while there is none."""
        ...

    def start(self) -> None:
        """Begins to look for models."""
        ...

    def stop(self) -> None:
        """Ends it."""
        ...

    def status(self) -> dict[str, Any]:
        """Returns what a health page shows."""
        ...


class ModelHolder:
    """The model of one worker; `start` it once, `stop` it at the end.

    At the start it takes, in this order: the version that the pointer names, the last good one that this host has
    served (kept below `cache`), the one bundled with the service, none. Without a model it goes on looking.

    Args:
        watch: of the workers of the service whose production pointer it follows; it knows central storage.
        worker_id: name of this worker, see `make_worker_id`.
        cache: folder for downloads and the last good bundle; workers of one host share it.
        bundled: folder written by `fallback.write_fallback` (the one inside a Bento), or None.
        threads: see `runtime.load_bundle`.
        metrics: count the attempts to take up a model; None: nobody does.
        pace: how often it does what.
        shadows: what a challenger that is asked beside the champion needs; None: none is.
    """

    def __init__(
        self,
        watch: WorkerWatch,
        *,
        worker_id: str,
        cache: Path,
        bundled: Path | None = None,
        threads: int | None = None,
        metrics: ServingMetrics | None = None,
        pace: Pace | None = None,
        shadows: ShadowPlace | None = None,
    ) -> None:
        self.service = watch.service
        self.worker_id = worker_id
        self.public_id = secrets.token_hex(4)
        self._storage = watch.storage
        self._watch = watch
        self._cache = cache
        self._bundled = bundled
        self._threads = threads
        self._metrics = metrics
        self._pace = pace or Pace()
        self._current: LoadedModel | None = None
        self._source: str | None = None
        self._since_utc: datetime | None = None
        self._pointer: ProductionPointer | None = None
        self._answered: datetime | None = None
        self._failed: ProductionPointer | None = None
        self._retry_at = 0.0
        self._unkept: LoadedModel | None = None
        """Serves, and is still to be kept as the last good one: nobody waits for that."""
        self._last_swap_error: str | None = None
        self._storage_errors: dict[str, str] = {}
        self._lock = threading.Lock()
        self._keeper = ProbationKeeper(
            watch.storage,
            watch.service,
            f"{worker_id}-{self.public_id}",
            self._load,
            tell_seconds=self._pace.tell_seconds,
            shadows=shadows,
        )
        self._stopping = threading.Event()
        self._changed = threading.Event()
        self._threads_running: list[threading.Thread] = []

    def current(self) -> LoadedModel | None:
        """Returns the model to answer a request with, or None while there is none. Take it once per request."""
        return self._current

    def probation(self) -> LiveProbation | None:
        """Returns the challenger that answers some of the requests, or None while there is none."""
        return self._keeper.current()

    def start(self) -> None:
        """Loads the first model and begins to follow the pointer; without either, it goes on looking."""
        self._stopping.clear()
        self._start_thread("heartbeat", self._beat_until_stopped)
        self._start_thread("watch", self._watch_until_stopped)
        self._follow_pointer()
        if self._current is None:
            self._start_from_fallback()
        self._changed.set()
        self._start_thread("pointer", self._follow_until_stopped)

    def stop(self) -> None:
        """Stops following, and takes this worker off the list. The model stays usable for requests under way."""
        self._stopping.set()
        self._changed.set()
        for thread in self._threads_running:
            thread.join(timeout=30.0)
        self._threads_running.clear()
        self._keeper.close()
        try:
            self._storage.remove_heartbeat(self.service, self.worker_id)
        except StorageError as err:
            logger.warning("The heartbeat of %s stays until it is stale: %s", self.worker_id, err)

    def status(self) -> dict[str, Any]:
        """Returns what a health page shows, as JSON values; errors are None while all is well."""
        with self._lock:
            model, pointer = self._current, self._pointer
            return {
                "worker_id": self.worker_id,
                "public_id": self.public_id,
                "service": self.service,
                "model_name": model.metadata.model_name if model else None,
                "model_version": model.metadata.version if model else None,
                "model_source": self._source,
                "model_since_utc": self._since_utc.isoformat() if self._since_utc else None,
                "pointer_model_name": pointer.model_name if pointer else None,
                "pointer_version": pointer.version if pointer else None,
                "last_swap_error": self._last_swap_error,
                "failed_version": self._failed.version if self._failed else None,
                "storage_error": next(iter(self._storage_errors.values()), None),
            }

    # Following the pointer

    def _follow_until_stopped(self) -> None:
        while not self._stopping.wait(self._pace.poll_seconds):
            before = self._since_utc
            self._follow_pointer()
            self._keep_as_last_good()
            self._keep_probation()
            if self._since_utc != before:
                release_memory()
        self._keep_as_last_good()

    def _follow_pointer(self) -> None:
        try:
            pointer = self._storage.read_pointer(self.service)
        # Drivers of object stores have errors of their own; the thread must outlive them.
        except Exception as err:
            self._note_storage("read the production pointer", str(err) or type(err).__name__)
            return
        # An unmounted disk is an empty folder: no pointer is only right for who has never served what one named.
        is_gone = pointer is None and self._source not in (None, BUNDLED)
        self._note_storage("read the production pointer", _POINTER_GONE if is_gone else None)
        if pointer is None:
            with self._lock:
                self._pointer, self._failed, self._last_swap_error = None, None, None
            return
        if pointer == self._failed and time.monotonic() < self._retry_at:
            return
        with self._lock:
            self._pointer = pointer
            self._failed, self._last_swap_error = None, None
        metadata = self._current.metadata if self._current else None
        if metadata is None or (metadata.model_name, metadata.version) != (pointer.model_name, pointer.version):
            self._take(pointer)
        if self._answered != pointer.since_utc:
            self._answered = pointer.since_utc
            self._changed.set()

    def _keep_probation(self) -> None:
        try:
            self._keeper.follow(self._pointer)
        # As in `_follow_pointer`.
        except Exception as err:
            self._note_storage("take part in a probation", str(err) or type(err).__name__)
        else:
            self._note_storage("take part in a probation", None)

    def _load(self, model_name: str, version: str) -> LoadedModel:
        return load_bundle(self._storage, model_name, version, cache=self._cache / "bundles", threads=self._threads)

    def _take(self, pointer: ProductionPointer) -> None:
        started = time.monotonic()
        try:
            model = self._keeper.challenger(pointer.model_name, pointer.version)
            model = model or self._load(pointer.model_name, pointer.version)
        except CvPlatformError as err:
            logger.error("Worker %s keeps its model: %s", self.worker_id, err)
            self._note_failure(pointer, str(err))
            self._count("refused", time.monotonic() - started)
            return
        # Anything at all: a worker with a good model must not die of a bad one.
        except Exception as err:
            logger.exception("Worker %s keeps its model", self.worker_id)
            self._note_failure(pointer, f"{pointer.model_name} {pointer.version}: {str(err) or type(err).__name__}")
            self._count("refused", time.monotonic() - started)
            return
        self._swap(model, "pointer")
        name = f"{pointer.model_name} {pointer.version}"
        seconds = time.monotonic() - started
        logger.info("Worker %s serves %s after %.2f s", self.worker_id, name, seconds)
        self._count("swapped", seconds, model)
        self._changed.set()
        self._unkept = model

    def _note_failure(self, pointer: ProductionPointer, message: str) -> None:
        with self._lock:
            self._failed, self._last_swap_error = pointer, message
            self._retry_at = time.monotonic() + self._pace.retry_seconds
        self._changed.set()

    def _count(self, outcome: SwapOutcome, seconds: float, model: LoadedModel | None = None) -> None:
        if self._metrics is not None:
            self._metrics.swap_ended(outcome, seconds)
            if model is not None:
                self._metrics.serves(model.metadata.model_name, model.metadata.version, model.metadata.runtime)

    def _swap(self, model: LoadedModel, source: str) -> None:
        with self._lock:
            self._current, self._source, self._since_utc = model, source, datetime.now(UTC)

    # Fallbacks

    def _start_from_fallback(self) -> None:
        candidates = [("last good", self._cache / "last_good", self.service)]
        if self._bundled is not None:
            candidates.append((BUNDLED, self._bundled, BUNDLED))
        for source, directory, pointer in candidates:
            started = time.monotonic()
            try:
                model = load_fallback(directory, pointer=pointer, threads=self._threads)
            except CvPlatformError as err:
                logger.error("The %s model in %s cannot be used: %s", source, directory, err)
                continue
            # As in `_take`: the next candidate may be good.
            except Exception:
                logger.exception("The %s model in %s cannot be used", source, directory)
                continue
            if model is not None:
                name = f"{model.metadata.model_name} {model.metadata.version}"
                logger.warning("Worker %s starts with the %s model %s", self.worker_id, source, name)
                self._swap(model, source)
                self._count("fallback", time.monotonic() - started, model)
                return
        logger.warning("Worker %s starts without a model and waits for one: deploy it.", self.worker_id)

    def _keep_as_last_good(self) -> None:
        if self._unkept is None:
            return
        metadata, self._unkept = self._unkept.metadata, None
        try:
            folder, _ = fetch(self._storage, metadata.model_name, metadata.version, cache=self._cache / "bundles")
            write_fallback(folder, metadata, self._cache / "last_good", pointer=self.service)
        except (StorageError, OSError) as err:
            name = f"{metadata.model_name} {metadata.version}"
            logger.warning("%s serves but cannot be kept for the next start: %s", name, err)

    # Heartbeat

    def _beat_until_stopped(self) -> None:
        while not self._stopping.is_set():
            self._changed.clear()
            self._beat()
            self._changed.wait(HEARTBEAT_SECONDS)

    def _beat(self) -> None:
        with self._lock:
            metadata = self._current.metadata if self._current else None
            beat = WorkerHeartbeat(
                worker_id=self.worker_id,
                public_id=self.public_id,
                model_name=metadata.model_name if metadata else None,
                version=metadata.version if metadata else None,
                beat_utc=datetime.now(UTC),
                last_swap_error=self._last_swap_error,
                failed_version=self._failed.version if self._failed else None,
                failed_pointer_utc=self._failed.since_utc if self._failed else None,
            )
        try:
            self._storage.write_heartbeat(self.service, beat)
        # As in `_follow_pointer`.
        except Exception as err:
            self._note_storage("write its heartbeat", str(err) or type(err).__name__)
        else:
            self._note_storage("write its heartbeat", None)

    def _watch_until_stopped(self) -> None:
        while not self._stopping.wait(HEARTBEAT_SECONDS):
            try:
                for worker in self._watch.look():
                    if worker.still_seconds > self._pace.forget_seconds:
                        self._storage.remove_heartbeat(self.service, worker.beat.worker_id)
            # As in `_follow_pointer`.
            except Exception as err:
                self._note_storage("watch the other workers", str(err) or type(err).__name__)
            else:
                self._note_storage("watch the other workers", None)

    def _note_storage(self, action: str, error: str | None) -> None:
        """Keeps what central storage refuses for `status`, and logs it once per outage."""
        with self._lock:
            before = self._storage_errors.pop(action, None)
            if error is not None:
                self._storage_errors[action] = error
        if error and not before:
            logger.warning("Worker %s cannot %s and keeps its model: %s", self.worker_id, action, error)
        elif before and not error:
            logger.info("Worker %s can %s again", self.worker_id, action)

    def _start_thread(self, name: str, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"model-{name}", daemon=True)
        self._threads_running.append(thread)
        thread.start()
