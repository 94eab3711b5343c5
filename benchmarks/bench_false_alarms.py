"""False alarms of drift in a year: simulated years of a service that nothing happens to, reports and their levels.

The rule of `monitoring.alarm_rate` beside one level for each report. Requests come by day and night, weekday and
weekend; a report is due each week, and whenever `monitor.new_rows_trigger` requests have come, on the last
`monitor.window_days`: windows overlap, and all are compared with one finite reference. Instead of images, as many
detectors as the default has see means of normal scores with just that dependence, as 2,000 years of images cannot be
judged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import Options
from cv_platform.config import MonitorConfig
from cv_platform.drift.family import DEFAULT_DETECTORS
from cv_platform.monitoring.alarm_rate import DAYS_PER_YEAR, Allowance

YEARS = 2_000
_TRAFFIC_YEARS = 10
"""Patterns of requests, each with 200 years of scores: the times of reports are the same in those."""
_REQUESTS_A_DAY = (100, 1_000, 20_000)
_REFERENCE_ROWS = 1_500
_SHIFT = 0.25
"""Standard deviations by which one detector's scores move in the second half of a year, for the delay."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counted:
    """Of simulated years: episodes of drift that began, and days from the shift to its first alarm."""

    alarms: Floats
    delay_days: Floats


def run(options: Options) -> Report:
    """Simulates quiet years for three amounts of traffic, and years with a shift in their middle."""
    clock, monitor = Stopwatch(), MonitorConfig()
    checks: list[Check] = []
    bound = monitor.false_alarms_per_year + 2 * monitor.alpha
    for requests in _REQUESTS_A_DAY:
        kept, fixed = (_years(requests, monitor, options.seed, is_spent=spent) for spent in (True, False))
        mean = float(kept.alarms.mean())
        error = float(kept.alarms.std() / np.sqrt(len(kept.alarms)))
        checks.append(
            Check(
                what=f"{requests} requests a day: false alarms in a year",
                expected=f"≤ {bound:g} (within 3 standard errors)",
                received=f"{mean:.3f} ± {error:.3f}",
                held=mean <= bound + 3 * error,
            )
        )
        options.say(f"  {requests} a day: {fixed.alarms.mean():.2f} with level {monitor.alpha} for each report")
        late, soon = (float(np.median(years.delay_days)) for years in (kept, fixed))
        checks.append(
            Check(
                what=f"{requests} requests a day: days to see a shift of {_SHIFT} SD, median",
                expected=f"≤ {soon + monitor.window_days:.1f} (with {monitor.alpha} each, and a window)",
                received=f"{late:.1f}",
                held=late <= soon + monitor.window_days,
            )
        )
    return Report(
        name="false_alarms",
        title=f"False alarms of drift in {YEARS} simulated years each, {len(DEFAULT_DETECTORS)} detectors, "
        "windows that overlap",
        unit="year",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(("numpy", "scipy")),
        settings={
            "false_alarms_per_year": monitor.false_alarms_per_year,
            "alpha": monitor.alpha,
            "window_days": monitor.window_days,
            "new_rows_trigger": monitor.new_rows_trigger,
            "reference_rows": _REFERENCE_ROWS,
        },
        observations={},
        ratios=[],
        checks=checks,
    )


def _years(requests_a_day: int, monitor: MonitorConfig, seed: int, *, is_spent: bool) -> Counted:
    rng = np.random.default_rng([seed, requests_a_day])
    counted = [_replicates(requests_a_day, monitor, rng, is_spent=is_spent) for _ in range(_TRAFFIC_YEARS)]
    return Counted(*(np.concatenate([getattr(one, name) for one in counted]) for name in ("alarms", "delay_days")))


def _replicates(requests_a_day: int, monitor: MonitorConfig, rng: np.random.Generator, *, is_spent: bool) -> Counted:
    """Simulates years of one pattern of requests; a second pass over the same scores has the shift in its middle."""
    ends, arrived = _reports(requests_a_day, monitor, rng)
    starts = np.searchsorted(ends, ends - monitor.window_days, side="right")
    sums = _sums(arrived, rng)
    allowance = Allowance(alpha=monitor.alpha, per_year=monitor.false_alarms_per_year)
    reference = rng.standard_normal(sums.shape[1:]) / np.sqrt(_REFERENCE_ROWS)
    total, before = np.concatenate([[0], arrived]), 0.0
    was = np.zeros((2, sums.shape[1]), dtype=np.bool_)
    alarms, delay = np.zeros(sums.shape[1]), np.full(sums.shape[1], np.nan)
    middle = DAYS_PER_YEAR / 2
    for i, end in enumerate(ends.tolist()):
        rows = int(total[i + 1] - total[starts[i]])
        if rows < monitor.min_samples:
            continue
        allowance.pass_days(end - before)
        level, before = (allowance.level if is_spent else monitor.alpha), end
        allowance.spend(level)
        judged = min(rows, monitor.max_samples)
        drawn = rng.standard_normal(sums.shape[1:]) * np.sqrt(1 / judged - 1 / rows)
        distance = (sums[i + 1] - sums[starts[i]]) / rows + drawn - reference
        scale = np.sqrt(1 / judged + 1 / _REFERENCE_ROWS)
        alarm = _holm_minimum(distance / scale) <= level
        alarms += alarm & ~was[0]
        was[0] = alarm
        if end > middle:
            # The part of the window that came after the shift has moved.
            after = float(total[i + 1] - max(total[starts[i]], np.interp(middle, [0.0, *ends], total)))
            moved = distance.copy()
            moved[:, 0] += _SHIFT * after / rows
            is_first = (_holm_minimum(moved / scale) <= level) & np.isnan(delay)
            delay[is_first] = end - middle
    return Counted(alarms, np.nan_to_num(delay, nan=middle))


def _reports(requests_a_day: int, monitor: MonitorConfig, rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64]]:
    """Returns when reports are made, in days, and how many requests had come by then."""
    hours = np.arange(int(DAYS_PER_YEAR * 24))
    rhythm = (1.0 + 0.9 * np.sin(2 * np.pi * hours / 24)) * np.where(hours // 24 % 7 < 5, 1.0, 0.3)
    come = np.cumsum(rng.poisson(requests_a_day / 24 * rhythm / rhythm.mean()))
    by_number = np.unique(
        np.searchsorted(come, np.arange(monitor.new_rows_trigger, come[-1], monitor.new_rows_trigger))
    )
    weekly = np.arange(7 * 24 - 1, len(hours), 7 * 24)
    due = np.union1d(by_number, weekly)
    return (due + 1) / 24.0, come[due]


def _sums(arrived: NDArray[np.int64], rng: np.random.Generator) -> Floats:
    """Returns `(reports + 1, years, detectors)`: the scores of all requests up to each report, added up."""
    spread = np.sqrt(np.diff(arrived, prepend=0).astype(np.float64))[:, None, None]
    steps = spread * rng.standard_normal((len(arrived), YEARS // _TRAFFIC_YEARS, len(DEFAULT_DETECTORS)))
    return np.concatenate([np.zeros((1, *steps.shape[1:])), np.cumsum(steps, axis=0)])


def _holm_minimum(z: Floats) -> Floats:
    """Returns the smallest p-value after Holm's correction, of each year's detectors."""
    smallest = np.asarray(2 * stats.norm.sf(np.abs(z).max(axis=1)), dtype=np.float64)
    return smallest * len(DEFAULT_DETECTORS)
