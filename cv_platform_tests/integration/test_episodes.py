"""Alerts once an episode, and the level of a report, by the reports in a real PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine

from cv_platform.config import MonitorConfig
from cv_platform.monitoring.alarm_rate import alarm_level
from cv_platform.monitoring.episodes import what_changed
from cv_platform.monitoring.report import _write_row
from cv_platform.monitoring.service_alerts import stale_reports
from cv_platform.records import DriftReport
from cv_platform_tests.support.drift_reports import make_report

START = datetime(2026, 2, 1, tzinfo=UTC)


def day(number: int, verdict: str, *detectors: str, **changes: object) -> DriftReport:
    return make_report(
        report_id=str(uuid4()),
        window_start_utc=START + timedelta(days=number),
        window_end_utc=START + timedelta(days=number + 1),
        verdict=verdict,
        drifted_detectors=detectors,
        report_url="file:///somewhere",
        **changes,
    )


def keep_and_ask(engine: Engine, *reports: DriftReport) -> list[str | None]:
    changes: list[str | None] = []
    for report in reports:
        _write_row(engine, report)
        changes.append(what_changed(engine, report))
    return changes


def test_an_episode_is_told_when_it_begins_changes_and_ends(engine: Engine) -> None:
    told = keep_and_ask(
        engine,
        day(0, "no drift"),
        day(1, "drift", "bbsd_ks"),
        day(2, "drift", "bbsd_ks"),
        day(3, "insufficient data"),
        day(4, "drift", "bbsd_ks"),
        day(5, "drift", "bbsd_ks", "uae_mmd"),
        day(6, "drift", "uae_mmd"),
        day(7, "no drift"),
        day(8, "no drift"),
        day(9, "drift", "uae_mmd"),
    )
    assert told == [None, "drift", None, None, None, "drift has changed", None, "drift is over", None, "drift"]


def test_the_first_report_may_begin_an_episode_and_a_retry_says_the_same(engine: Engine) -> None:
    first = day(0, "drift", "bbsd_ks")
    assert keep_and_ask(engine, first, first) == ["drift", "drift"]


@pytest.mark.parametrize(
    "other",
    [
        {"experiment": "another"},
        {"model": {"model_name": "digits_classifier", "version": "20260301T060000Z-1f3c9a2e"}},
    ],
)
def test_another_experiment_or_version_has_episodes_of_its_own(engine: Engine, other: dict[str, object]) -> None:
    assert keep_and_ask(engine, day(0, "drift", "bbsd_ks", **other), day(1, "drift", "bbsd_ks")) == ["drift", "drift"]


def test_a_later_window_that_was_judged_first_ends_nothing(engine: Engine) -> None:
    assert keep_and_ask(engine, day(5, "drift", "bbsd_ks"), day(1, "no drift")) == ["drift", None]


def level_of(engine: Engine, report: DriftReport, **settings: float) -> float:
    monitor = MonitorConfig.model_validate({"false_alarms_per_year": 365.25 / 100, **settings})
    return alarm_level(
        engine, monitor, experiment=report.experiment, report_id=report.report_id, window_end=report.window_end_utc
    )


def keep_judged(engine: Engine, *reports: DriftReport) -> list[float]:
    """Makes and keeps reports as the asset does, and returns their levels; a hundredth of an alarm grows each day."""
    levels: list[float] = []
    for report in reports:
        levels.append(level_of(engine, report))
        _write_row(engine, report.model_copy(update={"alpha": levels[-1]}))
    return levels


def test_reports_share_what_false_alarms_a_year_allows(engine: Engine) -> None:
    version = {"model_name": "digits_classifier", "version": "20260301T060000Z-1f3c9a2e"}
    days = [day(number, "no drift") for number in range(30)]
    levels = keep_judged(engine, *days, day(30, "no drift", model=version))
    assert levels[:3] == pytest.approx([0.05, 0.03, 0.02])  # Half of 0.1, of 0.05 + 0.01, of 0.03 + 0.01.
    assert levels[-2:] == pytest.approx([0.01, 0.01])  # A new version of the model brings nothing new.
    assert level_of(engine, day(31, "no drift", experiment="another")) == pytest.approx(0.05)


def test_a_report_made_again_has_its_level_though_others_came_after_it(engine: Engine) -> None:
    days = [day(number, "no drift") for number in range(5)]
    levels = keep_judged(engine, *days)
    assert [level_of(engine, report) for report in days] == pytest.approx(levels)
    assert level_of(engine, days[1], alpha=0.01) == pytest.approx(0.01)


def test_a_report_without_enough_requests_spends_nothing(engine: Engine) -> None:
    assert keep_judged(engine, day(0, "insufficient data"), day(1, "no drift"))[1] == pytest.approx(0.05)


def test_reports_that_have_ceased_are_told_and_those_that_never_began_are_not(engine: Engine) -> None:
    _write_row(engine, day(0, "no drift"))
    name = day(0, "no drift").experiment
    now = datetime.now(UTC)
    week, daily = {name: timedelta(days=7), "another": timedelta(days=7)}, {name: timedelta(days=1)}
    assert stale_reports(engine, week, now + timedelta(days=7)) == []
    assert stale_reports(engine, daily, now + timedelta(days=1)) == []
    assert stale_reports(engine, {name: timedelta(days=31)}, now + timedelta(days=31)) == []
    for periods, days in ((week, 9), (daily, 3), ({name: timedelta(days=31)}, 33)):
        (found,) = stale_reports(engine, periods, now + timedelta(days=days))
        assert (found.name, found.subject) == ("MonitoringStale", name)
        assert found.text.endswith(f"one was due by {now + timedelta(days=days - 2):%Y-%m-%d}.")
    assert stale_reports(engine, {"another": timedelta(days=1)}, now + timedelta(days=9)) == []
