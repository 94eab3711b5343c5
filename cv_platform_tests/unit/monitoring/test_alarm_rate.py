from __future__ import annotations

import pytest

from cv_platform.monitoring.alarm_rate import DAYS_PER_YEAR, Allowance


@pytest.mark.parametrize("reports_a_day", [1 / 30, 1 / 7, 1, 50])
def test_levels_sum_up_to_the_yearly_rate_and_two_reports_of_alpha_however_many_reports_there_are(
    reports_a_day: float,
) -> None:
    allowance, spent = Allowance(alpha=0.05, per_year=1.0), 0.0
    reports = round(2 * DAYS_PER_YEAR * reports_a_day)
    for _ in range(reports):
        allowance.pass_days(1 / reports_a_day)
        level = allowance.level
        assert 0.0 < level <= 0.05 + 1e-12
        spent += level
        allowance.spend(level)
    assert spent <= 2.0 + 2 * 0.05 + 1e-9
    # Little of what is allowed is left unspent, unless even alpha each time is less.
    assert spent >= 0.95 * min(2.0, reports * 0.05)


def test_a_first_report_has_alpha_and_reports_of_one_moment_share_what_is_left() -> None:
    allowance, levels = Allowance(alpha=0.05, per_year=1.0), []
    for _ in range(3):
        levels.append(allowance.level)
        allowance.spend(levels[-1])
    assert levels == pytest.approx([0.05, 0.025, 0.0125])


def test_what_grows_in_a_long_silence_is_no_burst_of_alarms_after_it() -> None:
    allowance = Allowance(alpha=0.05, per_year=12.0)
    allowance.pass_days(5 * DAYS_PER_YEAR)
    assert allowance.level == pytest.approx(0.05)


def test_levels_of_other_settings_leave_no_debt() -> None:
    allowance = Allowance(alpha=0.05, per_year=1.0)
    for _ in range(20):
        allowance.spend(0.05)
    allowance.pass_days(DAYS_PER_YEAR / 50)
    assert allowance.level == pytest.approx(0.01)
