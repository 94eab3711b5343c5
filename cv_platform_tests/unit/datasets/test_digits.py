from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from cv_platform.config import load_experiment
from cv_platform.datasets.digits import grey_png, make_digits_repository
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.repository import list_versions
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import DatasetNotFoundError
from cv_platform.images import decode

from .conftest import dataset

# Both workers would make the repository for themselves otherwise.
pytestmark = pytest.mark.xdist_group("digits")

V1_MD5, V2_MD5 = "72e131e0cd93ceeb743a1f9fa75849e9", "d102f5a14d1bcb7b01dc70d252fdc9a6"


def test_has_the_same_bytes_and_commits_everywhere(digits_home: Path) -> None:
    versions = list_versions(digits_home / "datasets" / "digits")
    assert {tag: version.dvc_md5 for tag, version in versions.items()} == {"v1.0.0": V1_MD5, "v2.0.0": V2_MD5}
    assert versions["v2.0.0"].commit == "e17027cbd15fc46fba816b574e4a4d9276819cc5"


def test_repository_is_clean_and_on_the_newest_version(digits_home: Path) -> None:
    repository = digits_home / "datasets" / "digits"
    status = subprocess.run(["git", "-C", repository, "status", "--porcelain"], capture_output=True, check=True)
    assert status.stdout == b""
    assert V2_MD5 in (repository / "images.dvc").read_text()


def test_given_splits_hold_every_digit_and_enough_images(digits_home: Path) -> None:
    model = load_experiment(Path("configs/digits.yaml")).model
    version = checkout_version(dataset("digits", "v2.0.0", source="digits"), model, home=digits_home)
    manifest = read_manifest(version.manifest_path)
    counts = manifest["split"].value_counts().to_dict()
    assert counts == {"train": 1018, "valid": 151, "test": 359, "reference": 269}
    assert set(manifest["split_origin"]) == {"given"}
    assert all(manifest["is_readable"])
    table = manifest.groupby(["split", manifest["labels"].str[0]]).size().unstack()
    assert table.shape == (4, 10)
    assert (table.loc["reference"] >= 25).all()


def test_images_are_those_of_scikit_learn(digits_home: Path) -> None:
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    model = load_experiment(Path("configs/digits.yaml")).model
    version = checkout_version(dataset("digits", "v1.0.0", source="digits"), model, home=digits_home)
    for index in (0, 1, 1796):
        data = (version.directory / f"images/{digits[index]}/{index:04d}.png").read_bytes()
        expected = np.floor(images[index].reshape(8, 8) * 255 / 16 + 0.5)
        np.testing.assert_array_equal(decode(data)[:, :, 0], expected)


def test_png_without_compression_decodes_to_the_same_pixels() -> None:
    image = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    np.testing.assert_array_equal(decode(grey_png(image)), np.repeat(image[:, :, None], 3, axis=2))


def test_concurrent_first_uses_and_leftovers_of_a_killed_one_give_one_repository(tmp_path: Path) -> None:
    killed = tmp_path / ".digits.partial-0badc0de"
    (killed / ".git").mkdir(parents=True)
    failures: list[BaseException] = []

    def make() -> None:
        try:
            make_digits_repository(tmp_path / "digits")
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(list_versions(tmp_path / "digits")) == ["v1.0.0", "v2.0.0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".digits.lock", "digits"]


def test_refuses_a_folder_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "mine.txt").write_text("keep")
    with pytest.raises(DatasetNotFoundError, match="Move it away"):
        make_digits_repository(tmp_path / "digits")
    assert (tmp_path / "digits" / "mine.txt").read_text() == "keep"
