"""A run whose process is killed while it trains, and the same command again: as Dagster runs, with ids of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.graph import materialize
from cv_platform.record_store import RecordStore
from cv_platform.records import TrainedModel, ValidationVerdict
from cv_platform.settings import Settings
from cv_platform_tests.support.demo_run import REPOSITORY
from cv_platform_tests.support.tiny_training import experiment, pack_tiny
from cv_platform_tests.support.waiting import wait_until

EPOCHS = 20
# Two processes load TensorFlow, one after the other: minutes on a busy machine.
pytestmark = [pytest.mark.whole, pytest.mark.timeout(900)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An installation in which everything before the training is there."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(experiment(train__epochs=EPOCHS).model_dump(mode="json", by_alias=True)))
    settings = Settings.from_environment({"CV_HOME": str(tmp_path / "home"), "CV_CONFIGS": str(config)})
    prepare_home(settings)
    packed = pack_tiny(tmp_path)
    verdict = ValidationVerdict(
        dvc_md5=packed.provenance.dvc_md5,
        manifest="any",
        passed=True,
        outcomes=(),
        quarantined=(),
        directory=settings.home / "validation",
    )
    verdict.directory.mkdir()
    verdict.report_path.write_text("<p>good</p>")
    records = RecordStore(settings.home, "tiny")
    records.write("packed_images", packed, run_id="a-run")
    records.write("validation_report", verdict, run_id="a-run")
    return settings


def test_the_same_command_goes_on_after_the_last_whole_epoch(settings: Settings, tmp_path: Path) -> None:
    environment = platform_environment(settings)
    killed = tmp_path / "killed.log"
    with killed.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cv_platform.defs.materialize", "cv_platform.definitions", "key:tiny/model"],
            env=environment,
            cwd=REPOSITORY,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        models = settings.home / "models" / "tiny_model"
        wait_until(lambda: list(models.glob(".training-*/epoch-*.json")), seconds=300, process=process)
    finally:
        os.killpg(process.pid, 9)
        process.wait()

    said: list[str] = []
    log = tmp_path / "again.log"
    materialize("key:tiny/model", environment, log=log, say=said.append)

    (first,) = (int(line.rpartition(" ")[2]) for line in said if line.startswith("    going on after epoch "))
    assert 1 <= first < EPOCHS
    epochs = [int(number) for number in re.findall(rf"epoch (\d+)/{EPOCHS}: loss", log.read_text())]
    assert epochs == list(range(first + 1, EPOCHS + 1))
    trained = RecordStore(settings.home, "tiny").latest(TrainedModel)
    assert trained is not None
    assert trained.epochs_run == EPOCHS
    assert list(settings.home.glob("models/tiny_model/.training-*/*")) == []
