from __future__ import annotations

import dagster as dg
import numpy as np

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
