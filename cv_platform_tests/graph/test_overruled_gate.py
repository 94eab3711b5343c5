"""A model that its gate refuses, a person who overrules it, and the run that follows: as Dagster runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cv_platform.audit import AuditLog
from cv_platform.cli import main
from cv_platform.config import load_experiment
from cv_platform.record_store import RecordStore
from cv_platform.records import Deployment, Evaluation, ModelBundle
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.demo_run import REPOSITORY

# Two runs of the graph, each in processes that load TensorFlow: minutes on a busy machine.
pytestmark = [pytest.mark.whole, pytest.mark.timeout(900)]


def test_a_refused_model_is_published_and_deployed_by_the_run_that_follows_an_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = load_experiment(REPOSITORY / "configs" / "digits.yaml").model_dump(mode="json", by_alias=True)
    digits["model"]["architecture"] = "small_cnn"
    digits["train"] |= {"epochs": 1, "optimizer": "adam", "init_lr": 0.001}
    digits["validate"] |= {"deepchecks_suites": "off", "label_issues": "off"}
    digits["evaluate"] |= {"min_accuracy": 1.0}
    config = tmp_path / "digits.yaml"
    config.write_text(yaml.safe_dump(digits))
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CV_CONFIGS", str(config))
    settings = Settings.from_environment()
    storage, records = CentralStorage(settings.storage_url), RecordStore(settings.home, "digits")

    assert main(["run", str(config)]) == 1
    assert "is below min_accuracy 1.0000" in "".join(capsys.readouterr())
    evaluation = records.latest(Evaluation)
    assert evaluation is not None
    assert not evaluation.passed
    assert records.latest(ModelBundle) is None
    assert storage.read_pointer(digits["deploy"]["service"]) is None

    version = evaluation.model.version
    assert main(["promote", version, "--because", "a demonstration on Tuesday"]) == 0
    bundle, deployment = records.latest(ModelBundle), records.latest(Deployment)
    assert bundle is not None
    assert deployment is not None
    assert bundle.model.version == deployment.model.version == version
    pointer = storage.read_pointer(deployment.service)
    assert pointer is not None
    assert (pointer.version, pointer.history[0].because) == (version, "a demonstration on Tuesday")
    assert "override" in {entry.action for entry in AuditLog(storage.url).entries()}
    # The verdict stays what it was: the override is beside it.
    again = records.latest(Evaluation)
    assert again == evaluation
