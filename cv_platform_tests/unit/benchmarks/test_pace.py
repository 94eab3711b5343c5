from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import pace
from benchmarks.pace import MOST, REFERENCE_SECONDS, allowed, slowness


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    slowness.cache_clear()
    yield
    slowness.cache_clear()


@pytest.mark.parametrize(("took", "factor"), [(0.5, 1.0), (1.0, 1.0), (2.5, 2.5), (100.0, MOST)])
def test_limits_follow_the_machine_within_bounds(monkeypatch: pytest.MonkeyPatch, took: float, factor: float) -> None:
    monkeypatch.setattr(pace, "_seconds_of_work", lambda: took * REFERENCE_SECONDS)
    assert allowed(60.0) == pytest.approx(60.0 * factor)


def test_the_pace_is_measured_once_by_work_that_this_machine_does() -> None:
    first = slowness()
    assert 1.0 <= first <= MOST
    assert slowness() is first
