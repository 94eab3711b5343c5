"""The HTTP service of one worker: assembly only.

    ObserveRequests → RequestEnvelope → Deadline → RefusalLog → Checks → CORSMiddleware → Unexpected → BodyLimit
    → routes

From the outside in: every request gets its access line, count and span, every answer its id and headers, every request
its end, every refused prediction its log entry, paths with control characters, other hosts' names and what other
sites' pages send their refusal, everything unforeseen its 500, every body its limits.
All of these are plain ASGI, so that nothing buffers a body or an answer.

In BentoML's app it is a middleware (`http.bentoml_app`), and takes each request before BentoML looks for a route: what
none of the app's own takes is BentoML's, which answers behind all of the above.
https://fastapi.tiangolo.com, https://www.starlette.io/middleware/#pure-asgi-middleware
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import HTTPConnection
from starlette.routing import Match, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cv_platform.serving.capacity.limits import (
    BATCH_UPLOADS,
    FORM_OVERHEAD_BYTES,
    SHRINK_IMAGE,
    SMALL_BODY_BYTES,
)
from cv_platform.serving.http.access import ObserveRequests
from cv_platform.serving.http.bentoml_app import bentomls
from cv_platform.serving.http.body_limit import BodyAllowance, BodyLimit
from cv_platform.serving.http.clean_requests import clean_request
from cv_platform.serving.http.deadline import Deadline
from cv_platform.serving.http.hosts import allowed_hosts
from cv_platform.serving.http.problems import Checks, Unexpected, install_problem_handlers, method_not_allowed
from cv_platform.serving.http.refusal_log import RefusalLog
from cv_platform.serving.http.security import SAFE_METHODS, Guard, RequestEnvelope, allowed_origins, same_site
from cv_platform.serving.problem import Problem
from cv_platform.serving.routes import batch, feedback, health, labels, metrics, models, page, predict, predictions
from cv_platform.serving.routes.batch import BATCH_PATH
from cv_platform.serving.routes.examples import API_DESCRIPTION, API_TITLE, API_VERSION
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.serving.routes.predict import PREDICT_PATH


def create_app(parts: WorkerParts, *, bento: tuple[str, str] = ("image_classifier", "not available")) -> FastAPI:
    """Returns the app of one worker, which answers as long as its parts are open.

    Args:
        parts: what the routes share; the app is their only user.
        bento: name and version of the Bento that is served, for the metrics.
    """
    limits, settings = parts.limits, parts.settings

    def allowance_for(path: str) -> BodyAllowance:
        path = path.rstrip("/")
        if path == PREDICT_PATH:
            size = settings.max_upload_bytes + FORM_OVERHEAD_BYTES
            return BodyAllowance(size, limits.upload_seconds, SHRINK_IMAGE)
        if path == BATCH_PATH:
            size = BATCH_UPLOADS * (settings.max_upload_bytes + FORM_OVERHEAD_BYTES)
            return BodyAllowance(size, limits.upload_seconds, "Send fewer or smaller images.")
        return BodyAllowance(SMALL_BODY_BYTES, limits.small_body_seconds)

    routes: list[Route | Mount] = []
    origins = settings.cors_origins
    app = FastAPI(
        title=API_TITLE,
        version=API_VERSION,
        description=API_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ObserveRequests has all three.
        middleware=[
            Middleware(ObserveRequests, metrics=parts.metrics, tracing=parts.tracing, routes=routes),
            Middleware(RequestEnvelope),
            Middleware(Deadline, seconds=limits.longest_seconds),
            Middleware(RefusalLog, refusals=parts.refusals, paths=(PREDICT_PATH, BATCH_PATH)),
            Middleware(Checks, checks=(clean_request, allowed_hosts(settings.allowed_hosts), same_site(origins))),
            *allowed_origins(origins),
            Middleware(Unexpected),
            Middleware(BodyLimit, allowance_for=allowance_for, small_bodies=parts.admission.small_bodies),
        ],
    )
    install_problem_handlers(app, is_admin=parts.guard.is_admin)
    app.state.parts, app.state.guard = parts, parts.guard
    app.state.bento = {"service_name": bento[0], "service_version": bento[1]}
    modules = (predict, batch, feedback, predictions, labels, models, health, metrics, page)
    # Not `include_router`, by which FastAPI would make each route anew for this app, and look for it twice a request.
    app.router.routes += [*(route for module in modules for route in module.router.routes), page.files]
    routes += [route for route in app.router.routes if isinstance(route, Route | Mount)]
    app.router.routes.append(Mount("", app=_beyond(routes, parts.guard)))

    def openapi() -> dict[str, Any]:
        document = FastAPI.openapi(app)
        document["paths"][BATCH_PATH]["post"]["requestBody"] = batch.form_of(limits.max_batch_files).request_body()
        return document

    app.openapi = openapi
    return app


def _beyond(routes: Sequence[Route | Mount], guard: Guard) -> ASGIApp:
    """Returns what takes every path and method that no route takes: BentoML's, or who says what there is instead."""

    async def beyond(scope: Scope, receive: Receive, send: Send) -> None:
        answer = bentomls(scope)
        if answer is not None:
            if scope["method"] not in SAFE_METHODS:  # An endpoint that somebody has added: BentoML knows no keys.
                guard.require_api_key(HTTPConnection(scope))
            await answer(scope, receive, send)
            return
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

    return beyond
