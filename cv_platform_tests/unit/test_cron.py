"""Cron expressions of configs: what they say is what Dagster makes of them."""

from __future__ import annotations

import itertools
from datetime import UTC, date, datetime, timedelta

import pytest
from dagster._utils.schedules import is_valid_cron_string, schedule_execution_time_iterator

from cv_platform.config.cron import ALIASES, Cron

CRONS = [
    *("0 6 * * 1", "0 7 * * *", "0 0 1 * *", "*/15 8-17 * * mon-fri", "30 4 1,15 * *", "5,35 22-2 * * *", "0 6 29 2 *"),
    *("0 6 13 * fri", "0 6 */2 * 1", "0 6 */10 * *", "0 6 1-31 * 1", "0 6 */2 * 1-7", "0 6 * * 0-7", "0 6 * * 5-7"),
    *(
        "0 6 * * 1#1",
        "0 6 L * *",
        "0 6 ? * 1",
        "5/15 * * * *",
        "0 6 * * *,1",
        "0 6 * * 5-5",
        "*/90 * * * *",
        "0 6 * * L5",
    ),
    *(
        "0 6 1,L * 1",
        "0 6 5 * 1#1",
        "0 6 * * mon-wed#5",
        "0 6 25-L/2 * *",
        "0 22-2/3 * * *",
        "0 6 * * 7-0",
        "0 ٦ * * *",
    ),
    *("0 6 * * fri-mon", "0 6 31 * *", "0 6 * JAN,jul sun", "10-50/20 0 * 11-2 *", "59 23 31 12 *", *ALIASES),
]


@pytest.mark.parametrize("text", CRONS)
def test_runs_when_dagster_runs(text: str) -> None:
    cron, start = Cron.parse(text), datetime(2026, 1, 1, tzinfo=UTC)
    assert is_valid_cron_string(text)
    ticks = list(itertools.islice(schedule_execution_time_iterator(start.timestamp(), text, "UTC"), 100))
    midnights = (start + timedelta(days=number) for number in itertools.count())
    runs = (
        midnight + timedelta(minutes=minute)
        for midnight in midnights
        if cron.runs_on(midnight.date())
        for minute in cron.minutes
    )
    assert list(itertools.islice(runs, 100)) == [tick.astimezone(UTC) for tick in ticks]


@pytest.mark.parametrize(
    ("text", "gap"),
    [
        ("0 6 * * 1", timedelta(days=7)),
        ("@daily", timedelta(days=1)),
        ("@monthly", timedelta(days=31)),
        ("0 6 * * mon-fri", timedelta(days=3)),
        ("*/15 * * * *", timedelta(minutes=15)),
        ("0 8,20 * * *", timedelta(hours=12)),
        ("0 8,9 * * *", timedelta(hours=23)),
        ("0 6 31 * *", timedelta(days=61)),  # From 31 March to 31 May.
        ("0 0 29 2 *", timedelta(days=1461)),
        ("@yearly", timedelta(days=366)),
        ("0 6 * * 1#1", timedelta(days=35)),
        ("0 6 L * *", timedelta(days=31)),
        ("0 6 * 2 1#5", timedelta(days=28 * 365 + 7)),  # In a leap year that begins on a Thursday.
    ],
)
def test_the_longest_gap_is_that_of_the_calendar(text: str, gap: timedelta) -> None:
    assert Cron.parse(text).longest_gap() == gap


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it has 0"),
        ("weekly", "it has 1"),
        ("0 6 * *", "it has 4"),
        ("0 6 * * 1 30", "it has 6"),
        ("@every_day", "it has 1"),
        ("60 6 * * 1", "minute 60: expected 0 to 59"),
        ("0 24 * * *", "hour 24: expected 0 to 23"),
        ("0 6 0 * *", "day of the month 0: expected 1 to 31"),
        ("0 6 * 13 *", "month 13: expected 1 to 12"),
        ("0 6 * * 8", "day of the week 8: expected 0 to 7"),
        ("0 6 * * monday", "day of the week monday: expected 0 to 7"),
        ("0 6 * * 1,", "day of the week of nothing: expected 0 to 7"),
        ("0 -6 * * *", "hour of nothing: expected 0 to 23"),
        ("*/0 * * * *", "minute */0: a step"),
        ("0 6 31 2 *", "none of its months has such a day"),
        ("0 6 31 6 1", "none of its months has such a day"),  # Dagster takes it, and fails at its first tick.
        ("0 6 13 * 1#1", "none of its months has such a day"),  # Nor for this one, although either would do.
        ("0 6 * * 1#6", "day of the week 1#6: a month has five of them at most"),
        ("0 6 * * 1#1,2", "day of the week 1#1,2: all of them say which one of the month, or none"),
        ("0 6 ?/2 * *", "day of the month ?: expected 1 to 31"),
        ("0 6 0/5 * *", "day of the month 0/5: expected 1 to 31"),
        ("0 6 * * L", "day of the week l: expected 0 to 7"),
        ("r 6 * * *", "minute r: expected 0 to 59"),
    ],
)
def test_says_what_is_wrong_with_an_expression(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match="expected five fields of cron") as refused:
        Cron.parse(text)
    assert f'Received: "{text}": {reason}' in str(refused.value)


@pytest.mark.parametrize("text", ["0 6 31 6 1", "0 6 13 * 1#1"])
def test_dagster_takes_some_and_finds_no_date(text: str) -> None:
    assert is_valid_cron_string(text)
    with pytest.raises(ValueError, match="failed to find"):
        next(schedule_execution_time_iterator(datetime(2026, 1, 1, tzinfo=UTC).timestamp(), text, "UTC"))


def test_a_date_runs_only_in_its_month() -> None:
    cron = Cron.parse("0 6 13 2,3 fri")
    days = [date(2026, 1, 2), date(2026, 2, 6), date(2026, 2, 12), date(2026, 3, 13), date(2026, 4, 13)]
    assert [cron.runs_on(day) for day in days] == [False, True, False, True, False]
