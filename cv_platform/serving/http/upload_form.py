"""Receives images: multipart forms, with what is said about any other fields, and bodies that are an image themselves.

No more than 1 MB of a file is kept in memory, the rest in a temporary file; `BodyLimit` bounds the whole of one body,
`RequestMemory` all of them together.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import Any, TypeGuard

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from cv_platform.images import SUPPORTED_FORMATS
from cv_platform.images.files import format_by_signature
from cv_platform.serving.capacity.admission import Admission
from cv_platform.serving.capacity.limits import overloaded, too_large
from cv_platform.serving.model.explain import Explain
from cv_platform.serving.problem import Problem, client_gone, try_later
from cv_platform.serving.telemetry.log_format import BLOT
from cv_platform.serving.telemetry.observation import staged

logger = logging.getLogger(__name__)

EXPLAIN_FIELD = "explain"
EXPLAIN_QUERY = "jpeg (default), png, cam (a small matrix) or none"
_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 4096
_SIGNATURE_BYTES = 16
"""As many as tell the format of an image."""


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
        content = {"multipart/form-data": {"schema": schema}}
        return {"required": True, "content": content if is_list else {**content, "image/*": {"schema": file}}}


@asynccontextmanager
async def received(
    admission: Admission, request: Request, form: UploadForm, explain: str | None, *, places: int = 1
) -> AsyncGenerator[tuple[list[UploadFile], Explain]]:
    """Receives a body, and yields its files and what to add to the probabilities; then drops the files.

    Args:
        admission: whose `uploads` are counted while the body arrives, and whose memory it takes until its files go.
        request: its body is read here and nowhere else.
        form: what it should be.
        explain: the query's wish.
        places: how many places of `uploads` it takes.

    Raises:
        Problem: 408, 413, 422, 429, 499 or 503, saying what was received.
    """
    # `BodyLimit` has seen that it is a number. Python converts no thousands of digits, be they zeros in front.
    declared_bytes = int(request.headers.get("content-length", "").strip().lstrip("0") or 0)
    with admission.memory.upload(declared_bytes) as cover:
        if not admission.uploads.enter(places):
            raise overloaded("uploads", admission.uploads.limit)
        try:
            with staged("receive"):
                data = await _parse(request, form, cover)
        finally:
            admission.uploads.leave(places)
        try:
            items = data.multi_items()
            wished = _explain([value for name, value in items if name == EXPLAIN_FIELD], explain)
            files = [value for name, value in items if name == form.field]
            uploads = [value for value in files if _is_file(value)]
            if not 1 <= len(files) == len(uploads) <= form.max_files:
                raise Problem(422, f"Expected {form.expected}. Received: {_received(items)}.", expected=form.expected)
            yield uploads, wished
        finally:
            await data.close()


def read_upload(upload: UploadFile, max_bytes: int) -> bytes:
    """Returns an upload's bytes; it blocks.

    Raises:
        Problem: 413, there are more than `max_bytes`.
    """
    if (upload.size or 0) > max_bytes:
        raise too_large(max_bytes, f"{upload.size} bytes")
    # The plain file: where this runs there is no event loop.
    upload.file.seek(0)
    return upload.file.read()


async def _parse(request: Request, form: UploadForm, cover: Callable[[int], None]) -> FormData:
    expected = form.expected
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    is_image = media_type.startswith("image/") and form.max_files == 1
    if not is_image and media_type != "multipart/form-data":
        raise Problem(422, f"Expected {expected}. Received: content type {content_type[:100]!r}.", expected=expected)
    stream = _covered(request.stream(), cover)
    try:
        if is_image:
            return FormData([(form.field, await _file_of(stream))])
        return await _ImageParser(request.headers, stream, form=form).parse()
    except ClientDisconnect as err:
        raise client_gone() from err
    except OSError as err:
        logger.error("Uploads cannot be kept in the folder for temporary files: %s", err)
        raise try_later(
            503,
            "The folder for uploads takes no more. Send it again.",
            expected="room for uploads: free the disk of the folder for temporary files (TMPDIR)",
        ) from err
    # The parser trusts the boundary's encoding and the part headers' form; a hostile body breaks it in ways of its own.
    except (MultiPartException, UnicodeError, ValueError, LookupError, AssertionError) as err:
        text = getattr(err, "message", "") or type(err).__name__
        raise Problem(422, f"Expected {expected}. Received: a body that is none ({text}).", expected=expected) from err


async def _covered(stream: AsyncGenerator[bytes, None], cover: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
    """Hands a body on, and takes its memory."""
    length = 0
    async for chunk in stream:
        length += len(chunk)
        cover(length)
        yield chunk


async def _file_of(stream: AsyncGenerator[bytes, None]) -> UploadFile:
    with ExitStack() as until_whole:
        file: Any = until_whole.enter_context(SpooledTemporaryFile(MultiPartParser.spool_max_size))
        upload = UploadFile(file, size=0, filename="image")
        async for chunk in stream:
            await upload.write(chunk)
        until_whole.pop_all()
        return upload


class _ImageParser(MultiPartParser):
    """Takes each part of the form's image field for a file: many programs send one without a file name.

    Starlette takes these for text, of which it keeps little.
    """

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], *, form: UploadForm) -> None:
        super().__init__(
            headers,
            stream,
            # Some more than are taken, so that a few too many are named instead of called a broken body.
            max_files=form.max_files + 3,
            max_fields=_MAX_FIELDS,
            max_part_size=_MAX_FIELD_BYTES,
        )
        self._field = form.field.encode()

    def on_headers_finished(self) -> None:
        """Names the file, as an empty name is one."""
        part = self._current_part
        disposition = part.content_disposition or b""
        if b"filename=" not in disposition:  # Else it is parsed once, by Starlette.
            _, options = parse_options_header(disposition)
            if options.get(b"name") == self._field:
                part.content_disposition = disposition + b'; filename=""'
        super().on_headers_finished()


def _is_file(value: UploadFile | str) -> TypeGuard[UploadFile]:
    """Says whether a part is a file, and not a text in the image field: its path, say, where an @ was forgotten."""
    if not isinstance(value, UploadFile):
        return False
    if value.filename or not value.size:
        return True
    value.file.seek(0)
    return format_by_signature(value.file.read(_SIGNATURE_BYTES)) is not None


def _received(items: Sequence[tuple[str, Any]]) -> str:
    if not items:
        return "no field"
    kinds = (f"{name[:40]!a} ({'a file' if _is_file(value) else 'text'})" for name, value in items[:8])
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return "the fields " + ", ".join(kinds) + more


def _explain(fields: Sequence[Any], query: str | None) -> Explain:
    """The form's field wins over the query: it is the more deliberate of the two."""
    value = fields[-1] if fields else query
    if value is None:
        return Explain.JPEG
    try:
        # BentoML's clients send every field that is no file as JSON: a text comes in its quotes.
        is_quoted = isinstance(value, str) and len(value) > 1 and value[0] == value[-1] == '"'
        return Explain(value[1:-1] if is_quoted else value)
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
