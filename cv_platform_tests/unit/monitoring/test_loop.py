"""What the loop does next, by facts that are made up; no database, no Dagster."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cv_platform.config import LoopConfig
from cv_platform.monitoring.episodes import OpenEpisode
from cv_platform.monitoring.loop import Decision, LoopFacts, decide
from cv_platform.records import LabelledVersion

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DRIFT = OpenEpisode("an-id", NOW - timedelta(hours=1), "file:///report")
LOOP = LoopConfig(enabled=True, min_new_labels=200, min_new_labels_in_drift=50, cool_down_hours=24, max_runs_per_week=2)
TRAINED = LoopFacts(NOW, target="v1", target_key="a", is_trained=True)


def attempt(**changes: Any) -> LabelledVersion:
    made = {"base": "v1", "tag": "v1-grown-0000aaaa", "dvc_md5": "b", "statements": 9, "looked_at": 9}
    return LabelledVersion(**{**made, "made_utc": NOW - timedelta(hours=30), **changes})


def after(facts: LoopFacts, **loop: Any) -> tuple[str, str]:
    decision: Decision = decide(facts, LOOP.model_copy(update=loop))
    return decision.action, decision.step


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("wait", "idle")),
        ({"labels": 199}, ("wait", "idle")),
        ({"labels": 200}, ("grow", "growing")),
        ({"labels": 49, "episode": DRIFT}, ("wait", "collecting labels")),
        ({"labels": 50, "episode": DRIFT}, ("grow", "growing")),
        ({"labels": 50, "episode": DRIFT, "unfinished": "digits_retrain, run 1,"}, ("wait", "at work")),
        # New images that somebody has imported, or another recipe.
        ({"episode": DRIFT, "is_trained": False}, ("retrain", "retraining")),
        ({"is_trained": False}, ("wait", "idle")),
    ],
)
def test_drift_or_enough_labels_begin_it(changes: dict[str, Any], expected: tuple[str, str]) -> None:
    assert after(replace(TRAINED, **changes)) == expected


def test_a_grown_version_is_trained_on_once() -> None:
    grown = replace(TRAINED, attempt=attempt(), target="v1-grown-0000aaaa", target_key="b", is_trained=False)
    assert after(grown) == ("retrain", "retraining")
    assert after(replace(grown, is_trained=True)) == ("wait", "idle")
    failed = replace(grown, episode=DRIFT, tried="run 12 on v1-grown-0000aaaa ended as FAILURE")
    assert after(failed) == ("wait", "collecting labels")
    for still in (failed, replace(failed, episode=None)):
        assert "its run 12 on v1-grown-0000aaaa ended as FAILURE" in decide(still, LOOP).reason
    assert after(replace(failed, labels=50)) == ("grow", "growing")


def test_it_keeps_to_its_budget() -> None:
    drifting = replace(TRAINED, labels=60, episode=DRIFT)
    hours = [timedelta(hours=number) for number in (23, 25, 160)]
    assert after(replace(drifting, trainings=(NOW - hours[0],))) == ("wait", "resting")
    assert after(replace(drifting, trainings=(NOW - hours[1],))) == ("grow", "growing")
    full = replace(drifting, trainings=(NOW - hours[1], NOW - hours[2]))
    assert after(full) == ("wait", "resting")
    assert "until 2026-03-01 20:00 UTC it rests, 0 of 2 trainings" in decide(full, LOOP).reason
    assert after(full, max_runs_per_week=3) == ("grow", "growing")


def test_refused_labels_stop_it_until_they_or_the_rules_have_changed() -> None:
    refused = attempt(refused="labels of mallory contradict the images", suspects=("mallory",), statements=0)
    stopped = replace(TRAINED, labels=80, fresh_labels=10, episode=DRIFT, attempt=refused)
    assert after(stopped) == ("wait", "stopped")
    assert "mallory contradict" in decide(stopped, LOOP).reason
    assert after(stopped, without=("mallory",)) == ("grow", "growing")
    assert after(replace(stopped, fresh_labels=50)) == ("grow", "growing")
    soon = replace(stopped, fresh_labels=50, attempt=refused.model_copy(update={"made_utc": NOW - timedelta(hours=2)}))
    assert after(soon) == ("wait", "stopped")
