"""`GET /metrics`: what Prometheus scrapes, of all workers of this server, whichever of them answers.

BentoML's own route is off: it labels every path by itself, ids included, so that each look at a prediction would be a
new series. `exposition` says what stands for its metrics.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from cv_platform.serving.routes.parts import Parts
from cv_platform.serving.telemetry.exposition import render

router = APIRouter(include_in_schema=False)


@router.get("/metrics")
async def metrics(parts: Parts, request: Request) -> Response:
    """Answers a scrape; not in one of Starlette's threads, which may all wait for something."""
    text, media_type = await asyncio.to_thread(render, parts.metrics, request.app.state.bento)
    return Response(text, media_type=media_type)
