"""How records look in the Dagster page: pictures, tables and links."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg


def picture(png: bytes | Path, title: str) -> dg.MarkdownMetadataValue:
    """Shows a PNG inline; the page needs no file server for it."""
    content = png.read_bytes() if isinstance(png, Path) else png
    return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(content).decode()})")


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
