"""What the loop does next, by facts that are made up; no database, no Dagster."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cv_platform.config import CanaryConfig, LoopConfig
from cv_platform.monitoring.episodes import OpenEpisode
from cv_platform.monitoring.loop import Decision, LoopFacts, decide, loop_page
from cv_platform.probation import ArmTally, Probation, ShadowTally, Tally, WorkerTally
from cv_platform.records import LabelledVersion
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.production import SERVICE
from cv_platform_tests.support.tiny_training import experiment

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


def test_it_says_where_more_labels_were_given_than_it_has_counted() -> None:
    many = replace(TRAINED, labels=1400, has_more_labels=True)
    assert decide(many, LOOP).reason == "1400 or more of 200 new labels: the dataset grows by them"
    assert decide(replace(many, has_more_labels=False), LOOP).reason.startswith("1400 of 200 new labels")


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


def test_its_page_shows_challenger_and_champion_on_live_traffic(tmp_path: Path) -> None:
    storage = CentralStorage(tmp_path)
    probation = Probation(
        probation_id="0123456789abcdef",
        model_name="digits",
        version="new",
        is_shadow=True,
        since_utc=NOW - timedelta(hours=1),
        **CanaryConfig(fraction=0.1).model_dump(),
    )
    pointer = ProductionPointer(model_name="digits", version="old", since_utc=NOW, probation=probation)
    storage.write_pointer(SERVICE, pointer)
    tallies = [
        Tally(
            champion=ArmTally(asked=90, failed=1, unknown=4, timed=80, slow=8, seconds=1.78),
            challenger=ArmTally(asked=10, unknown=1, timed=8, slow=2, seconds=0.5),
            shadow=ShadowTally(
                asked=30, failed=2, dropped=60, agreed=20, unknown_both=1, unknown_challenger=2, seconds=1.5
            ),
        ),
        Tally(champion=ArmTally(asked=10, seconds=0.2), shadow=ShadowTally(asked=2, agreed=1, unknown_champion=1)),
    ]
    for name, tally in zip("ab", tallies, strict=True):
        told = WorkerTally(probation_id=probation.probation_id, worker_id=name, tally=tally)
        storage.write_tally(SERVICE, name, told)
    counted = storage.read_probation(SERVICE)
    assert counted is not None
    facts = replace(TRAINED, probation=counted)
    page = loop_page(facts, decide(facts, LOOP), experiment())
    assert "| **on live traffic** | new since 2026-03-01 11:00 UTC, running |" in page
    assert page.splitlines()[-5:] == [
        "|---" * 9 + "|",
        "| champion | 99 | 1.0% (1) | 4.0% (4) | 20.0 | 8 of 80 |  |  |  |",
        "| challenger, canary | 10 | 0.0% (0) | 10.0% (1) | 50.0 | 2 of 8 |  |  |  |",
        "| challenger, shadow | 30 | 6.2% (2) | 10.0% (3) | 50.0 |  | 70.0% (21) | 9 | 60 |",
        "| champion, on the shadow's images |  |  | 6.7% (2) |  |  |  |  |  |",
    ]
    # A few answers more are no news for Dagster's timeline, a tenth more are, and the end is.
    more = [
        counted.model_copy(update={"tally": counted.tally + Tally(champion=ArmTally(asked=many))}) for many in (1, 20)
    ]
    ended = counted.model_copy(update={"state": "returned", "reason": "It is slower"})
    heard = [replace(facts, probation=one).progress for one in (*more, ended)]
    assert [told == facts.progress for told in heard] == [True, False, False]
