from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from cv_platform.config import ValidateConfig
from cv_platform.datasets.near_copies import thumbnail
from cv_platform.datasets.splits import SPLITS
from cv_platform.validation.checks import Subject, all_checks
from cv_platform_tests.unit.datasets.test_near_copies import jpeg, scene
from cv_platform_tests.unit.validation.conftest import subject

BETWEEN = [name for name in all_checks() if name.startswith("near_copies_")]


@pytest.fixture
def leaky(tmp_path: Path) -> Subject:
    """Twenty scenes a split; test and reference have a copy of an image of train, and valid has one byte for byte."""
    images = {f"{split}/{at}.png": scene(20 * number + at) for number, split in enumerate(SPLITS) for at in range(20)}
    images["test/copy.png"] = jpeg(images["train/3.png"])
    images["reference/copy.png"] = np.ascontiguousarray(images["train/4.png"][:, ::-1])
    images["valid/same.png"] = images["train/5.png"]
    images["test/same.png"] = images["train/6.png"]
    for path, image in images.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / path), image)
    labels = [["dog"] if "copy" in path else ["cat"] for path in images]
    manifest = pd.DataFrame({"path": list(images), "split": [path.split("/")[0] for path in images], "labels": labels})
    manifest["unknown_labels"] = [[] for _ in images]
    manifest["sha256"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in images.values()]
    thumbnails = np.stack([thumbnail(image) for image in images.values()])
    return subject(manifest, root=tmp_path, directory=tmp_path, thumbnails=thumbnails, class_names=("cat", "dog"))


def test_each_pair_of_splits_has_its_check() -> None:
    assert len(BETWEEN) == 6


def test_copies_are_named_by_the_pair_of_splits_that_has_them(leaky: Subject) -> None:
    found = {name: all_checks()[name].run(leaky) for name in BETWEEN}
    named = {name: [offender.rpartition(" (")[0] for offender in outcome.offenders] for name, outcome in found.items()}
    assert named == {
        "near_copies_train_test": ["test/copy.png ~ train/3.png"],
        "near_copies_train_valid": ["valid/same.png ~ train/5.png"],
        "near_copies_train_reference": ["reference/copy.png ~ train/4.png"],
        "near_copies_valid_test": [],
        "near_copies_valid_reference": [],
        "near_copies_test_reference": [],
    }, "identical images of train and test are what train_test_leakage names"
    assert found["near_copies_train_test"].value == pytest.approx(1 / 22)
    assert not found["near_copies_train_test"].passed
    assert found["near_copies_valid_test"].passed
    pictures = {path.name for path in leaky.directory.glob("*.png")}
    assert pictures == {f"{name}.png" for name in BETWEEN if named[name]}


def test_a_copy_with_another_label_is_a_conflict(leaky: Subject) -> None:
    outcome = all_checks()["conflicting_near_copies"].run(leaky)
    assert sorted(outcome.offenders) == [
        "train/3.png (cat) ~ test/copy.png (dog)",
        "train/4.png (cat) ~ reference/copy.png (dog)",
    ]
    assert outcome.value == pytest.approx(4 / 84)
    assert not outcome.passed


def test_without_images_of_a_split_its_pairs_are_not_judged(leaky: Subject) -> None:
    manifest = leaky.manifest.loc[leaky.manifest["split"] == "train"].reset_index(drop=True)
    alone = subject(manifest, ValidateConfig(), thumbnails=leaky.thumbnails[: len(manifest)])
    assert all_checks()["near_copies_train_test"].run(alone).summary.startswith("Not judged: test has no images")
