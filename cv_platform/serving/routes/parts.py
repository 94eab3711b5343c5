"""What one worker is made of, and how its routes get at it: `async def route(parts: Parts, …)`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

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


class ImageRoute(APIRoute):
    """A route `(parts, request, explain, tag)` that takes images: it asks for the key and hands on these by itself.

    FastAPI's resolving of the same four, which /docs goes on to show, takes as long as reading the form.
    https://fastapi.tiangolo.com/how-to/custom-request-and-route/
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""

        async def handle(request: Request) -> Response:
            parts = await _parts_of(request)
            parts.guard.require_api_key(request)
            query = request.query_params
            return await self.endpoint(parts, request, query.get("explain"), query.get("tag"))

        return handle
