from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from cv_platform.config import MonitorConfig
from cv_platform.errors import ConfigError
from cv_platform.monitoring.window import default_window, parse_utc, window_bounds

NOW = datetime(2026, 2, 8, 6, 0, tzinfo=UTC)


def test_default_window_is_the_last_days_until_now() -> None:
    assert default_window(NOW, 7) == (datetime(2026, 2, 1, 6, 0, tzinfo=UTC), NOW)


def test_times_of_other_zones_become_utc() -> None:
    assert parse_utc("2026-02-08T08:00:00+02:00") == NOW
    assert parse_utc("2026-02-08T06:00:00Z").tzinfo is UTC
    start, end = default_window(NOW.astimezone(timezone(timedelta(hours=-5))), 1)
    assert (start.isoformat(), end.isoformat()) == ("2026-02-07T06:00:00+00:00", "2026-02-08T06:00:00+00:00")


@pytest.mark.parametrize("text", ["2026-02-08T06:00:00", "yesterday", ""])
def test_refuses_times_without_zone_and_what_is_no_time(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_utc(text)


def test_refuses_a_naive_now() -> None:
    with pytest.raises(ConfigError, match="with its zone"):
        default_window(datetime(2026, 2, 8), 7)  # noqa: DTZ001 - that it is naive is the point.


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, ("2026-02-06", "2026-02-08T06:00:00+00:00")),
        ("2026-01-01T00:00:00Z", None, ("2026-01-01", "2026-02-08T06:00:00+00:00")),
        (None, "2026-01-03T06:00:00Z", ("2026-01-01", "2026-01-03T06:00:00+00:00")),
        ("2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00", None),
    ],
)
def test_bounds_from_the_config(start: str | None, end: str | None, expected: tuple[str, str] | None) -> None:
    monitor = MonitorConfig(window_days=2, window_start_utc=start, window_end_utc=end)
    if expected is None:  # Both are the same moment.
        with pytest.raises(ConfigError, match="before"):
            window_bounds(monitor, NOW)
        return
    found = window_bounds(monitor, NOW)
    assert found.start.date().isoformat() == expected[0]
    assert found.end.isoformat() == expected[1]
