"""Small real datasets: PNG files, git + DVC repositories and checkouts below temporary folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.config import DatasetConfig, ModelConfig
from cv_platform.datasets.digits import make_digits_repository


def model(
    *classes: str, classifier_type: str = "multi-class", size: int = 8, sample_bits: int | None = None
) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "model_name": "tiny",
            "classes": classes or ("cat", "dog"),
            "classifier_type": classifier_type,
            "input_size": {"h": size, "w": size},
            "sample_bits": sample_bits,
        }
    )


def dataset(ds_name: str = "pets", tag: str = "v1.0.0", **fields: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"ds_name": ds_name, "dvc_tag": tag, **fields})


@pytest.fixture(scope="session")
def digits_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CV_HOME with the digits repository; tests must not change the repository."""
    home = tmp_path_factory.mktemp("digits-home")
    make_digits_repository(home / "datasets" / "digits")
    return home
