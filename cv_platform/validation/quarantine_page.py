"""A page and a table of the images that take no part, by kind and with the reason: one file each, without a server."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_platform.datasets.quarantine import kind_of
from cv_platform.pages import render, sealed, thumbnail
from cv_platform.predictions import LABEL_SEPARATOR

if TYPE_CHECKING:
    from cv_platform.validation.checks import Subject

PAGE, TABLE = "quarantine.html", "quarantine.csv"
MOST_CARDS = 500
_THUMBNAIL_PX = 160
_COLUMNS = ("path", "status", "kind", "reason", "labels", "format", "width_px", "height_px", "bytes")


def write_quarantine(subject: Subject) -> Path:
    """Writes the page and the table to `subject.directory`, and returns the page's path."""
    rows: list[dict[str, Any]] = [
        {str(name): value for name, value in row.items()} | {"kind": kind_of(row["reason"])}
        for row in subject.quarantined.sort_values("path").to_dict("records")
    ]
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"labels": LABEL_SEPARATOR.join(row["labels"])} for row in rows)
    (subject.directory / TABLE).write_text(text.getvalue(), encoding="utf-8")
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    most = max(1, MOST_CARDS // max(1, len(kinds)))
    page = render(
        "validation/quarantine.html",
        title=f"Images of {subject.version} that take no part",
        table=TABLE,
        facts=[(kind, f"{len(found)} image{'s' if len(found) > 1 else ''}") for kind, found in sorted(kinds.items())],
        kinds={kind: [_card(row, subject) for row in found[:most]] for kind, found in sorted(kinds.items())},
        more={kind: len(found) - most for kind, found in kinds.items()},
    )
    path = subject.directory / PAGE
    path.write_text(sealed(page), encoding="utf-8")
    return path


def _card(row: dict[str, Any], subject: Subject) -> dict[str, Any]:
    # What does not decode, or would take gigabytes to, is not tried again.
    path = subject.root / row["path"]
    picture = thumbnail(path, _THUMBNAIL_PX, subject.sample_bits) if row["is_readable"] else None
    words = re.sub(r"^\w+Error: ", "", row["reason"].partition(": ")[2])
    return {"path": row["path"], "words": words, "labels": LABEL_SEPARATOR.join(row["labels"]), "picture": picture}
