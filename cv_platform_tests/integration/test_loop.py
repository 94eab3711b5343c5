"""The loop on a real log, dataset and instance: labels become a version or are refused, and the sensor asks once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy import Engine

from cv_platform.audit import AuditLog
from cv_platform.config import CanaryConfig, ExperimentConfig
from cv_platform.datasets.repository import list_tag_names
from cv_platform.defs.automation import experiment_jobs
from cv_platform.defs.branch import Branch
from cv_platform.defs.loop import loop_key, loop_sensor
from cv_platform.monitoring.loop import grow_by_labels
from cv_platform.probation import ArmTally, Probation, Tally, WorkerTally
from cv_platform.record_store import RecordStore
from cv_platform.records import LabelledVersion
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.labelled_log import CLASSES, answer, drawing, experiment, home, label, origin, say

__all__ = ["home", "origin"]
NOW = datetime(2026, 3, 2, tzinfo=UTC)


def looping(**loop: Any) -> ExperimentConfig:
    rules = {"enabled": True, "min_new_labels": 8, "cool_down_hours": 0.0, **loop}
    return experiment().model_copy(update={"loop": experiment().loop.model_copy(update=rules)})


@pytest.fixture
def instance(
    home: Path, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dg.DagsterInstance]:
    monkeypatch.setenv("CV_HOME", str(home))
    monkeypatch.setenv("DATABASE_URL", database_url)
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        yield instance


@dg.job
def _nothing() -> None:
    pass


def tick(instance: dg.DagsterInstance, config: ExperimentConfig, cursor: str | None = None) -> Any:
    """Evaluates the sensor once, and keeps its runs as Dagster's daemon does: once a run key."""
    branch = Branch(config)
    sensor = loop_sensor(branch, experiment_jobs(branch))
    with dg.build_sensor_context(instance=instance, cursor=cursor) as context:
        said = sensor.evaluate_tick(context)
    for request in said.run_requests or []:
        key = {"dagster/run_key": request.run_key or ""}
        if not instance.get_runs(dg.RunsFilter(tags=key)):
            run = instance.create_run_for_job(_nothing, tags={**request.tags, **key})
            instance.report_run_canceled(run)  # An end: what is at work holds everything.
    return said


def grow(config: ExperimentConfig, engine: Engine, home: Path) -> LabelledVersion:
    """Does what the asset does."""
    made = grow_by_labels(config, engine, home=home, now=datetime.now(UTC), spare_bytes=0)
    RecordStore(home, config.name).write("labelled_version", made, run_id=f"run-{datetime.now(UTC).isoformat()}")
    return made


def test_labels_become_a_version_and_the_version_a_training_each_once(
    engine: Engine, home: Path, instance: dg.DagsterInstance
) -> None:
    config = looping()
    idle = tick(instance, config)
    assert not idle.run_requests
    assert "no drift lasts, and there are 0 of 8 new labels" in idle.skip_message
    label(engine, ["cat", "dog"] * 4)
    off = tick(instance, looping(enabled=False))
    assert not off.run_requests
    assert off.skip_message.startswith("Off (loop.enabled). It would be growing: ")

    dry = grow_by_labels(looping(enabled=False), engine, home=home, now=NOW, spare_bytes=0)
    assert (dry.tag, list_tag_names(home / "datasets/pets")) == ("v1", ["v1"])
    assert dry.summary[0] == "loop.enabled is false: nothing was stored. It would be:"

    first = tick(instance, config, idle.cursor)
    (request,) = first.run_requests
    assert request.job_name == "pets_grow"
    (event,) = first.asset_events
    assert event.asset_key == loop_key("pets")
    assert "| **step** | growing |" in event.metadata["page"].value
    made = grow(config, engine, home)
    assert made.tag.startswith("v1-grown-")
    (training,) = tick(instance, config).run_requests
    assert training.job_name == "pets_retrain"
    assert training.run_config["resources"]["pets_config"]["config"] == {"dataset": {"dvc_tag": made.tag}}
    after = tick(instance, config)
    assert not after.run_requests, "the same data and recipe are not trained on again, also where the run has failed"
    told = [(entry.subject, entry.by) for entry in AuditLog(Settings.from_environment().storage_url).entries()]
    assert told == [("pets: grow v1", "the loop"), (f"pets: retrain {made.tag}", "the loop")]


def test_poisoned_labels_stop_it_without_a_crash_until_there_are_others_or_other_rules(
    engine: Engine, home: Path, instance: dg.DagsterInstance
) -> None:
    config = looping()
    for seed in range(200, 220):
        kind = CLASSES[seed % 2]
        said = kind if seed % 5 < 3 else CLASSES[1 - seed % 2]
        say(engine, answer(engine, drawing(kind, seed)), said, "labeller:mallory")
    assert len(tick(instance, config).run_requests) == 1
    refused = grow(config, engine, home)
    assert (refused.tag, refused.suspects) == ("v1", ("labeller:mallory",))
    assert "labels contradict the other images" in refused.refused
    assert list_tag_names(home / "datasets/pets") == ["v1"]
    stopped = tick(instance, config)
    assert not stopped.run_requests
    assert stopped.skip_message.startswith("stopped: the labels were refused. Expected labels that fit")
    label(engine, ["cat", "dog"] * 4)  # Enough others: it looks again, and mallory's are as they were.
    assert len(tick(instance, config).run_requests) == 1

    without = looping(without=("labeller:mallory",))
    assert len(tick(instance, without).run_requests) == 1, "and by other rules at once"


def test_what_a_challenger_does_on_live_traffic_is_told_while_it_does(home: Path, instance: dg.DagsterInstance) -> None:
    config = looping()
    storage, service = CentralStorage(Settings.from_environment().storage_url), config.deploy.service
    probation = Probation(
        probation_id="0123456789abcdef",
        model_name=config.model.model_name,
        version="new",
        since_utc=NOW,
        **CanaryConfig(fraction=0.1).model_dump(),
    )
    pointer = ProductionPointer(
        model_name=config.model.model_name, version="old", since_utc=NOW, probation=probation, experiment=config.name
    )
    storage.write_pointer(service, pointer)

    def told(champion: int, challenger: int, cursor: str | None) -> tuple[str, str]:
        tally = Tally(champion=ArmTally(asked=champion, failed=1), challenger=ArmTally(asked=challenger, failed=3))
        storage.write_tally(service, "a", WorkerTally(probation_id=probation.probation_id, worker_id="a", tally=tally))
        said = tick(instance, config, cursor)
        return "".join(event.metadata["page"].value for event in said.asset_events), said.cursor

    page, cursor = told(90, 10, None)
    assert "| **on live traffic** | new since 2026-03-02 00:00 UTC, running |" in page
    assert "| challenger, canary | 7 | 30.0% (3) |" in page
    page, cursor = told(91, 10, cursor)
    assert page == "", "an answer more is no news"
    page, cursor = told(180, 20, cursor)
    assert "| challenger, canary | 17 | 15.0% (3) |" in page
    ended = probation.model_copy(update={"state": "returned", "reason": "It fails more often than the champion"})
    storage.write_pointer(service, pointer.model_copy(update={"probation": ended}))
    page, cursor = told(180, 20, cursor)
    assert "new since 2026-03-02 00:00 UTC, returned: It fails more often than the champion" in page
