"""Writes spooled entries to the tables of the request log, and reads a prediction back.

A batch goes over by `COPY`, its rows made while the server writes: those before, or the batch before. Where the tables
have some of its rows already, as after a crash, it goes by way of a temporary table and `INSERT … ON CONFLICT DO
NOTHING`, so that writing it twice is writing it once. The order is that of the foreign keys: images, predictions,
api_log.

Feedback has none, as its prediction may come later, from another replica's spool. What comes too late for a deletion is
dropped: of a prediction that was deleted, only the row of its request is written, and nothing that was said of it.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain, islice
from typing import Any, NamedTuple
from uuid import UUID

import psycopg2.errors
import psycopg2.extensions
from sqlalchemy import Engine, Table, select

from cv_platform.database.binary_copy import CopyStream, real_arrays, row_encoder, written_columns
from cv_platform.database.migrate import require_revision
from cv_platform.database.schema import api_log, deletions, feedback, images, predictions
from cv_platform.serving.log.deletion import DELETION_LOCK
from cv_platform.serving.log.entry import FeedbackEntry, StoredPrediction, read_record, stored_prediction, take_sizes
from cv_platform.serving.log.spool import SpoolRow

logger = logging.getLogger(__name__)

Cursor = psycopg2.extensions.cursor
DAMAGED_RECORD = (ValueError, KeyError, TypeError, AttributeError, struct.error)
"""What a spooled record raises that `entry.encode` has not written."""
ReadImage = Callable[[str], tuple[bytes, str, str] | None]


_CHUNK_BYTES = 64 * 1024
"""Of rows that are made while the server writes those before."""
_MADE_CHUNK_BYTES = 4 * 1024 * 1024
"""Of rows that are there: for each chunk Python's lock is waited for, beside who makes the next batch's."""
_CHUNK_ROWS = 64
"""Whose arrays are turned round together."""


class _Load(NamedTuple):
    """How one table is filled."""

    table: Table
    columns: tuple[str, ...]
    key: str
    encode: Callable[[Mapping[str, Any]], bytes]


class RequestRows(NamedTuple):
    """Requests of a batch as `COPY` takes them, none of whose predictions was deleted."""

    predictions: list[bytes]
    api_log: list[bytes]


def _load(table: Table, key: str) -> _Load:
    columns = written_columns(table)
    return _Load(table, columns, key, row_encoder(table, columns))


_IMAGES = _load(images, "sha256")
_PREDICTIONS = _load(predictions, "prediction_id")
_API_LOG = _load(api_log, "entry_id")
_FEEDBACK = _load(feedback, "entry_id")


def check_revision(cursor: Cursor) -> None:
    """Returns if the database has the tables of this version; a migration may come at any time.

    Raises:
        SchemaMismatchError: it has another revision.
        psycopg2.Error: the database refuses or is gone.
    """
    cursor.execute("SELECT to_regclass('alembic_version')")
    if _first_value(cursor) is None:
        require_revision(None)
    cursor.execute("SELECT version_num FROM alembic_version")
    require_revision(_first_value(cursor))


def make_requests(rows: Sequence[SpoolRow]) -> RequestRows | None:
    """Returns the requests among entries ready to be written; None if a record is damaged, which their writing names.

    Made before they are written, while the server is at work on others.
    """
    made = RequestRows([], [])
    try:
        made.predictions.extend(_encoded([row for row in rows if row.kind != "feedback"], (), made.api_log))
    except DAMAGED_RECORD:
        return None
    return made


def write_entries(
    cursor: Cursor, rows: Sequence[SpoolRow], read_image: ReadImage, made: RequestRows | None = None
) -> None:
    """Writes entries, in the caller's transaction, which has to be rolled back after any error.

    Args:
        cursor: of that transaction.
        rows: the entries.
        read_image: returns an upload with its media type and time.
        made: what `make_requests` has returned for the same entries.

    Raises:
        SchemaMismatchError: the database has another revision than this version.
        ValueError, KeyError, TypeError, AttributeError, struct.error: a spooled record is damaged.
        psycopg2.Error: the database refuses or is gone.
    """
    check_revision(cursor)
    # Before any row is locked: a deletion that has this lock may wait for those.
    cursor.execute("SELECT pg_advisory_xact_lock_shared(%s)", (DELETION_LOCK,))
    deleted = _present(cursor, deletions, {row.prediction_id for row in rows if row.prediction_id is not None})
    if deleted:
        logger.info("What is left of %d deleted predictions is dropped.", len(deleted))
    requests = [row for row in rows if row.kind != "feedback"]
    answered = [row for row in requests if row.prediction_id is not None and row.prediction_id not in deleted]
    statements = [row for row in rows if row.kind == "feedback" and row.prediction_id not in deleted]
    _write_images(cursor, {row.image_sha256 for row in answered if row.image_sha256 is not None}, read_image)
    if requests:
        of_requests: list[bytes] = []
        if made is not None and not deleted:
            of_requests = made.api_log
            _copy(cursor, _PREDICTIONS, lambda: made.predictions, _MADE_CHUNK_BYTES)
        else:
            _copy(cursor, _PREDICTIONS, lambda: _encoded(requests, deleted, of_requests))
        _copy(cursor, _API_LOG, lambda: of_requests, _MADE_CHUNK_BYTES)
    if statements:
        _copy(cursor, _FEEDBACK, lambda: map(_FEEDBACK.encode, decoded_rows(statements, deleted)))


def _encoded(requests: Sequence[SpoolRow], deleted: Collection[str], of_requests: list[bytes]) -> Iterator[bytes]:
    """Yields rows of `predictions`, and fills `of_requests` with those of `api_log`.

    Bytes, of both tables at once: columns by name that wait for the second table would be visited by Python's
    collector of garbage, value by value, again and again.
    """
    of_requests.clear()
    for values in decoded_rows(requests, deleted):
        of_requests.append(_API_LOG.encode(values))
        if values["prediction_id"] is not None:
            yield _PREDICTIONS.encode(values)


def decoded_rows(rows: Iterable[SpoolRow], deleted: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yields the entries' columns, arrays as `real_arrays` makes them; of `deleted` predictions their request's only.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: a record is damaged.
    """
    left = iter(rows)
    while chunk := list(islice(left, _CHUNK_ROWS)):
        read = [read_record(row.record) for row in chunk]
        sizes = [take_sizes(values, row.vectors) for values, row in zip(read, chunk, strict=True)]
        arrays = real_arrays(b"".join(row.vectors for row in chunk), chain.from_iterable(one.values() for one in sizes))
        for row, values, names in zip(chunk, read, sizes, strict=True):
            values.update(zip(names, arrays, strict=False))
            if row.prediction_id in deleted:
                values["prediction_id"] = None
            yield values


def find_prediction(engine: Engine, prediction_id: UUID) -> StoredPrediction | None:
    """Returns a prediction with its upload, by id; None when the database does not have it.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
        SchemaMismatchError: migrate first.
    """
    query = (
        select(predictions, images.c.content, images.c.media_type)
        .join(images, isouter=True)
        .where(predictions.c.prediction_id == prediction_id)
    )
    with engine.connect() as connection:
        row = connection.execute(query).mappings().first()
    return None if row is None else stored_prediction(row, image=row["content"], media_type=row["media_type"])


def find_statements(engine: Engine, prediction_id: UUID) -> list[FeedbackEntry]:
    """Returns what was said of a prediction, the oldest first.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
        SchemaMismatchError: migrate first.
    """
    columns = (feedback.c[name] for name in ("entry_id", "prediction_id", "true_class", "source", "created_on"))
    query = select(*columns).where(feedback.c.prediction_id == prediction_id).order_by(feedback.c.id)
    with engine.connect() as connection:
        return [FeedbackEntry(**row) for row in connection.execute(query).mappings()]


def _present(cursor: Cursor, table: Table, ids: Collection[str]) -> set[str]:
    """Returns those of the ids that a table has."""
    if not ids:
        return set()
    # One text: of a list psycopg 2 quotes each element by itself, which takes longer than the question.
    array = f"{{{','.join(ids)}}}"
    cursor.execute(f"SELECT prediction_id::text FROM {table.name} WHERE prediction_id = ANY(%s::uuid[])", (array,))
    return {prediction_id for (prediction_id,) in cursor.fetchall()}


def _write_images(cursor: Cursor, wanted: set[str], read_image: ReadImage) -> None:
    if not wanted:
        return
    # Uploads are most of the bytes, and many are known. The lock keeps a known one until this transaction ends.
    cursor.execute("SELECT sha256 FROM images WHERE sha256 = ANY(%s) FOR KEY SHARE", (sorted(wanted),))
    known = {sha256 for (sha256,) in cursor.fetchall()}
    rows: list[dict[str, Any]] = []
    for sha256 in sorted(
        wanted - known
    ):  # In one order for all replicas, or they would wait for each other in circles.
        found = read_image(sha256)
        if found is None:
            raise ValueError(f"Expected the upload {sha256} in the spool. Received: none.")
        content, media_type, created_on = found
        rows.append(
            {
                "sha256": sha256,
                "content": content,
                "bytes": len(content),
                "media_type": media_type,
                "created_on": datetime.fromisoformat(created_on),
            }
        )
    if rows:
        _copy(cursor, _IMAGES, lambda: map(_IMAGES.encode, rows))


def _copy(
    cursor: Cursor, load: _Load, make_rows: Callable[[], Iterable[bytes]], chunk_bytes: int = _CHUNK_BYTES
) -> None:
    columns, table = ", ".join(load.columns), load.table.name
    cursor.execute("SAVEPOINT before_copy")
    try:
        _stream(cursor, f"{table} ({columns})", make_rows(), chunk_bytes)
    except psycopg2.errors.UniqueViolation:  # Some are there. A select makes a table without constraints.
        cursor.execute("ROLLBACK TO SAVEPOINT before_copy")
        cursor.execute(
            f"CREATE TEMPORARY TABLE incoming_{table} ON COMMIT DROP AS SELECT {columns} FROM {table} WITH NO DATA"
        )
        _stream(cursor, f"incoming_{table} ({columns})", make_rows(), chunk_bytes)
        cursor.execute(
            f"INSERT INTO {table} ({columns}) SELECT {columns} FROM incoming_{table} "
            f"ON CONFLICT ({load.key}) DO NOTHING"
        )
    cursor.execute("RELEASE SAVEPOINT before_copy")


def _stream(cursor: Cursor, target: str, rows: Iterable[bytes], chunk_bytes: int) -> None:
    stream = CopyStream(rows)
    try:
        cursor.copy_expert(f"COPY {target} FROM STDIN WITH (FORMAT binary)", stream, chunk_bytes)
    except psycopg2.errors.QueryCanceled as err:
        raise stream.error or err from None


def _first_value(cursor: Cursor) -> Any:
    row = cursor.fetchone()
    return None if row is None else row[0]
