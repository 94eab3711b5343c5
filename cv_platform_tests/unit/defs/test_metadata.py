from __future__ import annotations

import dagster as dg
import numpy as np

from cv_platform.defs.branch import checked
from cv_platform.defs.metadata import table


def test_columns_have_the_types_of_their_values() -> None:
    shown = table(
        [
            {"class": "cat", "images": np.int64(3), "recall": None, "passed": True, "place": ("a", 1)},
            {"class": "dog", "images": 4, "recall": np.float64(0.5), "passed": False, "place": ("b", 2)},
        ]
    )
    assert [(column.name, column.type) for column in shown.schema.columns] == [
        ("class", "string"),
        ("images", "int"),
        ("recall", "float"),
        ("passed", "bool"),
        ("place", "string"),
    ]
    assert [record.data["images"] for record in shown.records] == [3, 4]
    assert table([{"auc": float("nan")}, {"auc": 0.5}]).records[0].data["auc"] is None
    assert shown.records[0].data["place"] == "('a', 1)"


def test_no_rows_are_an_empty_table() -> None:
    shown = table([])
    assert isinstance(shown, dg.TableMetadataValue)
    assert (shown.records, shown.schema.columns) == ([], [])


def test_a_check_that_blocks_is_an_error_unless_it_is_not_to_stop_the_run() -> None:
    blocks = dg.AssetCheckSpec("rate", asset="detectors", blocking=True)
    warns = dg.AssetCheckSpec("rate", asset="detectors")
    found = [
        *checked(blocks, False, "high"),
        *checked(blocks, False, "not measured", stops=False),
        *checked(warns, False, "high"),
    ]
    error, warning = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
    assert [one.severity for one in found] == [error, warning, warning]
