"""Deletes one prediction for good, wherever it is: in the database, or in a spool of this host or another one.

What remains is the row of its request in `api_log`, without the prediction: that somebody asked is not what is deleted.
An image goes with the last prediction that has it.

The prediction, or what was said of it, may be on its way to the database, wait on a host that nobody can ask, or be
said only later. What is being written is in the database once `DELETION_LOCK` is had; what is written afterwards finds
the deletion in the table `deletions`, and is dropped (`log_tables`).
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from cv_platform.serving.log.damaged_spools import delete_from_damaged
from cv_platform.serving.log.spool_file import SQLITE, open_existing

if TYPE_CHECKING:
    from sqlalchemy import Engine

DELETION_LOCK = 0x5DE1E7E
"""PostgreSQL's advisory lock: a deletion holds it alone, and who writes entries together with the others who do."""
_REQUEST_FIELDS = (
    "entry_id",
    "request_method",
    "request_url",
    "response_status_code",
    "response_message",
    "timespan",
    "created_on",
    "model_version",
    "client_error",
)


def delete_from_database(engine: Engine, prediction_id: UUID) -> bool:
    """Deletes a prediction, what was said of it, and its image if no other prediction has it; it never comes again.

    Returns:
        Whether there was such a prediction.

    Raises:
        DatabaseUnavailableError: the database cannot be reached.
        SchemaMismatchError: migrate first.
    """
    # Late: no spool needs them, and a worker is to start soon.
    from sqlalchemy import delete, func, select
    from sqlalchemy.dialects.postgresql import insert

    from cv_platform.database.migrate import read_revision, require_revision
    from cv_platform.database.schema import deletions, feedback, images, predictions

    with engine.begin() as connection:
        require_revision(read_revision(connection))
        # By itself: the next statement then sees what those before have committed.
        connection.execute(select(func.pg_advisory_xact_lock(DELETION_LOCK)))
        connection.execute(insert(deletions).values(prediction_id=prediction_id).on_conflict_do_nothing())
        connection.execute(delete(feedback).where(feedback.c.prediction_id == prediction_id))
        row = connection.execute(
            delete(predictions)
            .where(predictions.c.prediction_id == prediction_id)
            .returning(predictions.c.image_sha256)
        ).first()
        if row is not None and row.image_sha256 is not None:
            sha256 = row.image_sha256
            # The lock waits for replicas that are about to use this image; the next statement sees what they wrote.
            connection.execute(select(images.c.sha256).where(images.c.sha256 == sha256).with_for_update())
            is_used = select(predictions.c.prediction_id).where(predictions.c.image_sha256 == sha256).exists()
            connection.execute(delete(images).where(images.c.sha256 == sha256, ~is_used))
        return row is not None


def delete_from_spools(directory: Path, prediction_id: UUID) -> bool:
    """Deletes a prediction from the spools of all replicas in `directory`; their requests stay, to be logged.

    One that is on its way to the database is deleted there, before or after this (`delete_from_database`).

    Args:
        directory: `$CV_HOME/spool`.
        prediction_id: which prediction.

    Returns:
        Whether there was such a prediction.
    """
    removed = [_delete_from_file(path, prediction_id) for path in sorted(directory.glob(f"*{SQLITE}"))]
    return delete_from_damaged(directory, prediction_id) or any(removed)


def _delete_from_file(path: Path, prediction_id: UUID) -> bool:
    wanted = str(prediction_id)
    try:
        with closing(open_existing(path)) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("BEGIN IMMEDIATE")
            rejected = connection.execute("SELECT entry_id, record FROM rejected").fetchall()
            ids = [entry_id for entry_id, record in rejected if _names(record, wanted)]
            connection.executemany("DELETE FROM rejected WHERE entry_id = ?", [(entry_id,) for entry_id in ids])
            removed = _strip_entries(connection, wanted) or bool(ids)
            connection.execute("COMMIT")
            return removed
    except sqlite3.OperationalError as err:
        if path.exists() and "unable to open" not in str(err) and "no such table" not in str(err):
            raise
        return False  # Drained and deleted since it was listed, or only just being made.


def _strip_entries(connection: sqlite3.Connection, prediction_id: str) -> bool:
    rows = connection.execute(
        "SELECT id, record, image_sha256 FROM entries WHERE prediction_id = ? AND kind = 'request'", (prediction_id,)
    ).fetchall()
    for entry, text, sha256 in rows:
        record: dict[str, Any] = json.loads(text)
        kept = {name: record[name] for name in _REQUEST_FIELDS}
        connection.execute(
            "UPDATE entries SET prediction_id = NULL, image_sha256 = NULL, vectors = x'', record = ? WHERE id = ?",
            (json.dumps({**kept, "prediction_id": None}, ensure_ascii=False), entry),
        )
        connection.execute(
            "DELETE FROM images WHERE sha256 = ?1 AND NOT EXISTS (SELECT 1 FROM entries WHERE image_sha256 = ?1)",
            (sha256,),
        )
    connection.execute("DELETE FROM entries WHERE prediction_id = ? AND kind = 'feedback'", (prediction_id,))
    return bool(rows)


def _names(record: str, prediction_id: str) -> bool:
    try:
        return json.loads(record).get("prediction_id") == prediction_id
    except (ValueError, AttributeError):
        return False  # A damaged record, which may be why it was rejected.
