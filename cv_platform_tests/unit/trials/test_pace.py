from __future__ import annotations

import pytest

from trials import pace
from trials.pace import MOST, REFERENCE_SECONDS, allowed, slowness

seconds_of_work = pace._seconds_of_work


@pytest.mark.parametrize(("took", "factor"), [(0.5, 1.0), (1.0, 1.0), (2.5, 2.5), (100.0, MOST)])
def test_limits_follow_the_machine_within_bounds(monkeypatch: pytest.MonkeyPatch, took: float, factor: float) -> None:
    monkeypatch.setattr(pace, "_seconds_of_work", lambda: took * REFERENCE_SECONDS)
    assert allowed(60.0) == pytest.approx(60.0 * factor)


def test_the_pace_is_that_of_work_and_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_WORK", "import json")
    assert seconds_of_work() > 0
    assert slowness() == slowness() == 1.0
    assert slowness.cache_info().misses == 1
