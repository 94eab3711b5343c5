"""Opens the parts of one worker, and closes them in the reverse order: once per process.

A worker that is not open has no parts, so that none of them is ever half made.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from cv_platform.errors import CvPlatformError
from cv_platform.serving.capacity.admission import Admission
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.serving.capacity.memory import RequestMemory
from cv_platform.serving.capacity.rate_limit import RateLimiter
from cv_platform.serving.capacity.refusal_bounds import RefusalBounds
from cv_platform.serving.capacity.worker_calls import WorkerCalls
from cv_platform.serving.http.refusal_log import Refusals
from cv_platform.serving.http.security import Guard
from cv_platform.serving.log.shadow_log import ShadowLog
from cv_platform.serving.log.worker_log import WorkerLog
from cv_platform.serving.model.holder import ModelHolder, ModelSource, make_worker_id
from cv_platform.serving.model.promotion import PROMOTION_LOCK, Promoter
from cv_platform.serving.model.shadow import ShadowPlace
from cv_platform.serving.model.worker_watch import WorkerWatch
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.serving.telemetry.metrics import ServingMetrics, process_metrics
from cv_platform.serving.telemetry.tracing import Tracing
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

logger = logging.getLogger(__name__)

_HOUSEKEEPING_SECONDS = 2.0
_STOP_SECONDS = 10.0


@contextmanager
def open_worker(
    settings: Settings,
    *,
    bundled: Path | None = None,
    limits: ServingLimits | None = None,
    models: ModelSource | None = None,
    metrics: ServingMetrics | None = None,
) -> Generator[WorkerParts]:
    """Yields the parts of a worker, its log opened and its model loaded; at the end finishes what is under way.

    A database or storage that is away stops nothing. Nor does a disk that has no room for the spool: without one no
    prediction is answered, and it is tried again until there is.

    Args:
        settings: of the installation.
        bundled: folder of the model inside a Bento, see `fallback.write_fallback`; None without one.
        limits: what this worker allows itself; None: its share of the machine.
        models: where models come from; None makes a `ModelHolder` for `settings.service_name`.
        metrics: None takes those of the process.
    """
    limits = limits or ServingLimits.of(settings)
    metrics = metrics or process_metrics()
    service, cache, storage = settings.service_name, settings.home / "cache", CentralStorage(settings.storage_url)
    with ExitStack() as opened:
        tracing = None
        if settings.otlp_endpoint is not None:
            tracing = Tracing(settings.otlp_endpoint, service_name=service, worker_id=make_worker_id())
            opened.callback(tracing.stop)
        log = opened.enter_context(closing(WorkerLog(settings, metrics)))
        rate = None
        if settings.rate_limit_per_minute is not None:
            rate = opened.enter_context(closing(RateLimiter(cache / "rate_limits", settings.rate_limit_per_minute)))
        workers = WorkerWatch(storage, service)
        models = models or ModelHolder(
            workers,
            worker_id=make_worker_id(),
            cache=cache,
            bundled=bundled,
            threads=limits.model_threads,
            metrics=metrics,
            shadows=ShadowPlace(
                storage_url=storage.url,
                cache=cache / "bundles",
                max_pixels=settings.max_upload_pixels,
                log=ShadowLog(lambda: log.opened.database()).write,
                metrics=metrics,
            ),
        )
        opened.callback(models.stop)
        models.start()
        memory = RequestMemory(
            limits.memory_bytes, max_upload_bytes=settings.max_upload_bytes, max_pixels=settings.max_upload_pixels
        )
        guard = Guard(settings)
        parts = WorkerParts(
            settings=settings,
            limits=limits,
            metrics=metrics,
            tracing=tracing,
            guard=guard,
            refusals=Refusals(metrics, guard, RefusalBounds(), log),
            admission=opened.enter_context(closing(Admission(limits, memory, rate))),
            log=log,
            models=models,
            storage=storage,
            workers=workers,
            promoter=Promoter(
                storage, service, cache=cache / "bundles", lock=cache / PROMOTION_LOCK, threads=limits.model_threads
            ),
            calls=opened.enter_context(closing(WorkerCalls())),
            stopping=threading.Event(),
        )
        note_load(parts)
        housekeeper = threading.Thread(target=_keep_house, args=(parts,), name="housekeeper", daemon=True)
        housekeeper.start()
        opened.callback(housekeeper.join, _STOP_SECONDS)  # It may wait for a disk that hangs.
        opened.callback(parts.stopping.set)
        yield parts


def _keep_house(parts: WorkerParts) -> None:
    while not parts.stopping.wait(_HOUSEKEEPING_SECONDS):
        try:
            parts.log.tend()
            note_load(parts)
        except (CvPlatformError, OSError, sqlite3.Error):
            logger.exception("The request log's housekeeping failed; it goes on")


def note_load(parts: WorkerParts) -> None:
    """Tells the metrics how full the worker is, and whether it reaches central storage."""
    metrics, admission = parts.metrics, parts.admission
    metrics.storage_is(reachable=parts.models.status().get("storage_error") is None)
    gates = {"predictions": admission.in_flight, "uploads": admission.uploads, "bodies": admission.small_bodies}
    for name, gate in gates.items():
        metrics.places_are(name, gate.inside, gate.limit)
    metrics.memory_is(admission.memory.taken_bytes, admission.memory.limit_bytes)
