from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from cv_platform.validation.checks import Subject
from cv_platform.validation.checks.outliers import MAX_DEVIATION, MIN_IMAGES, Outliers, outlier_deviations
from cv_platform_tests.unit.validation.conftest import subject

CLASSES = ("bird", "cat", "dog")
STRANGERS = 6


def vectors_of(labels: list[list[str]], strangers: int, seed: int = 0) -> NDArray[np.float16]:
    """Returns `(N, 40)`: a cloud around each class, wide in some directions; the last are a cloud elsewhere."""
    generator = np.random.default_rng(seed)
    centres = {name: generator.normal(size=40) * 3 for name in CLASSES}
    clouds = np.stack([centres[names[0]] for names in labels])
    clouds += generator.normal(size=clouds.shape) * np.linspace(0.5, 3, 40)
    if strangers:
        clouds[-strangers:] = generator.normal(size=40) * 12 + generator.normal(size=(strangers, 40)) * 0.2
    return clouds.astype(np.float16)


def spoilt(folder: Path, strangers: int = STRANGERS, images: int = 300) -> Subject:
    """Writes a picture for each stranger, which carry the labels of classes as all others do."""
    labels = [[CLASSES[at % 3]] for at in range(images)]
    paths = [f"{at}.png" for at in range(images)]
    for path in paths[images - strangers :]:
        cv2.imwrite(str(folder / path), np.full((8, 8, 3), 99, np.uint8))
    manifest = pd.DataFrame({"path": paths, "labels": labels})
    return subject(manifest, root=folder, directory=folder, class_names=CLASSES, vectors=vectors_of(labels, strangers))


def test_names_what_is_far_from_every_class_though_it_is_alike_and_shows_it(tmp_path: Path) -> None:
    outcome = Outliers().run(spoilt(tmp_path))
    assert not outcome.passed
    assert {offender.split()[0] for offender in outcome.offenders} == {f"{at}.png" for at in range(294, 300)}
    assert outcome.value == pytest.approx(STRANGERS / 300)
    assert (tmp_path / "outliers.png").is_file()


def test_accuses_nobody_where_all_are_of_the_classes(tmp_path: Path) -> None:
    outcome = Outliers().run(spoilt(tmp_path, strangers=0))
    assert (outcome.passed, outcome.value, outcome.offenders) == (True, 0.0, ())
    assert not list(tmp_path.iterdir())


def test_a_small_class_is_no_outlier() -> None:
    labels = [["cat"]] * 200 + [["dog"]] * 5
    deviations = outlier_deviations(vectors_of(labels, 0), labels)
    assert (deviations < MAX_DEVIATION).all()


def test_several_labels_or_none_are_classes_of_their_own() -> None:
    labels = [["cat"]] * 80 + [["cat", "dog"]] * 80
    deviations = outlier_deviations(vectors_of(labels, 4), labels)
    assert set(np.argsort(-deviations)[:4].tolist()) == set(range(156, 160))


def test_does_not_judge_a_handful_of_images_and_bears_images_that_are_all_the_same(tmp_path: Path) -> None:
    assert Outliers().run(spoilt(tmp_path, 0, images=MIN_IMAGES - 1)).summary.startswith("Not judged: fewer than 50")
    same = outlier_deviations(np.ones((60, 8), np.float16), [["cat"]] * 60)
    assert np.abs(same).max() < MAX_DEVIATION
