"""Rows in the format of `COPY … WITH (FORMAT binary)`, for the few types that the request log has.

Binary, because real arrays then go over as they are (no decimal text, no rounding) and no text needs escaping. Ours,
because psycopg 2 has no such rows; psycopg 3 has, and needs 3.4 to 3.8 times the CPU time for those of the request log
(3.3.9 with its C part: 60 to 66 µs for a prediction and its `api_log` row, ours 17 to 18, five rounds in turns, before
arrays of many rows were made together), as its arrays are lists of Python's numbers. It would be a second driver in the
Bento, too: Dagster's storage needs psycopg 2.
https://www.postgresql.org/docs/17/sql-copy.html, "Binary Format"; each type's format is that of its `*send` function.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from io import BufferedIOBase
from itertools import chain
from typing import Any

import numpy as np
from sqlalchemy import Table
from sqlalchemy.dialects import postgresql

HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER = struct.pack(">h", -1)
_NULL = struct.pack(">i", -1)
_REAL_OID = 700
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_length, _int4, _int8, _float8 = (struct.Struct(code).pack for code in (">i", ">ii", ">iq", ">id"))
_array_header = struct.Struct(">iiiIii").pack
_ELEMENT = np.dtype([("bytes", ">i4"), ("value", ">f4")])
_EMPTY_ARRAY = struct.pack(">iiiI", 12, 0, 0, _REAL_OID)

Encoder = Callable[[Any], bytes]
"""From a value to its field: length and content."""


def _bytes(value: bytes) -> bytes:
    return _length(len(value)) + value


def _text(value: str) -> bytes:
    return _bytes(value.encode())


def _jsonb(value: str) -> bytes:
    return _bytes(b"\x01" + value.encode())  # 1 is the version of the format.


def _timestamptz(value: datetime) -> bytes:
    return _int8(8, (value - _EPOCH) // _MICROSECOND)


def real_arrays(numbers: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Yields the fields of real[] columns, of many rows at once: a call of NumPy costs as much as a hundred numbers.

    Args:
        numbers: little-endian float32, of one array after the other.
        sizes: how many numbers each array has.
    """
    values = np.frombuffer(numbers, dtype="<f4")
    elements = np.empty(values.size, dtype=_ELEMENT)
    elements["bytes"] = 4
    elements["value"] = values
    content, start = elements.tobytes(), 0
    for size in sizes:
        end = start + _ELEMENT.itemsize * size
        if size:
            yield _array_header(20 + end - start, 1, 0, _REAL_OID, size, 1) + content[start:end]
        else:
            yield _EMPTY_ARRAY
        start = end


_ENCODERS: dict[str, Encoder] = {
    "TEXT": _text,
    "UUID": lambda value: _bytes(value.bytes),
    "JSONB": _jsonb,
    "TIMESTAMP": _timestamptz,
    "REAL[]": bytes,
    "INTEGER": lambda value: _int4(4, value),
    "DOUBLE PRECISION": lambda value: _float8(8, value),
    "BYTEA": _bytes,
}


def written_columns(table: Table) -> tuple[str, ...]:
    """Returns the columns that a writer gives; the others are the database's to fill: `id`, and when a row came."""
    return tuple(column.name for column in table.columns if column.name not in {"id", "logged_on"})


def row_encoder(table: Table, columns: Sequence[str]) -> Callable[[Mapping[str, Any]], bytes]:
    """Returns a function from a row (by column name; missing is null) to its bytes, for a `CopyStream`.

    Values: `str` for text and jsonb, `UUID`, aware `datetime`, `bytes`, fields of `real_arrays`, and plain numbers.
    """
    dialect = postgresql.dialect()
    names = [str(table.c[column].type.compile(dialect)).split(" WITH")[0] for column in columns]
    encoders = [(column, _ENCODERS[name]) for column, name in zip(columns, names, strict=True)]
    count = struct.pack(">h", len(columns))

    def encode_row(row: Mapping[str, Any]) -> bytes:
        get = row.get
        fields = [_NULL if (value := get(column)) is None else encode(value) for column, encode in encoders]
        return count + b"".join(fields)

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
