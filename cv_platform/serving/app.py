"""The HTTP service of one worker: assembly only.

    ObserveRequests → RequestEnvelope → RefusalLog → CleanRequest → AllowedHosts → CORSMiddleware → SameSite
    → Unexpected → BodyLimit → routes

From the outside in: every request gets its access line, count and span, every answer its id and headers, every refused
prediction its log entry, paths with control characters, other hosts' names and what other sites' pages send their
refusal, everything unforeseen its 500, every body its limits.
All of these are plain ASGI, so that nothing buffers a body or an answer.

BentoML mounts the app (`@bentoml.asgi_app`) and runs its lifespan. Its own routes would pass by all of the above, so
`AnswerAlone` hands each request to the app before BentoML looks for a route.
https://fastapi.tiangolo.com, https://www.starlette.io/middleware/#pure-asgi-middleware
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.routing import Match, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cv_platform.serving.capacity.limits import (
    BATCH_UPLOADS,
    FORM_OVERHEAD_BYTES,
    SHRINK_IMAGE,
    SMALL_BODY_BYTES,
)
from cv_platform.serving.http.access import ObserveRequests
from cv_platform.serving.http.body_limit import BodyAllowance, BodyLimit
from cv_platform.serving.http.clean_requests import CleanRequest
from cv_platform.serving.http.hosts import AllowedHosts
from cv_platform.serving.http.problems import Unexpected, install_problem_handlers, method_not_allowed
from cv_platform.serving.http.refusal_log import RefusalLog
from cv_platform.serving.http.security import RequestEnvelope, SameSite, allowed_origins
from cv_platform.serving.problem import Problem
from cv_platform.serving.routes.batch import BATCH_PATH, batch_router
from cv_platform.serving.routes.examples import API_DESCRIPTION, API_TITLE, API_VERSION
from cv_platform.serving.routes.feedback import feedback_router
from cv_platform.serving.routes.health import health_router
from cv_platform.serving.routes.metrics import metrics_router
from cv_platform.serving.routes.models import models_router
from cv_platform.serving.routes.page import page_files, page_router
from cv_platform.serving.routes.predict import PREDICT_PATH, predict_router
from cv_platform.serving.worker import ServingContext


def create_app(context: ServingContext) -> FastAPI:
    """Returns the app of one worker; its lifespan starts and stops the context.

    Args:
        context: what the routes share; the app is its only user.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        # In a thread: loading a model takes seconds.
        await run_in_threadpool(context.start)
        try:
            yield
        finally:
            await run_in_threadpool(context.stop)

    def allowance_for(path: str) -> BodyAllowance:
        limits, path = context.limits, path.rstrip("/")
        if path == PREDICT_PATH:
            size = context.settings.max_upload_bytes + FORM_OVERHEAD_BYTES
            return BodyAllowance(size, limits.upload_seconds, SHRINK_IMAGE)
        if path == BATCH_PATH:
            size = BATCH_UPLOADS * (context.settings.max_upload_bytes + FORM_OVERHEAD_BYTES)
            return BodyAllowance(size, limits.upload_seconds, "Send fewer or smaller images.")
        return BodyAllowance(SMALL_BODY_BYTES, limits.small_body_seconds)

    routes: list[Route | Mount] = []
    app = FastAPI(
        title=API_TITLE,
        version=API_VERSION,
        description=API_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[
            Middleware(ObserveRequests, context=context, routes=routes),
            Middleware(RequestEnvelope),
            Middleware(RefusalLog, context=context, paths=(PREDICT_PATH, BATCH_PATH)),
            Middleware(CleanRequest),
            Middleware(AllowedHosts, hosts=context.settings.allowed_hosts),
            *allowed_origins(context.settings.cors_origins),
            Middleware(SameSite, origins=context.settings.cors_origins),
            Middleware(Unexpected),
            Middleware(BodyLimit, allowance_for=allowance_for, small_bodies=context.small_bodies),
        ],
    )
    install_problem_handlers(app, is_admin=context.guard.is_admin)
    routers = (
        predict_router(context),
        batch_router(context),
        feedback_router(context),
        models_router(context),
        health_router(context),
        metrics_router(context),
        page_router(),
    )
    for router in routers:
        app.include_router(router)
    app.router.routes.append(page_files())
    routes += [r for router in (app, *routers) for r in router.routes if isinstance(r, Route | Mount)]
    app.router.routes.append(Mount("", app=_unknown_path(routes)))
    return app


class AnswerAlone:
    """ASGI middleware of BentoML's app: hands each request to ours.

    What is left to BentoML is the lifespan, and with it ours; and its bounds on time and concurrency, which stand
    outside. https://docs.bentoml.com/en/latest/build-with-bentoml/asgi.html

    Args:
        app: BentoML's.
        ours: what answers.
    """

    def __init__(self, app: ASGIApp, *, ours: ASGIApp) -> None:
        self.app = app
        self.ours = ours

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        await (self.ours if scope["type"] == "http" else self.app)(scope, receive, send)


def _unknown_path(routes: Sequence[Route | Mount]) -> ASGIApp:
    """Returns what takes every path and method that no route takes, and says what there is instead."""

    async def unknown(scope: Scope, receive: Receive, send: Send) -> None:
        del receive, send
        path = ascii(scope["path"])[:200]
        methods = {
            method
            for route in routes
            if isinstance(route, Route) and route.matches(scope)[0] is Match.PARTIAL
            for method in route.methods or ()
        }
        if not methods:
            raise Problem(404, f"There is nothing at {path}.", expected="one of the routes in /docs")
        raise method_not_allowed(path, scope["method"], methods)

    return unknown
