"""Alerts once an episode, by the reports in a real PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine

from cv_platform.monitoring.episodes import what_changed
from cv_platform.monitoring.report import _write_row
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
