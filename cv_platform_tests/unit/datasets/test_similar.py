from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cv_platform.config import EncoderConfig
from cv_platform.datasets.importing import import_dataset
from cv_platform.datasets.similar import find_similar
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import InvalidDatasetError, UnsupportedImageError
from cv_platform_tests.support.pictures import class_folders

from .conftest import dataset, model

ENCODER = EncoderConfig(input_px=64)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CV_HOME with ten pictures of noise, and a ball on each of ten others."""
    folder = tmp_path_factory.mktemp("similar")
    source = class_folders(folder / "source", 10)
    for at in range(10):
        cv2.imwrite(str(source / "dog" / f"{at}.png"), ball(at))
    import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=folder / "home/datasets")
    return folder / "home"


def ball(at: int) -> np.ndarray:
    picture = np.full((64, 64, 3), 200, np.uint8)
    cv2.circle(picture, (20 + 2 * at, 32), 14, (40, 40 + 15 * at, 220), -1, cv2.LINE_AA)
    return picture


def test_a_changed_copy_finds_its_original_first_and_others_of_its_kind_next(home: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "copy.jpg"), cv2.convertScaleAbs(ball(4), alpha=1.05), [cv2.IMWRITE_JPEG_QUALITY, 70])
    version = checkout_version(dataset(), model(), home=home)
    found = find_similar(tmp_path / "copy.jpg", version, ENCODER, home=home, count=5)
    assert found[0].path == "images/dog/4.png"
    assert {image.label for image in found} == {"dog"}
    assert [image.similarity for image in found] == sorted((image.similarity for image in found), reverse=True)
    assert 0.5 < found[0].similarity <= 1.0 + 1e-3


def test_an_image_of_the_dataset_is_its_own_nearest(home: Path) -> None:
    version = checkout_version(dataset(), model(), home=home)
    found = find_similar(version.directory / "images/cat/7.png", version, ENCODER, home=home, count=99)
    assert (found[0].path, len(found)) == ("images/cat/7.png", 20)
    assert found[0].similarity == pytest.approx(1.0, abs=2e-3)  # Vectors are kept in float16.


def test_what_is_no_image_is_refused(home: Path, tmp_path: Path) -> None:
    version = checkout_version(dataset(), model(), home=home)
    with pytest.raises(InvalidDatasetError, match=r"Expected an image at .*gone\.png. Received: No such file"):
        find_similar(tmp_path / "gone.png", version, ENCODER, home=home)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnsupportedImageError):
        find_similar(tmp_path / "text.png", version, ENCODER, home=home)
