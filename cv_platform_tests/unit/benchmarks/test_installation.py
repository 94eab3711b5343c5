from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.installation import isolated_environment, isolated_settings, quick_experiment, write_config
from cv_platform.config import load_experiment


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that names another installation."""
    for name, value in {
        "CV_HOME": "/elsewhere",
        "CV_STORAGE": "s3://production/storage",
        "CV_API_KEYS": "one-key,another-key",
        "CV_ADMIN_TOKEN": "token",
        "CV_SERVICE_WORKERS": "7",
        "DATABASE_URL": "postgresql://somebody:secret@production/request_log",
        "MLFLOW_TRACKING_URI": "http://production:5050",
        "EVIDENTLY_URL": "http://production:8000",
        "DAGSTER_HOME": "/elsewhere/dagster",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("foreign")
def test_measured_installation_shares_nothing_with_the_callers(tmp_path: Path) -> None:
    settings = isolated_settings(tmp_path / "home", tmp_path / "configs", service_workers=1)
    environment = isolated_environment(settings, database_url="postgresql://own@127.0.0.1:5/own")

    assert settings.database_url is None
    assert environment["DATABASE_URL"] == "postgresql://own@127.0.0.1:5/own"
    assert environment["CV_HOME"] == str(tmp_path / "home")
    assert environment["CV_STORAGE"] == str(tmp_path / "home" / "storage")
    assert environment["DAGSTER_HOME"] == str(tmp_path / "home" / "dagster")
    assert environment["CV_SERVICE_WORKERS"] == "1"
    assert environment["MLFLOW_TRACKING_URI"].startswith(f"sqlite:///{tmp_path}")
    assert not {"CV_API_KEYS", "CV_ADMIN_TOKEN", "EVIDENTLY_URL"} & set(environment)
    assert not [value for value in environment.values() if "production" in value]


def test_quick_experiment_has_the_originals_network_and_an_open_gate(tmp_path: Path) -> None:
    experiment = quick_experiment()
    assert experiment.model.architecture == "small_cnn"
    assert experiment.model.image_size == (50, 50)
    assert experiment.evaluate.min_accuracy == 0
    assert experiment.dataset.source == "digits"
    assert load_experiment(write_config(experiment, tmp_path / "configs")) == experiment


def test_quick_experiment_takes_another_network() -> None:
    experiment = quick_experiment("photos", model={"architecture": "resnet50", "input_size": {"h": 224, "w": 224}})
    assert experiment.model.architecture == "resnet50"
    assert experiment.model.image_size == (224, 224)
    assert experiment.model.model_name == "photos_classifier"
