"""Rows in the format of `COPY … WITH (FORMAT binary)`, for the few types that the request log has.

Binary, because real arrays then go over as they are (no decimal text, no rounding) and no text needs escaping. Ours,
because psycopg 2 has no such rows; psycopg 3 has, and needs 3.4 to 3.8 times the CPU time for those of the request log
(3.3.9 with its C part: 60 to 66 µs for a prediction and its `api_log` row, ours 17 to 18, five rounds in turns), as its
arrays are lists of Python's numbers. It would be a second driver in the Bento, too: Dagster's storage needs psycopg 2.
https://www.postgresql.org/docs/17/sql-copy.html, "Binary Format"; each type's format is that of its `*send` function.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from io import BufferedIOBase
from itertools import chain
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql

HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER = struct.pack(">h", -1)
_NULL = struct.pack(">i", -1)
_REAL_OID = 700
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_length, _int4, _int8, _float8 = (struct.Struct(code).pack for code in (">i", ">i", ">q", ">d"))
_array_header = struct.Struct(">iiIii").pack
_ELEMENT = np.dtype([("bytes", ">i4"), ("value", ">f4")])
_EMPTY_ARRAY = struct.pack(">iiI", 0, 0, _REAL_OID)

Encoder = Callable[[Any], bytes]


def _text(value: str) -> bytes:
    return value.encode()


def _uuid(value: UUID) -> bytes:
    return value.bytes


def _jsonb(value: str) -> bytes:
    return b"\x01" + value.encode()  # 1 is the version of the format.


def _timestamptz(value: datetime) -> bytes:
    return _int8((value - _EPOCH) // _MICROSECOND)


def _real_array(value: np.ndarray) -> bytes:
    if value.size == 0:
        return _EMPTY_ARRAY
    elements = np.empty(value.size, dtype=_ELEMENT)
    elements["bytes"] = 4
    elements["value"] = value
    return _array_header(1, 0, _REAL_OID, value.size, 1) + elements.tobytes()


_ENCODERS: dict[str, Encoder] = {
    "TEXT": _text,
    "UUID": _uuid,
    "JSONB": _jsonb,
    "TIMESTAMP": _timestamptz,
    "REAL[]": _real_array,
    "INTEGER": _int4,
    "DOUBLE PRECISION": _float8,
    "BYTEA": bytes,
}


def written_columns(table: Table) -> tuple[str, ...]:
    """Returns the columns that a writer gives; the others are the database's to fill: `id`, and when a row came."""
    return tuple(column.name for column in table.columns if column.name not in {"id", "logged_on"})


def row_encoder(table: Table, columns: Sequence[str]) -> Callable[[Mapping[str, Any]], bytes]:
    """Returns a function from a row (by column name; missing is null) to its bytes, for a `CopyStream`.

    Values: `str` for text and jsonb, `UUID`, aware `datetime`, `bytes`, `(n,)` arrays for real[], and plain numbers.
    """
    dialect = postgresql.dialect()
    names = [str(table.c[column].type.compile(dialect)).split(" WITH")[0] for column in columns]
    encoders = [(column, _ENCODERS[name]) for column, name in zip(columns, names, strict=True)]
    count = struct.pack(">h", len(columns))

    def encode_row(row: Mapping[str, Any]) -> bytes:
        parts = [count]
        for column, encode in encoders:
            value = row.get(column)
            if value is None:
                parts.append(_NULL)
            else:
                data = encode(value)
                parts.append(_length(len(data)))
                parts.append(data)
        return b"".join(parts)

    return encode_row


class CopyStream(BufferedIOBase):
    """Encoded rows as the file that `COPY … FROM STDIN WITH (FORMAT binary)` reads.

    Rows are made as they are read, while the server works on those before.

    Attributes:
        error: what stopped the rows, of which psycopg 2 raises the text only, as `QueryCanceled`.
    """

    def __init__(self, rows: Iterable[bytes]) -> None:
        self._parts = chain([HEADER], rows, [_TRAILER])
        self.error: Exception | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """Returns the next whole rows, of at least `size` bytes together (-1: all); nothing after the last one."""
        taken, length = list[bytes](), 0
        least = math.inf if size is None or size < 0 else size
        try:
            while length < least and (part := next(self._parts, None)) is not None:
                taken.append(part)
                length += len(part)
        except Exception as err:
            self.error = err
            raise
        return b"".join(taken)
