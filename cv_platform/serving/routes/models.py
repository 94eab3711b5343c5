"""Which model is in production: look, change (admin), go back (admin)."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from cv_platform.audit import BY_API, Note
from cv_platform.client.answers import CurrentModels, MovedPointer
from cv_platform.errors import BundleNotFoundError
from cv_platform.serving.http.problems import json_response
from cv_platform.serving.http.security import ADMIN
from cv_platform.serving.problem import Problem
from cv_platform.serving.routes.examples import CURRENT_EXAMPLE, POINTER_EXAMPLE, VERSION, responses
from cv_platform.serving.routes.parts import Parts, WorkerParts
from cv_platform.storage import VERSION_PATTERN, ProductionPointer

_METADATA_FILE = re.compile(r"([a-z][a-z0-9_]{0,62})\.yaml")
_VERSION = re.compile(VERSION_PATTERN)
_API = Note(BY_API)


router = APIRouter(tags=["models"])


@router.get(
    "/models/current",
    summary="What is in production, and what each worker runs",
    responses=responses(CurrentModels, CURRENT_EXAMPLE, 429, 503, description="pointer and heartbeats"),
)
async def current(parts: Parts, request: Request) -> Response:
    """The production pointer, and the heartbeat of each worker."""
    service = parts.settings.service_name
    is_admin = parts.guard.is_admin(request)
    pointer, watched = await parts.calls.storage_reads.run(
        lambda: (parts.storage.read_pointer(service), parts.workers.look())
    )
    here = parts.models.status().get("worker_id")
    wanted = (pointer.model_name, pointer.version) if pointer else None
    workers = [
        {
            **(beat := worker.beat).model_dump(mode="json", exclude={"public_id"}),
            "worker_id": beat.worker_id if is_admin else beat.public_id,
            "last_swap_error": beat.last_swap_error if is_admin or not beat.last_swap_error else "model refused",
            "is_live": worker.state == "live" or beat.worker_id == here,
            "is_current": (beat.model_name, beat.version) == wanted,
        }
        for worker in watched
    ]
    return json_response({"service": service, "production": _public(pointer) if pointer else None, "workers": workers})


@router.put(
    # `path`, so that something with slashes is told what is wrong with it instead of falling through to a 404.
    "/update_model/{metadata_file:path}",
    summary="Put a published model into production",
    description=(
        "Takes a model's name with the ending `.yaml` (never a path), and a version: by default the newest. "
        "The model is fetched, verified and load-tested first; only then does the production pointer move."
    ),
    dependencies=[ADMIN],
    responses=responses(
        MovedPointer,
        POINTER_EXAMPLE,
        401,
        403,
        404,
        408,
        409,
        413,
        422,
        429,
        503,
        504,
        description="the new pointer",
    ),
)
async def update_model(
    parts: Parts,
    metadata_file: Annotated[str, Path(description="<model_name>.yaml", examples=["digits_classifier.yaml"])],
    version: Annotated[str | None, Query(description=f"such as {VERSION}; by default the newest")] = None,
) -> Response:
    """Promotes a version."""
    name = _METADATA_FILE.fullmatch(metadata_file)
    if name is None:
        raise Problem(
            422,
            f"Expected a model's metadata file, by its name alone. Received: {ascii(metadata_file)[:120]}.",
            expected="<model_name>.yaml, such as digits_classifier.yaml: a name, never a path",
        )
    if version is not None and _VERSION.fullmatch(version) is None:
        raise Problem(
            422,
            f"version: expected one such as {VERSION}. Received: {ascii(version)[:80]}.",
            expected="a published version",
        )
    move = await parts.calls.promotions.run(lambda: parts.promoter.promote(name[1], version, note=_API))
    return _moved(parts, move.pointer)


@router.post(
    "/rollback",
    summary="Put the previous model back into production",
    description="Load-tests what was served before, then moves the pointer back. Twice returns to the start.",
    dependencies=[ADMIN],
    responses=responses(
        MovedPointer, POINTER_EXAMPLE, 401, 403, 404, 408, 409, 413, 429, 503, 504, description="the new pointer"
    ),
)
async def rollback(parts: Parts) -> Response:
    """Goes back."""
    try:
        move = await parts.calls.promotions.run(lambda: parts.promoter.roll_back(_API))
    except BundleNotFoundError as err:
        raise Problem(
            404,
            f"Production stays as it is. {err} Promote a version by its name instead.",
            expected="an earlier version that is still published",
        ) from err
    return _moved(parts, move.pointer)


def _public(pointer: ProductionPointer) -> dict[str, object]:
    """Returns the pointer without its history, which names people."""
    return pointer.model_dump(mode="json", exclude={"history": True, "probation": {"by"}})


def _moved(parts: WorkerParts, pointer: ProductionPointer) -> Response:
    return json_response(
        {
            "service": parts.settings.service_name,
            "production": _public(pointer),
            "message": POINTER_EXAMPLE["message"],
        }
    )
