"""How records look in the Dagster page: tables, and links to files (pictures are no part of its event log)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MarkdownMetadataValue:
    """Shows rows (all with the keys of the first) as a table; floats with four digits."""
    if not rows:
        return dg.MetadataValue.md("(none)")
    header = list(rows[0])
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(_cell(row.get(name)) for name in header) for row in rows]
    return dg.MetadataValue.md("\n".join(f"| {line} |" for line in lines))


def file_link(path: Path) -> dg.PathMetadataValue:
    """Shows where a file lies."""
    return dg.MetadataValue.path(str(path))


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
