"""Receives the multipart forms that carry images: which fields there are, and what is said about any others.

The parser keeps no more than 1 MB of a file in memory, the rest in a temporary file; `BodyLimit` bounds the whole.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from cv_platform.images import SUPPORTED_FORMATS
from cv_platform.serving.context import ServingContext
from cv_platform.serving.explain import Explain
from cv_platform.serving.limits import overloaded
from cv_platform.serving.log_format import BLOT
from cv_platform.serving.observation import staged
from cv_platform.serving.problems import Problem, client_gone

EXPLAIN_FIELD = "explain"
EXPLAIN_QUERY = "jpeg (default), png, cam (a small matrix) or none"
_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 4096


@dataclass(frozen=True)
class UploadForm:
    """A form that takes images.

    Attributes:
        field: name of the field that holds them.
        max_files: how many it may hold, at least one.
        expected: what the form is, in words.
    """

    field: str
    max_files: int
    expected: str

    def request_body(self) -> dict[str, Any]:
        """Returns OpenAPI's description of the form."""
        file = {
            "type": "string",
            "contentMediaType": "application/octet-stream",
            "description": f"One image: {', '.join(SUPPORTED_FORMATS)}.",
        }
        is_list = self.max_files > 1
        files = {"type": "array", "items": file, "minItems": 1, "maxItems": self.max_files}
        explain = {"type": "string", "enum": [e.value for e in Explain], "description": "As in the query; it wins."}
        schema = {
            "type": "object",
            "required": [self.field],
            "properties": {self.field: files if is_list else file, EXPLAIN_FIELD: explain},
        }
        return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


@asynccontextmanager
async def received(
    context: ServingContext, request: Request, form: UploadForm, explain: str | None, *, places: int = 1
) -> AsyncGenerator[tuple[list[UploadFile], Explain]]:
    """Receives a form, and yields its files and what to add to the probabilities; then drops the files.

    Args:
        context: whose `uploads` are counted while the body arrives.
        request: its body is read here and nowhere else.
        form: what it should be.
        explain: the query's wish.
        places: how many places of `uploads` it takes.

    Raises:
        Problem: 400, 408, 413, 422 or 429, saying what was received.
    """
    if not context.uploads.enter(places):
        raise overloaded("uploads", context.uploads.limit)
    try:
        with staged("receive"):
            data = await _parse(request, form)
    finally:
        context.uploads.leave(places)
    try:
        items = data.multi_items()
        wished = _explain([value for name, value in items if name == EXPLAIN_FIELD], explain)
        files = [value for name, value in items if name == form.field]
        uploads = [value for value in files if isinstance(value, UploadFile)]
        if not 1 <= len(files) == len(uploads) <= form.max_files:
            raise Problem(422, f"Expected {form.expected}. Received: {_received(items)}.", expected=form.expected)
        yield uploads, wished
    finally:
        await data.close()


async def _parse(request: Request, form: UploadForm) -> Any:
    expected = form.expected
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "multipart/form-data":
        raise Problem(422, f"Expected {expected}. Received: content type {content_type[:100]!r}.", expected=expected)
    parser = MultiPartParser(
        request.headers,
        request.stream(),
        # Some more than are taken, so that a few too many are named instead of called a broken body.
        max_files=form.max_files + 3,
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        return await parser.parse()
    except ClientDisconnect as err:
        raise client_gone() from err
    # The parser trusts the boundary's encoding and the part headers' form; a hostile body breaks it in ways of its own.
    except (MultiPartException, UnicodeError, ValueError, LookupError, AssertionError) as err:
        text = getattr(err, "message", "") or type(err).__name__
        raise Problem(422, f"Expected {expected}. Received: a body that is none ({text}).", expected=expected) from err


def _received(items: Sequence[tuple[str, Any]]) -> str:
    if not items:
        return "no field"
    kinds = (f"{name[:40]!a} ({'a file' if isinstance(value, UploadFile) else 'text'})" for name, value in items[:8])
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return "the fields " + ", ".join(kinds) + more


def _explain(fields: Sequence[Any], query: str | None) -> Explain:
    """The form's field wins over the query: it is the more deliberate of the two."""
    value = fields[-1] if fields else query
    if value is None:
        return Explain.JPEG
    try:
        return Explain(value)
    except ValueError as err:
        known = ", ".join(e.value for e in Explain)
        received_value = ascii(value)[:60] if isinstance(value, str) else "a file"
        expected = f"explain: expected {known}. Received: "
        raise Problem(
            422,
            f"{expected}{received_value}.",
            expected=f"explain={known}",
            logged=f"{expected}{BLOT}.",  # It may be a secret in the wrong place.
        ) from err
