"""How records look in the Dagster page: tables, and links to files (pictures are no part of its event log)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg


def table(rows: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Shows rows as a table with the keys of the first, whose columns have the types of their values."""
    names = list(rows[0]) if rows else []
    records = [{name: _cell(row.get(name)) for name in names} for row in rows]
    columns = [dg.TableColumn(name, _type([row[name] for row in records])) for name in names]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in records], schema=dg.TableSchema(columns))


def file_link(path: Path) -> dg.PathMetadataValue:
    """Shows where a file lies."""
    return dg.MetadataValue.path(str(path))


def _cell(value: Any) -> str | int | float | bool | None:
    if hasattr(value, "item"):  # A scalar of NumPy.
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None  # The page's JSON has no such number.
    return value if isinstance(value, str | int | float | None) else str(value)


def _type(values: Sequence[Any]) -> str:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return "int"
    return "float" if kinds and kinds <= {int, float} else "string"
