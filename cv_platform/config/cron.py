"""When something runs by itself: cron expressions as Dagster takes them, of five fields, in UTC.

Also the nth (`1#2`) and the last (`L1`, in the other field of days `L`) of a month. What a range means that ends
before it begins, or there, is Dagster's reading. Hashed (`H`), which Dagster refuses, and random (`R`), by which each
of its processes would have another schedule, are none. https://docs.dagster.io/guides/automate/schedules
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta

ALIASES = {
    **dict.fromkeys(("@yearly", "@annually"), "0 0 1 1 *"),
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    **dict.fromkeys(("@daily", "@midnight"), "0 0 * * *"),
    "@hourly": "0 * * * *",
}
_FIELDS = {"minute": (0, 59), "hour": (0, 23), "day of the month": (1, 31), "month": (1, 12), "day of the week": (0, 6)}
_NAMES: dict[str, tuple[str, ...]] = {
    "month": ("", "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "day of the week": ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}
_OF_MONTH = re.compile(r"(\w+|[a-z]{3}-[a-z]{3})#(\d+)|l(\d+)")
_LAST = 0
"""In the place of a day of the month, or of which of its Mondays."""
_CYCLE = (date(2024, 1, 1), date(2052, 1, 1))
"""Dates fall on the same days of the week again after 28 years."""


@dataclass(frozen=True)
class Cron:
    """A cron expression that says something.

    Attributes:
        minutes: of the day on which it runs, ascending, 0 to 1439.
        months: 1 to 12.
        days: of the month, 1 to 31; 0: the last.
        weekdays: of the week, 0 (Sunday) to 6, each with which one of its month, 1 to 5; 0: the last.
        either: both days are named: either will do.
    """

    minutes: tuple[int, ...]
    months: frozenset[int]
    days: frozenset[int]
    weekdays: frozenset[tuple[int, int]]
    either: bool

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Reads an expression: numbers, names, `*`, lists, ranges, steps, `?`, `L`, `#`, or one of `ALIASES`.

        Raises:
            ValueError: Dagster takes no such expression, or never finds a date; the message says what was expected.
        """
        fields = ALIASES.get(text.strip().lower(), text).lower().split()
        try:
            if len(fields) != len(_FIELDS):
                raise ValueError(f"it has {len(fields)}")
            minutes, hours, days, months = map(_numbers, _FIELDS, fields[:4])
            weekdays, is_of_month = _weekdays(fields[4])
            # As Dagster reads it: all days, too, are none in particular beside */2.
            any_day, any_weekday = (
                own == "?" or "*" in own.split(",") or (len(found) == count and "*" in other)
                for own, found, count, other in (
                    (fields[2], days, 31, fields[4]),
                    (fields[4], {day for day, _ in weekdays}, 7, fields[2]),
                )
            )
            minutes_of_day = tuple(sorted(60 * hour + minute for hour in hours for minute in minutes))
            both = cls(minutes_of_day, months, days, weekdays, either=False)
            if not any(map(both.runs_on, _days())):  # Dagster looks for such a date, and ends without.
                raise ValueError("none of its months has such a day")
        except ValueError as err:
            raise ValueError(
                "expected five fields of cron (minute, hour, day of the month, month, day of the week), such as "
                f'"0 6 * * 1" for Mondays at six, or one of {", ".join(ALIASES)}. Received: "{text}": {err}.'
            ) from err
        if any_day or any_weekday:
            return both
        # Beside the second Monday, say, Dagster finds no other day.
        return replace(both, days=_numbers("day of the month", "*")) if is_of_month else replace(both, either=True)

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
        is_last, is_last_week = ((day + timedelta(days=ahead)).month != day.month for ahead in (1, 7))
        weekday, nth = day.isoweekday() % 7, (day.day + 6) // 7
        by_date = day.day in self.days or (is_last and _LAST in self.days)
        by_week = (weekday, nth) in self.weekdays or (is_last_week and (weekday, _LAST) in self.weekdays)
        return day.month in self.months and (by_date or by_week if self.either else by_date and by_week)


def _days() -> Iterator[date]:
    return (_CYCLE[0] + timedelta(days=number) for number in range((_CYCLE[1] - _CYCLE[0]).days))


def _weekdays(text: str) -> tuple[frozenset[tuple[int, int]], bool]:
    """Returns what `Cron.weekdays` holds, and whether it names which ones of a month."""
    field, plain = "day of the week", list[str]()
    found = set[tuple[int, int]]()
    for part in text.split(","):
        if not (named := _OF_MONTH.fullmatch(part)):
            plain.append(part)
            continue
        days, nth, last = named.groups()
        if nth and not 1 <= int(nth) <= 5:
            raise ValueError(f"{field} {part}: a month has five of them at most")
        found |= {(day, int(nth) if nth else _LAST) for day in _numbers(field, days or last)}
    if not found:
        return frozenset(itertools.product(_numbers(field, text), range(1, 6))), False
    days, plain = {day for day, _ in found}, [part for part in plain if part != "*"]
    others = _numbers(field, ",".join(plain)) if plain else frozenset[int]()
    if not others <= days and len(others | days) < 7:
        raise ValueError(f"{field} {text}: all of them say which one of the month, or none")
    return frozenset(found), True


def _numbers(field: str, text: str) -> frozenset[int]:
    """Returns what a field names, see `Cron`."""
    if text == "?" and field.startswith("day"):
        text = "*"
    found = set[int]()
    for part in text.split(","):
        if part == "l" and field == "day of the month":
            found.add(_LAST)
        elif part != "*" and not re.search("[-/]", part):
            found.add(_number(field, part))
        else:
            found |= {*_span(field, part)}
    return frozenset(found)


def _span(field: str, part: str) -> Iterator[int]:
    """Yields the numbers of `*`, a range, or either with a step; also of `5/15`: from 5 on."""
    least, most = _FIELDS[field]
    span, slash, step = part.partition("/")
    first, dash, last = span.partition("-")
    if slash and not (step.isdecimal() and int(step)):
        raise ValueError(f"{field} {part}: a step is a number, such as */15")
    every = int(step) if slash else 1
    if span == "*":
        yield from range(least, most + 1, every)
        return
    low = _number(field, first, least=0)
    to_most = not dash or (last == "l" and field == "day of the month")
    high = most if to_most else _number(field, last, least=0)
    if low == high:  # From Sunday to Sunday: each day.
        low, high = least, most
    if low < least:
        raise ValueError(f"{field} {part}: expected {least} to {most}")
    if low < high:
        yield from range(low, high + 1, every)
        return
    to_end = range(low, most + 1, every)  # From Friday to Monday.
    yield from to_end
    # Dagster's own: it goes on from the least where the next step just reaches it.
    left = most - to_end[-1]
    skipped = every - left if to_end[-1] - least + every > most - least + 1 and left < every else 0
    yield from range(least + skipped, high + 1, every)


def _number(field: str, text: str, *, least: int | None = None) -> int:
    own, most = _FIELDS[field]
    names = _NAMES.get(field, ())
    if text and text in names:
        return names.index(text)
    if text.isdecimal() and field == "day of the week" and int(text) == 7:
        return 0
    if not (text.isdecimal() and (own if least is None else least) <= int(text) <= most):
        most = 7 if field == "day of the week" else most
        raise ValueError(f"{field} {text or 'of nothing'}: expected {own} to {most}")
    return int(text)
