"""One real, tiny, untrained classifier and a reference split for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cv_platform.config import ExperimentConfig, parse_experiment
from cv_platform.records import TrainedModel
from cv_platform_tests.support.record_samples import identity, trained_model
from cv_platform_tests.support.tiny_models import CLASS_NAMES, MODEL_NAME, build_classifier
from cv_platform_tests.support.tiny_split import VERSION


@pytest.fixture(scope="session")
def classifier_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classifier") / f"{MODEL_NAME}.keras"
    build_classifier(seed=1, sharpness=20.0).save(path)
    return path


@pytest.fixture
def trained(classifier_path: Path, tmp_path: Path) -> TrainedModel:
    """The classifier, in a folder of the test's own."""
    return trained_in(tmp_path / "trained", classifier_path)


def trained_in(folder: Path, classifier_path: Path) -> TrainedModel:
    folder.mkdir()
    shutil.copyfile(classifier_path, folder / classifier_path.name)
    return trained_model(folder, model=identity(version=VERSION))


@pytest.fixture(scope="session")
def config() -> ExperimentConfig:
    return parse_experiment(
        {
            "name": MODEL_NAME,
            "model": {
                "model_name": MODEL_NAME,
                "classes": CLASS_NAMES,
                "input_size": {"h": 16, "w": 16},
                "drift_detection": {"uae_encoding_dims": 6},
            },
            "dataset": {"ds_name": "animals", "dvc_tag": "v1.0.0"},
        },
        origin="test",
    )
