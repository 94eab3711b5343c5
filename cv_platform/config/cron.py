"""When something runs by itself: cron expressions as Dagster takes them, of five fields, in UTC.

Hashed (`H`), nth (`1#2`) and last (`L`) days, which Dagster takes too, are left out: each cron means the same to every
reader. https://docs.dagster.io/guides/automate/schedules
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta

ALIASES = {
    **dict.fromkeys(("@yearly", "@annually"), "0 0 1 1 *"),
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    **dict.fromkeys(("@daily", "@midnight"), "0 0 * * *"),
    "@hourly": "0 * * * *",
}
_FIELDS = {"minute": (0, 59), "hour": (0, 23), "day of the month": (1, 31), "month": (1, 12), "day of the week": (0, 7)}
_NAMES: dict[str, tuple[str, ...]] = {
    "month": ("", "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "day of the week": ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}
_CYCLE = (date(2024, 1, 1), date(2052, 1, 1))
"""Dates fall on the same days of the week again after 28 years."""


@dataclass(frozen=True)
class Cron:
    """A cron expression that says something.

    Attributes:
        minutes: of the day on which it runs, ascending, 0 to 1439.
        months: 1 to 12.
        days: of the month, 1 to 31.
        weekdays: 0 (Sunday) to 6.
        either: both days are named: either will do.
    """

    minutes: tuple[int, ...]
    months: frozenset[int]
    days: frozenset[int]
    weekdays: frozenset[int]
    either: bool

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Reads an expression: numbers, names, `*`, lists, ranges, steps, or one of `ALIASES`.

        Raises:
            ValueError: it is none, or it names no date that there is; the message says what was expected.
        """
        fields = ALIASES.get(text.strip().lower(), text).lower().split()
        try:
            if len(fields) != len(_FIELDS):
                raise ValueError(f"it has {len(fields)}")
            minutes, hours, days, months, weekdays = map(_numbers, _FIELDS, fields)
            weekdays = frozenset(day % 7 for day in weekdays)
            # As Dagster reads it: all days, too, are none in particular beside */2.
            any_day, any_weekday = (
                own == "*" or (len(found) == count and "*" in other)
                for own, found, count, other in ((fields[2], days, 31, fields[4]), (fields[4], weekdays, 7, fields[2]))
            )
            minutes_of_day = tuple(sorted(60 * hour + minute for hour in hours for minute in minutes))
            cron = cls(minutes_of_day, months, days, weekdays, either=not any_day and not any_weekday)
            if not any(day.day in days and day.month in months for day in _days()):
                raise ValueError("none of its months has such a day")
        except ValueError as err:
            raise ValueError(
                "expected five fields of cron (minute, hour, day of the month, month, day of the week), such as "
                f'"0 6 * * 1" for Mondays at six, or one of {", ".join(ALIASES)}. Received: "{text}": {err}.'
            ) from err
        return cron

    def longest_gap(self) -> timedelta:
        """Returns the longest time from one run to the next one."""
        days = [day for day in _days() if self.runs_on(day)]
        days.append(days[0].replace(year=days[0].year + _CYCLE[1].year - _CYCLE[0].year))
        nights = max(after - before for before, after in itertools.pairwise(days))
        nights += timedelta(minutes=self.minutes[0] - self.minutes[-1])
        within = (timedelta(minutes=after - before) for before, after in itertools.pairwise(self.minutes))
        return max([nights, *within])

    def runs_on(self, day: date) -> bool:
        """Tells whether it runs on a day."""
        by_date, by_week = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (by_date or by_week if self.either else by_date and by_week)


def _days() -> Iterator[date]:
    return (_CYCLE[0] + timedelta(days=number) for number in range((_CYCLE[1] - _CYCLE[0]).days))


def _numbers(field: str, text: str) -> frozenset[int]:
    least, most = _FIELDS[field]
    found = set[int]()
    for part in text.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        low, high = (least, most) if span == "*" else (_number(field, first), _number(field, last if dash else first))
        is_sunday = (field, low, high) == ("day of the week", 7, 0)
        if (dash and (low == high or is_sunday)) or (part == "*" and part != text):
            raise ValueError(f"{field} {text}: a range has two ends, and * stands alone")
        if slash:
            if not (step.isdecimal() and 1 <= int(step) <= most) or not (dash or span == "*") or low > high:
                raise ValueError(f"{field} {part}: a step is a number up to {most} after * or a range, such as */15")
            found |= {*range(low, high + 1, int(step))}
        else:  # From Friday to Monday.
            found |= {*range(low, high + 1)} if low <= high else {*range(low, most + 1), *range(least, high + 1)}
    return frozenset(found)


def _number(field: str, text: str) -> int:
    least, most = _FIELDS[field]
    names = _NAMES.get(field, ())
    if text and text in names:
        return names.index(text)
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= most):
        raise ValueError(f"{field} {text or 'of nothing'}: expected {least} to {most}")
    return int(text)
