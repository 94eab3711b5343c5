"""`GET /metrics`: what Prometheus scrapes, of all workers of this server, whichever of them answers.

BentoML's own route is off: it labels every path by itself, ids included, so that each look at a prediction would be a
new series. https://docs.bentoml.com/en/latest/build-with-bentoml/observability/metrics.html
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from cv_platform.serving.telemetry.exposition import render
from cv_platform.serving.worker import ServingContext


def metrics_router(context: ServingContext) -> APIRouter:
    """Returns the route `GET /metrics`."""
    router = APIRouter(include_in_schema=False)

    @router.get("/metrics")
    # Not in one of Starlette's threads, which may all wait for something; here, only quick work is done.
    async def metrics() -> Response:
        text, media_type = await asyncio.to_thread(render, context.metrics)
        return Response(text, media_type=media_type)

    return router
