"""Small real datasets: PNG files, git + DVC repositories and checkouts below temporary folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest

from cv_platform.config import DatasetConfig, ModelConfig
from cv_platform.datasets.digits import make_digits_repository


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """Returns a PNG of seeded noise, `size` = (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    encoded, png = cv2.imencode(".png", pixels)
    assert encoded
    return png.tobytes()


def write_pictures(root: Path, names: Iterable[str], *, first_seed: int = 0) -> Path:
    """Writes a different picture at each relative path."""
    for seed, name in enumerate(names, start=first_seed):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(seed))
    return root


def class_folders(root: Path, per_class: int = 10, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    return write_pictures(root, [f"{name}/{i}.png" for name in classes for i in range(per_class)])


def model(*classes: str, classifier_type: str = "multi-class", size: int = 8) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "model_name": "tiny",
            "classes": classes or ("cat", "dog"),
            "classifier_type": classifier_type,
            "input_size": {"h": size, "w": size},
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
