from __future__ import annotations

import dagster as dg
import numpy as np

from cv_platform.defs.branch import checked
from cv_platform.defs.metadata import table
from cv_platform.defs.validation import check_result
from cv_platform.records import CheckOutcome


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


def test_a_check_of_validation_has_numbers_that_the_page_plots() -> None:
    outcome = CheckOutcome(
        name="duplicates", passed=False, severity="warn", summary="2.", value=0.25, limit=0.05, offenders=("a.png",)
    )
    shown = check_result("duplicates", outcome)
    assert {name: shown.metadata[name].value for name in ("measured", "limit")} == {"measured": 0.25, "limit": 0.05}
    assert isinstance(shown.metadata["measured"], dg.FloatMetadataValue)
    offenders = shown.metadata["offenders"]
    assert isinstance(offenders, dg.TableMetadataValue)
    assert [row.data for row in offenders.records] == [{"offender": "a.png"}]
    unjudged = CheckOutcome(name="divided_groups", passed=True, severity="warn", summary="Not judged.")
    assert check_result("divided_groups", unjudged).metadata == {}
