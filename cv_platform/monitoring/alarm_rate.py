"""How often drift is raised by mistake in a year, however many reports there are: the level of each report.

An experiment has an allowance of false alarms that grows by `monitor.false_alarms_per_year`. A report may spend half of
what there is, `monitor.alpha` at most, and its test has that level. A test of level a raises a false alarm with
probability at most a, whatever the reports before it have in common with it, as long as a depends on the times of the
reports alone: so the expected number of false alarms is at most the sum of the levels, which the allowance bounds. It
is alpha-spending in continuous time; of overlapping windows, those that the sensor asks for among them, no more is
needed than each report's own validity.

Source: Lan & DeMets 1983, "Discrete Sequential Boundaries for Clinical Trials", Biometrika 70(3).
"""

from __future__ import annotations

from datetime import datetime
from typing import cast
from uuid import UUID

from sqlalchemy import Engine, Float, select

from cv_platform.config import MonitorConfig
from cv_platform.database.schema import drift_reports

DAYS_PER_YEAR = 365.25
_SHARE = 0.5
_FORGOTTEN_AFTER = 100
"""Reports: each halves what an unknown allowance before them may still matter, to 1e-30 after so many."""


class Allowance:
    """The false alarms that may still be raised: full at first, and never more than two reports of level alpha.

    Over any time, the levels spent sum up to the yearly rate for that time, and twice alpha at most.

    Args:
        alpha: the largest level of a report, between 0 and 1.
        per_year: expected false alarms in a year at most, above 0.
    """

    def __init__(self, *, alpha: float, per_year: float) -> None:
        self._most, self._per_day = alpha / _SHARE, per_year / DAYS_PER_YEAR
        self.left = self._most

    def pass_days(self, days: float) -> None:
        """Lets it grow; `days` may be a fraction, and nothing grows back in time."""
        self.left = min(self._most, self.left + max(days, 0.0) * self._per_day)

    def spend(self, level: float) -> None:
        """Takes a report's level away; what was spent in excess by other settings is forgiven."""
        self.left = max(0.0, self.left - level)

    @property
    def level(self) -> float:
        """What the next report may spend: at most alpha, and above 0 after any time."""
        return _SHARE * self.left


def alarm_level(
    engine: Engine, monitor: MonitorConfig, *, experiment: str, report_id: str, window_end: datetime
) -> float:
    """Returns the level of a report's test, from the reports of the experiment whose windows ended before.

    Of whatever model version they are: a new version brings no new allowance. A report of the same window made again
    has the level that it had.

    Args:
        engine: of the request log, where the reports are.
        monitor: `alpha` and `false_alarms_per_year`.
        experiment: whose reports.
        report_id: of the report to come.
        window_end: end of its window, with its zone.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    table = drift_reports.c
    spent = table.details["alpha"].astext.cast(Float)
    judged = (table.experiment == experiment) & (table.verdict != "insufficient data")
    this_one = table.report_id == UUID(report_id)
    before = (
        select(table.window_end_utc, spent)
        .where(judged & ~this_one & (table.window_end_utc <= window_end))
        .order_by(table.window_end_utc.desc(), table.created_on.desc())
        .limit(_FORGOTTEN_AFTER)
    )
    with engine.connect() as connection:
        own = connection.execute(select(spent).where(judged & this_one)).scalar_one_or_none()
        earlier = [(cast("datetime", end), cast("float", level)) for end, level in connection.execute(before)][::-1]
    if own is not None:
        return min(float(own), monitor.alpha)
    allowance = Allowance(alpha=monitor.alpha, per_year=monitor.false_alarms_per_year)
    for (end, level), next_end in zip(earlier, [*(end for end, _ in earlier), window_end][1:], strict=True):
        allowance.spend(level)
        allowance.pass_days((next_end - end).total_seconds() / 86_400)
    # A report of a window that ended at the same moment may have spent everything; no test has level 0.
    return max(allowance.level, 1e-9)
