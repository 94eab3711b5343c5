"""Lists of a version's files as CSV: any name that a file may have, and no path that leads out of the version."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from cv_platform.errors import InvalidDatasetError


def write_rows(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> bytes:
    """Returns a table with a line of columns' names and a line for each row."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode(errors="surrogateescape")


def read_rows(content: bytes, columns: Sequence[str]) -> list[list[str]]:
    """Returns the rows of such a table.

    Raises:
        ValueError: the columns are others, or a row has too few or too many cells.
    """
    names, *rows = csv.reader(io.StringIO(content.decode(errors="surrogateescape"), newline=""), strict=True)
    if names != list(columns) or any(len(row) != len(columns) for row in rows):
        raise ValueError(f"a table of {', '.join(names)}")
    return rows


def require_inside(paths: Iterable[str], *, listing: str, version: str) -> None:
    """Refuses paths that lead out of their folder: a list may come from a remote.

    Raises:
        InvalidDatasetError: one does.
    """
    for path in paths:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise InvalidDatasetError(f"{version}: expected paths below a folder in {listing}. Received: {path}.")
