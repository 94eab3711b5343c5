"""What one worker is made of, and how its routes get at it: `async def route(parts: Parts, …)`."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from cv_platform.serving.capacity.admission import Admission
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.serving.capacity.worker_calls import WorkerCalls
from cv_platform.serving.http.refusal_log import Refusals
from cv_platform.serving.http.security import Guard
from cv_platform.serving.log.worker_log import WorkerLog
from cv_platform.serving.model.holder import ModelSource
from cv_platform.serving.model.promotion import Promoter
from cv_platform.serving.model.worker_watch import WorkerWatch
from cv_platform.serving.telemetry.metrics import ServingMetrics
from cv_platform.serving.telemetry.tracing import Tracing
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage


@dataclass(frozen=True)
class WorkerParts:
    """The parts of one worker, all of them open; `worker.open_worker` makes them and closes them.

    Attributes:
        tracing: None without an endpoint.
        calls: which may hang.
        stopping: set once the worker is about to let go of its parts.
    """

    settings: Settings
    limits: ServingLimits
    metrics: ServingMetrics
    tracing: Tracing | None
    guard: Guard
    refusals: Refusals
    admission: Admission
    log: WorkerLog
    models: ModelSource
    storage: CentralStorage
    workers: WorkerWatch
    promoter: Promoter
    calls: WorkerCalls
    stopping: threading.Event


async def _parts_of(request: Request) -> WorkerParts:
    return request.app.state.parts


Parts = Annotated[WorkerParts, Depends(_parts_of)]
