"""A request log of simulated rows, filled as fast as PostgreSQL takes them: binary COPY, then constraints and indexes.

What is there in the end is what the migrations and the drainer would have left, but for the log of write-ahead: rows
come in order of time, every tenth has an upload of its own, of a few bytes, and no picture was sent twice.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import psycopg2.errors
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, ForeignKeyConstraint, Table, text
from sqlalchemy.schema import AddConstraint, CreateIndex, DropConstraint, DropIndex

from cv_platform.database.binary_copy import CopyStream, real_arrays, row_encoder
from cv_platform.database.cluster import Cluster
from cv_platform.database.embedded import embedded_database
from cv_platform.database.schema import images, metadata, predictions
from cv_platform.files import require_free_space
from cv_platform.records import ModelIdentity

YEAR_ROWS = 100_000_000
END = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = ModelIdentity(model_name="log", version="20250101T000000Z-00000001")
SPARE_BYTES = 8_000_000_000
"""What stays free on the disk while rows are written, as others write, too."""
UPLOAD_EVERY = 10
Widths = tuple[int, int, int]
"""Lengths of `uae_feats`, `bbsd_feats` (one a class) and `features`; `properties` has 7 numbers in any log."""
_CHUNK_ROWS = 50_000
_MICROSECONDS_A_ROW = 365 * 86_400 * 1_000_000 / YEAR_ROWS
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_COLUMNS = tuple(column.name for column in predictions.columns if not column.name.startswith(("raw_", "hm_")))
_IMAGE_COLUMNS = tuple(column.name for column in images.columns)
_ARRAY_HEAD_BYTES, _ELEMENT_BYTES = 20, 8
_HEX = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
_LOADING = """
wal_level = minimal  # What a COPY has written is on the disk at its commit, without a second copy.
max_wal_senders = 0
"""
Bytes = NDArray[np.uint8]


@contextmanager
def loading_server(home: Path) -> Iterator[str]:
    """Yields the URL of an installation's PostgreSQL that writes no log of what is copied into empty tables.

    It stops when the block ends; the next start has the platform's own settings again.
    """
    cluster = Cluster(home)
    cluster.make_folder()
    cluster.prepare()
    settings = cluster.data / "postgresql.conf"
    own = settings.read_text()
    settings.write_text(own + _LOADING)
    try:
        with embedded_database(home) as url:
            yield url
    finally:
        settings.write_text(own)


def drop_from_memory(home: Path) -> None:
    """Has the system forget what it keeps in memory of an installation's data, so that they are read from the disk.

    Call it while the server does not run: what that has in its own memory it keeps.
    """
    for path in Cluster(home).data.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def moment_before(rows: int) -> datetime:
    """Returns the moment at which the last `rows` of a log begin; the last of them lies just before `END`."""
    return END - timedelta(microseconds=round(_MICROSECONDS_A_ROW * rows))


def fill(engine: Engine, rows: int, widths: Widths, folder: Path, say: Callable[[str], None]) -> None:
    """Fills the empty tables of a migrated database, on a server of `loading_server`.

    Args:
        engine: of the request log.
        rows: of `predictions`, a multiple of `UPLOAD_EVERY`.
        widths: of their vectors.
        folder: on the disk of the data, of which `SPARE_BYTES` stay free.
        say: gets a line at each step.

    Raises:
        DiskSpaceError: the disk fills up; nothing stays of the rows.
    """
    with engine.begin() as connection:
        for foreign in _foreign_keys():
            connection.execute(DropConstraint(foreign, isolate_from_table=False))
        for table in (predictions, images):
            for index in table.indexes:
                connection.execute(DropIndex(index))
            connection.execute(DropConstraint(table.primary_key, isolate_from_table=False))
            connection.execute(text(f"TRUNCATE {table.name}"))
        say(f"copying {rows:,} rows …")
        _copy(connection, images, _IMAGE_COLUMNS, _watched(_image_chunks(rows), folder))
        _copy(connection, predictions, _COLUMNS, _watched(_chunks(rows, widths), folder))
    say("making their indexes …")
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL maintenance_work_mem = '1GB'"))
        for table in (predictions, images):
            # The longest first: sorting takes as much of the disk as it fills, once it is done no more.
            for index in sorted(table.indexes, key=lambda index: -len(index.columns)):
                connection.execute(CreateIndex(index))
            connection.execute(AddConstraint(table.primary_key, isolate_from_table=False))
        connection.execute(text("ANALYZE predictions, images"))
        say("checking their foreign keys …")
        for foreign in _foreign_keys():
            connection.execute(AddConstraint(foreign, isolate_from_table=False))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def _foreign_keys() -> list[ForeignKeyConstraint]:
    return [
        foreign
        for table in metadata.sorted_tables
        for foreign in sorted(table.foreign_key_constraints, key=lambda foreign: str(foreign.name))
        if foreign.referred_table in (predictions, images)
    ]


def _copy(connection: Connection, table: Table, columns: Sequence[str], chunks: Iterable[bytes]) -> None:
    driver = connection.connection.driver_connection
    assert driver is not None
    # Frozen, as no vacuum is to come by: https://www.postgresql.org/docs/18/sql-copy.html
    statement = f"COPY {table.name} ({', '.join(columns)}) FROM STDIN WITH (FORMAT binary, FREEZE)"
    stream = CopyStream(chunks)
    with closing(driver.cursor()) as cursor:
        try:
            cursor.copy_expert(statement, stream)
        except psycopg2.errors.QueryCanceled as err:
            raise stream.error or err from None


def _watched(chunks: Iterable[bytes], folder: Path) -> Iterator[bytes]:
    for chunk in chunks:
        require_free_space(folder, len(chunk), purpose="simulated rows", spare_bytes=SPARE_BYTES)
        yield chunk


def _image_chunks(rows: int) -> Iterator[bytes]:
    """Yields the rows of `images`, encoded."""
    row = {"sha256": "0" * 64, "content": b"simulated", "bytes": 9, "media_type": "image/jpeg", "created_on": END}
    template = _Template(images, _IMAGE_COLUMNS, [row])
    for chunk, numbers in _numbers(rows):
        (at,) = template.places
        made = template.repeated(len(numbers))
        at["sha256"].put(made, _sha256s(chunk, len(numbers)))
        at["created_on"].put(made, _moments(rows, numbers[:, 0]))
        yield made.tobytes()


def _chunks(rows: int, widths: Widths) -> Iterator[bytes]:
    """Yields the rows of `predictions`, encoded: the one with an upload and the nine after it are made together."""
    sizes = dict(zip(("uae_feats", "bbsd_feats", "features"), widths, strict=True), properties=7)
    template = _Template(predictions, _COLUMNS, [_row(widths, sizes, at == 0) for at in range(UPLOAD_EVERY)])
    for chunk, numbers in _numbers(rows):
        made, random = template.repeated(len(numbers)), np.random.default_rng((1, chunk))
        for column, at in enumerate(template.places):
            at["prediction_id"].put(made, _random_bytes(random, len(numbers), 16))
            for name, size in sizes.items():
                values = random.random((len(numbers), size), dtype=np.float32).astype(">f4")
                at[name].put_elements(made, values.view(np.uint8).reshape(len(numbers), size, 4))
            for name in ("created_on", "logged_on"):
                at[name].put(made, _moments(rows, numbers[:, column]))
        template.places[0]["image_sha256"].put(made, _sha256s(chunk, len(numbers)))
        yield made.tobytes()


def _row(widths: Widths, sizes: dict[str, int], has_upload: bool) -> dict[str, Any]:
    floats = np.zeros(sum(sizes.values()), dtype="<f4").tobytes()
    probabilities = ", ".join(f'"{number}": 0.{number + 1:02}' for number in range(widths[1]))
    return {
        "prediction_id": UUID(int=0),
        "model_name": MODEL.model_name,
        "model_version": MODEL.version,
        "predicted_class": "0",
        "prediction_json": f"{{{probabilities}}}",
        **dict(zip(sizes, real_arrays(floats, sizes.values()), strict=True)),
        "image_sha256": "0" * 64 if has_upload else None,
        "created_on": END,
        "logged_on": END,
    }


def _numbers(rows: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields the chunks' numbers and `(N, UPLOAD_EVERY)`: those of their rows, the oldest of all first."""
    if rows % UPLOAD_EVERY:
        raise ValueError(f"Expected a multiple of {UPLOAD_EVERY} rows. Received: {rows}.")
    for chunk, start in enumerate(range(0, rows, _CHUNK_ROWS)):
        yield chunk, np.arange(start, min(rows, start + _CHUNK_ROWS)).reshape(-1, UPLOAD_EVERY)


def _moments(rows: int, numbers: NDArray[np.int64]) -> Bytes:
    """Returns `(N, 8)`: timestamps as PostgreSQL sends them, half a row after `moment_before`."""
    end = (END - _EPOCH) // timedelta(microseconds=1)
    microseconds = end - np.rint(_MICROSECONDS_A_ROW * (rows - numbers - 0.5)).astype(np.int64)
    return microseconds.astype(">i8").view(np.uint8).reshape(-1, 8)


def _sha256s(chunk: int, count: int) -> Bytes:
    """Returns `(N, 64)`: hex digits, the same for both tables."""
    content = _random_bytes(np.random.default_rng((0, chunk)), count, 32)
    return _HEX[np.stack([content >> 4, content & 15], axis=-1)].reshape(count, 64)


def _random_bytes(random: np.random.Generator, count: int, size: int) -> Bytes:
    return np.frombuffer(random.bytes(count * size), dtype=np.uint8).reshape(count, size)


class _Place:
    """Where a field's content lies in the bytes of a template."""

    def __init__(self, start: int, size: int) -> None:
        self._start, self._size = start, size

    def put(self, made: Bytes, content: Bytes) -> None:
        made[:, self._start : self._start + self._size] = content

    def put_elements(self, made: Bytes, content: Bytes) -> None:
        """Writes `(N, d, 4)` between the lengths of an array's elements."""
        elements = made[:, self._start + _ARRAY_HEAD_BYTES : self._start + self._size]
        elements.reshape(len(made), -1, _ELEMENT_BYTES)[:, :, -4:] = content  # A view: an axis is split.


class _Template:
    """Rows as the product's own encoder makes them, to be repeated with other content of the same sizes.

    Attributes:
        places: of each row, by column; null has none.
    """

    def __init__(self, table: Table, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        content = b"".join(map(row_encoder(table, columns), rows))
        self._bytes = np.frombuffer(content, dtype=np.uint8)
        self.places: list[dict[str, _Place]] = []
        at = 0
        for _ in rows:
            at += 2  # How many fields there are.
            places: dict[str, _Place] = {}
            for column in columns:
                (size,) = struct.unpack_from(">i", content, at)
                at += 4
                if size >= 0:
                    places[column] = _Place(at, size)
                    at += size
            self.places.append(places)

    def repeated(self, count: int) -> Bytes:
        """Returns `(count, bytes)`."""
        return np.tile(self._bytes, (count, 1))
