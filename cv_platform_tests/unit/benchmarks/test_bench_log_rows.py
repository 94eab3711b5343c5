from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.bench_log_rows import _checks


@pytest.mark.parametrize("rows", ["1000000", "2000005"])
def test_refuses_a_log_that_cannot_be_compared_with_the_first(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["log-rows", "--rows", rows]) == 1
    said = capsys.readouterr().err
    assert f"Expected --rows of more than 1,000,000, in tens. Received: {int(rows):,}." in said


@pytest.mark.parametrize(("rows", "most"), [(2_000_000, 2.0), (10_000_000, 2.0), (100_000_000, 4.0)])
def test_may_take_twice_as_long_for_each_tenfold_and_never_more_than_a_second(rows: int, most: float) -> None:
    seconds = {"held": (0.1, 0.1 * most - 0.01), "grown": (0.1, 0.1 * most + 0.01), "slow": (0.9, 1.1)}
    held = {check.what: check.held for check in _checks(seconds, (1_000_000, rows))}
    assert held == {
        f"held, when the log grows from 1,000,000 to {rows:,} rows": True,
        f"grown, when the log grows from 1,000,000 to {rows:,} rows": False,
        f"slow, when the log grows from 1,000,000 to {rows:,} rows": True,
        f"held, among {rows:,} rows": True,
        f"grown, among {rows:,} rows": True,
        f"slow, among {rows:,} rows": False,
    }
