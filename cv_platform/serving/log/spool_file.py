"""The SQL of one spool file: its tables, and each operation on them. `spool.py` decides who calls what, and when."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import quote
from uuid import UUID

from cv_platform.serving.log.entry import (
    UNKNOWN_MEDIA_TYPE,
    FeedbackEntry,
    Outcome,
    SpooledEntry,
    SpooledImage,
    StoredPrediction,
    decode,
    encode_outcome,
    stored_prediction,
)

SQLITE = ".sqlite"
LOCK = ".lock"
EXTENSIONS = ("", "-wal", "-shm")
"""What SQLite adds to the file's name for the files that belong to it."""

VACUUM_PAGES = 1000
"""How many pages `free_pages` gives back: few enough for the entries that wait behind it."""

LONG_LOG_PAGES = 4000
"""Of the write-ahead log (16 MiB), from which on the writer copies them to the file. Entries soon leave it and the next
ones take their pages: of a longer log less is copied. With SQLite's 1000 pages a worker took 7 % longer to answer."""
SHORT_LOG_PAGES = 1000
"""Where the disk may end: what is in the log needs as much again in the file."""
_PAGE_BYTES, _FRAME_HEADER_BYTES = 4096, 24
_FORMAT_VERSION = 1
_BUSY_SECONDS = 10.0
_TABLES = """
CREATE TABLE images (
    sha256 TEXT PRIMARY KEY NOT NULL,
    bytes INTEGER NOT NULL,
    media_type TEXT NOT NULL,
    created_on TEXT NOT NULL,
    content BLOB NOT NULL
);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    entry_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    prediction_id TEXT,
    image_sha256 TEXT,
    spooled_on REAL NOT NULL,
    record TEXT NOT NULL,
    vectors BLOB NOT NULL
);
CREATE INDEX entries_prediction_id ON entries (prediction_id);
CREATE INDEX entries_image_sha256 ON entries (image_sha256);
CREATE TABLE rejected (
    entry_id TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    rejected_on REAL NOT NULL,
    reason TEXT NOT NULL,
    record TEXT NOT NULL,
    vectors BLOB NOT NULL,
    image BLOB,
    media_type TEXT
);
"""
_ENTRY_COLUMNS = "entry_id, kind, prediction_id, image_sha256, spooled_on, record, vectors"
_IMAGE_COLUMNS = "sha256, bytes, media_type, created_on, content"
_ADDING = (
    f"CREATE TEMP VIEW IF NOT EXISTS added AS SELECT {_ENTRY_COLUMNS}, {_IMAGE_COLUMNS} FROM entries, images",
    f"""CREATE TEMP TRIGGER IF NOT EXISTS add_entry INSTEAD OF INSERT ON added BEGIN
    INSERT OR IGNORE INTO images ({_IMAGE_COLUMNS})
    SELECT new.sha256, new.bytes, new.media_type, new.created_on, new.content WHERE new.sha256 IS NOT NULL;
    INSERT INTO entries ({_ENTRY_COLUMNS})
    VALUES (new.entry_id, new.kind, new.prediction_id, new.sha256, new.spooled_on, new.record, new.vectors);
END""",
)
"""An entry and its upload by one statement, which is a transaction by itself: for each statement, Python's lock is let
go and waited for, beside a prediction that is about to be answered."""
_ADD = (
    "INSERT INTO added (entry_id, kind, prediction_id, spooled_on, record, vectors, sha256, bytes, media_type, "
    "created_on, content) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_REJECTED = "entry_id, kind, rejected_on, reason, record, vectors, image, media_type"


def connect(path: Path) -> sqlite3.Connection:
    """Opens a spool file; the caller sees to it that one thread at a time uses the connection."""
    return sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the tables of a new file, and sets what every writing connection needs.

    Raises:
        sqlite3.OperationalError: the file cannot be used here, or is of a newer version.
        sqlite3.DatabaseError: the file is damaged.
    """
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # Only takes effect in a new file, and only first.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone leaves the data in the drive's cache.
    # What the database has is not overwritten, as Debian's build would: that costs as much as to write it again, hides
    # nothing that the write-ahead log still has, and free pages soon go back to the system (`free_pages`).
    connection.execute("PRAGMA secure_delete = OFF")
    connection.execute(f"PRAGMA journal_size_limit = {64 * 1024 * 1024}")
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version == 0:
        connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_FORMAT_VERSION}; COMMIT;")
        _sync_folder(path.parent)
    elif version != _FORMAT_VERSION:
        # No damage: a newer version can still read it.
        raise sqlite3.OperationalError(
            f"{path}: expected spool format {_FORMAT_VERSION}. Received: {version}. Upgrade cv_platform."
        )
    else:
        _add_media_type(connection)
    _let_add(connection)


def lengthen_log(path: Path) -> None:
    """Gives the write-ahead log of a new file the length that it reaches, with zeros behind what it has.

    A sync of bytes that make a file longer may take three to four times as long as of bytes that replace others. SQLite
    ends a log at the first page without the salt of those before, as behind one that it has begun anew.
    https://www.sqlite.org/fileformat2.html#walformat

    Raises:
        OSError: the disk does not take them; the log grows as it is written.
    """
    with path.with_name(f"{path.name}-wal").open("ab") as log:
        missing = LONG_LOG_PAGES * (_PAGE_BYTES + _FRAME_HEADER_BYTES) - log.tell()
        log.write(bytes(max(0, missing)))
        log.flush()
        os.fsync(log.fileno())


def _let_add(connection: sqlite3.Connection) -> None:
    for statement in _ADDING:
        connection.execute(statement)


def _add_media_type(connection: sqlite3.Connection) -> None:
    """Gives a file of a former release the column that it lacks; that release reads and writes it all the same."""
    if "media_type" not in {column[1] for column in connection.execute("PRAGMA table_info(rejected)")}:
        connection.execute("ALTER TABLE rejected ADD COLUMN media_type TEXT")


def insert_entry(connection: sqlite3.Connection, entry: SpooledEntry) -> None:
    """Adds an entry and, unless it is here already, its upload, to a file that `prepare` has prepared."""
    upload: tuple[object, ...] = (None,) * 5
    if (image := entry.image) is not None:
        upload = image.sha256, len(image.content), image.media_type, image.created_on.isoformat(), image.content
    own = entry.entry_id, entry.kind, entry.prediction_id, time.time(), entry.record, entry.vectors
    connection.execute(_ADD, (*own, *upload))


def settle_entries(connection: sqlite3.Connection, outcomes: Iterable[Outcome]) -> None:
    """Writes how predictions ended into their records; one that was deleted stays so."""
    connection.executemany(
        "UPDATE entries SET record = json_patch(record, ?) WHERE prediction_id = ? AND kind = 'request'",
        [(encode_outcome(outcome), outcome.prediction_id) for outcome in outcomes],
    )


def try_insert(connection: sqlite3.Connection) -> None:
    """Adds an entry and removes it; inside a transaction nobody else ever sees it."""
    entry_id = "trial"
    insert_entry(connection, SpooledEntry(entry_id, "request", None, "{}", b"", None))
    connection.execute("DELETE FROM entries WHERE entry_id = ?", (entry_id,))


def delete_entries(connection: sqlite3.Connection, ids: Sequence[int]) -> None:
    """Removes entries, and the uploads that no other entry needs."""
    marks = ",".join("?" * len(ids))
    images = connection.execute(
        f"SELECT DISTINCT image_sha256 FROM entries WHERE id IN ({marks}) AND image_sha256 IS NOT NULL", ids
    ).fetchall()
    connection.execute(f"DELETE FROM entries WHERE id IN ({marks})", ids)
    connection.executemany(
        "DELETE FROM images WHERE sha256 = ?1 AND NOT EXISTS (SELECT 1 FROM entries WHERE image_sha256 = ?1)", images
    )


def move_to_rejected(connection: sqlite3.Connection, entry: int, reason: str) -> None:
    """Puts an entry aside with the reason, and with its upload, so that nothing of it is lost."""
    connection.execute(
        f"INSERT OR IGNORE INTO rejected ({_REJECTED}) "
        "SELECT e.entry_id, e.kind, ?, ?, e.record, e.vectors, i.content, i.media_type "
        "FROM entries e LEFT JOIN images i ON i.sha256 = e.image_sha256 WHERE e.id = ?",
        (time.time(), reason, entry),
    )
    delete_entries(connection, [entry])


def copy_rejected(source: sqlite3.Connection, target: sqlite3.Connection) -> None:
    """Copies the rejected entries of one file to another; those that are there already stay as they are."""
    rows = source.execute(f"SELECT {_REJECTED} FROM rejected")
    target.executemany(f"INSERT OR IGNORE INTO rejected ({_REJECTED}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)


def requeue_rejected(connection: sqlite3.Connection, entry_ids: Collection[str] | None) -> int:
    """Puts rejected entries (None: all) back into the queue, as they were; returns how many.

    One whose record cannot be read stays.
    """
    _add_media_type(connection)
    _let_add(connection)
    rows = connection.execute(f"SELECT {_REJECTED} FROM rejected ORDER BY rowid").fetchall()
    count = 0
    for entry_id, kind, _, _, record, vectors, image, media_type in rows:
        if entry_ids is not None and entry_id not in entry_ids:
            continue
        try:
            values = decode(record, vectors)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        spooled_image = None
        if image is not None:
            sha256 = hashlib.sha256(image).hexdigest()
            spooled_image = SpooledImage(sha256, image, media_type or UNKNOWN_MEDIA_TYPE, values["created_on"])
        prediction_id = values["prediction_id"]
        insert_entry(
            connection,
            SpooledEntry(entry_id, kind, prediction_id and str(prediction_id), record, vectors, spooled_image),
        )
        connection.execute("DELETE FROM rejected WHERE entry_id = ?", (entry_id,))
        count += 1
    return count


def copy_entries(source: sqlite3.Connection, target: sqlite3.Connection, ids: Sequence[int]) -> None:
    """Copies entries, with the uploads that they need, to another file."""
    for entry in ids:
        row = source.execute(f"SELECT {_ENTRY_COLUMNS} FROM entries WHERE id = ?", (entry,))
        target.executemany(f"INSERT INTO entries ({_ENTRY_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        image = source.execute(
            f"SELECT {_IMAGE_COLUMNS} FROM images WHERE sha256 = (SELECT image_sha256 FROM entries WHERE id = ?)",
            (entry,),
        )
        target.executemany(f"INSERT OR IGNORE INTO images ({_IMAGE_COLUMNS}) VALUES (?, ?, ?, ?, ?)", image)


def free_pages(connection: sqlite3.Connection) -> None:
    """Gives unused pages at the file's end back to the system."""
    # One by one: Python's sqlite3 takes a single step of a pragma that returns no columns, which frees one page.
    for _ in range(VACUUM_PAGES):
        connection.execute("PRAGMA incremental_vacuum(1)")


def find_in_file(connection: sqlite3.Connection, prediction_id: UUID) -> StoredPrediction | None:
    """Returns a prediction that waits in this file."""
    row = connection.execute(
        "SELECT e.record, e.vectors, i.content, i.media_type FROM entries e "
        "LEFT JOIN images i ON i.sha256 = e.image_sha256 WHERE e.prediction_id = ? AND e.kind = 'request'",
        (str(prediction_id),),
    ).fetchone()
    if row is None:
        return None
    record, vectors, image, media_type = row
    return stored_prediction(decode(record, vectors), image=image, media_type=media_type)


def find_spooled(directory: Path, prediction_id: UUID) -> StoredPrediction | None:
    """Returns a prediction that waits in any replica's spool of this folder."""
    for path in sorted(directory.glob(f"*{SQLITE}")):
        try:
            with closing(_connect_to_read(path)) as connection:
                found = find_in_file(connection, prediction_id)
        except sqlite3.DatabaseError:
            continue  # Drained and deleted since it was listed, or not yet made: then it is not there.
        if found is not None:
            return found
    return None


def find_statements(directory: Path, prediction_id: UUID) -> Iterator[FeedbackEntry]:
    """Yields what was said of a prediction and waits in any replica's spool of this folder."""
    query = "SELECT record FROM entries WHERE prediction_id = ? AND kind = 'feedback' ORDER BY id"
    for path in sorted(directory.glob(f"*{SQLITE}")):
        try:
            with closing(_connect_to_read(path)) as connection:
                records = connection.execute(query, (str(prediction_id),)).fetchall()
        except sqlite3.DatabaseError:
            continue  # As in `find_spooled`.
        yield from (FeedbackEntry(**decode(record, b"")) for (record,) in records)


def open_existing(path: Path) -> sqlite3.Connection:
    """Opens a spool file, whoever owns it, to change it by short transactions that the caller begins and ends."""
    name = f"file:{quote(str(path.absolute()))}?mode=rw"
    return sqlite3.connect(name, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)


def _connect_to_read(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=_BUSY_SECONDS)


def _sync_folder(folder: Path) -> None:
    """As `files.sync_folder`, but it raises: without its name on the disk no entry would be durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
