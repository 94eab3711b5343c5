"""Bytes of binary COPY, worked by hand from PostgreSQL's documentation of the format."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID

import numpy as np
import pytest

from cv_platform.database.binary_copy import CopyStream, real_arrays, row_encoder
from cv_platform.database.schema import api_log, images, predictions


def test_a_stream_is_signature_rows_and_trailer() -> None:
    row = row_encoder(images, ["sha256", "bytes"])({"sha256": "é", "bytes": 258})
    fields = b"\x00\x02" + b"\x00\x00\x00\x02\xc3\xa9" + b"\x00\x00\x00\x04\x00\x00\x01\x02"
    assert row == fields
    assert CopyStream([row]).read() == b"PGCOPY\n\xff\r\n\x00" + bytes(8) + fields + b"\xff\xff"


def test_rows_are_made_as_they_are_read_and_an_error_is_kept() -> None:
    made: list[int] = []

    def rows() -> Iterator[bytes]:
        for number in range(3):
            made.append(number)
            yield b"x" * 10
        raise ValueError("damaged")

    stream = CopyStream(rows())
    assert stream.read(25)[19:] == b"x" * 10
    assert made == [0]
    with pytest.raises(ValueError, match="damaged"):
        stream.read()
    assert isinstance(stream.error, ValueError)


def test_what_is_missing_or_none_is_null() -> None:
    encode = row_encoder(api_log, ["model_version", "client_error"])
    assert encode({"model_version": None}) == b"\x00\x02" + b"\xff\xff\xff\xff" * 2


def test_times_are_microseconds_since_2000_in_utc() -> None:
    encode = row_encoder(api_log, ["created_on"])
    in_india = datetime(2000, 1, 1, 5, 30, 0, 7, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    assert encode({"created_on": in_india}) == b"\x00\x01\x00\x00\x00\x08" + struct.pack(">q", 7)
    before = datetime(1999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    assert encode({"created_on": before})[6:] == struct.pack(">q", -1)


def test_arrays_json_and_identifiers() -> None:
    encode = row_encoder(predictions, ["prediction_id", "prediction_json", "uae_feats", "features"])
    identifier = UUID(int=1)
    numbers = np.array([1.0, -2.0], dtype="<f4").tobytes()
    row = encode(
        {
            "prediction_id": identifier,
            "prediction_json": "{}",
            **dict(zip(["uae_feats", "features"], real_arrays(numbers, [2, 0]), strict=True)),
        }
    )
    array = struct.pack(">iiIii", 1, 0, 700, 2, 1) + struct.pack(">if", 4, 1.0) + struct.pack(">if", 4, -2.0)
    assert row == (
        b"\x00\x04"
        + struct.pack(">i", 16)
        + identifier.bytes
        + struct.pack(">i", 3)
        + b"\x01{}"
        + struct.pack(">i", len(array))
        + array
        + struct.pack(">i", 12)
        + struct.pack(">iiI", 0, 0, 700)
    )


def test_a_number_that_the_column_cannot_hold_is_refused() -> None:
    with pytest.raises(struct.error):
        row_encoder(api_log, ["response_status_code"])({"response_status_code": 2**31})
