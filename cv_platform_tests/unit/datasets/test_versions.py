from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from cv_platform.datasets.importing import import_dataset
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.versions import DatasetVersion, checkout_version, list_tags
from cv_platform.errors import DatasetError, DatasetNotFoundError, InvalidDatasetError, UnknownDatasetVersionError
from cv_platform_tests.support.pictures import class_folders, picture, write_pictures

from .conftest import dataset, model


@pytest.fixture(scope="module")
def pets_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ds_root with `pets`, tags v1.0.0 (20 images) and v1.1.0 (24); tests copy it before changing it."""
    root = tmp_path_factory.mktemp("pets")
    for tag, per_class in (("v1.0.0", 10), ("v1.1.0", 12)):
        import_dataset(class_folders(root / f"source-{tag}", per_class), ds_name="pets", tag=tag, ds_root=root)
    return root


@pytest.fixture
def home(tmp_path: Path, pets_root: Path) -> Path:
    """A CV_HOME with its own copy of the repository."""
    (tmp_path / "home" / "datasets").mkdir(parents=True)
    subprocess.run(["cp", "-a", pets_root / "pets", tmp_path / "home" / "datasets"], check=True)
    return tmp_path / "home"


def inode(version: DatasetVersion) -> int:
    return version.directory.stat().st_ino


def test_lists_tags_with_their_data_versions(home: Path) -> None:
    tags = list_tags(dataset(), home=home)
    assert list(tags) == ["v1.0.0", "v1.1.0"]
    assert checkout_version(dataset(), model(), home=home).provenance.dvc_md5 == tags["v1.0.0"]
    text = (home / "datasets/pets/images.dvc").read_text()
    assert f"md5: {tags['v1.0.0']}.dir" in text


def test_unknown_tag_lists_the_tags(home: Path) -> None:
    with pytest.raises(UnknownDatasetVersionError, match=r"'v9'. Tags: v1\.0\.0, v1\.1\.0"):
        checkout_version(dataset(tag="v9"), model(), home=home)


def test_missing_repository_says_how_to_import(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="cv-platform import-dataset"):
        list_tags(dataset(), home=tmp_path)
    with pytest.raises(DatasetNotFoundError, match="made on first use"):
        list_tags(dataset("digits", source="digits"), home=tmp_path)


def test_folder_inside_another_repository_is_not_a_dataset(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "datasets" / "pets").mkdir(parents=True)
    with pytest.raises(DatasetNotFoundError, match=r"without \.git"):
        list_tags(dataset(), home=tmp_path)


def test_tag_without_a_dvc_file_is_named(home: Path) -> None:
    repository = home / "datasets" / "pets"
    tree = (
        subprocess.run(["git", "-C", repository, "mktree"], input=b"", capture_output=True, check=True)
        .stdout.decode()
        .strip()
    )
    commit = subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", repository, "commit-tree", tree, "-m", "empty"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout.strip()
    subprocess.run(["git", "-C", repository, "tag", "code-only", commit], check=True)
    with pytest.raises(InvalidDatasetError, match=r"tracking one folder"):
        checkout_version(dataset(tag="code-only"), model(), home=home)
    assert list(list_tags(dataset(), home=home)) == ["v1.0.0", "v1.1.0"]


def test_checkout_is_read_only_and_used_again(home: Path) -> None:
    first = checkout_version(dataset(), model(), home=home)
    assert first.directory == home / "worktrees" / "pets" / first.provenance.dvc_md5
    assert len(read_manifest(first.manifest_path)) == 20
    assert (first.directory / "images/cat/0.png").stat().st_mode & 0o222 == 0
    assert not (first.directory / ".dvc").exists()
    manifest_time = first.manifest_path.stat().st_mtime_ns
    again = checkout_version(dataset(), model(), home=home)
    assert again == first
    assert (inode(again), again.manifest_path.stat().st_mtime_ns) == (inode(first), manifest_time)
    shutil.rmtree(first.directory)  # Deleting CV_HOME resets an installation.


def test_checkout_leaves_the_users_repository_alone(home: Path) -> None:
    repository = home / "datasets" / "pets"
    (repository / "images").mkdir()
    (repository / "images" / "work in progress.png").write_bytes(b"mine")

    def state() -> list[tuple[str, int]]:
        return sorted((str(p), p.stat().st_mtime_ns) for p in repository.rglob("*") if ".dvc/cache" not in str(p))

    before = state()
    checkout_version(dataset(tag="v1.1.0"), model(), home=home)
    assert state() == before


def test_versions_have_checkouts_of_their_own(home: Path) -> None:
    versions = [checkout_version(dataset(tag=tag), model(), home=home) for tag in ("v1.0.0", "v1.1.0")]
    assert [len(read_manifest(version.manifest_path)) for version in versions] == [20, 24]


def test_configs_share_the_checkout_but_not_the_manifest(home: Path) -> None:
    one = checkout_version(dataset(), model(), home=home)
    two = checkout_version(dataset(split_seed=1), model(), home=home)
    assert one.directory == two.directory
    assert one.manifest_path != two.manifest_path
    splits = [read_manifest(version.manifest_path)["split"].tolist() for version in (one, two)]
    assert splits[0] != splits[1]


@pytest.mark.parametrize("damage", ["removed", "replaced", "added", "no marker", "broken marker"])
def test_changed_checkout_is_made_again(home: Path, damage: str) -> None:
    version = checkout_version(dataset(), model(), home=home)
    target = version.directory / "images/cat/3.png"
    good = target.read_bytes()
    if damage == "removed":
        target.unlink()
    elif damage == "replaced":
        target.unlink()
        target.write_bytes(bytes(len(good)))
    elif damage == "added":
        (version.directory / "images/cat/new.png").write_bytes(good)
    elif damage == "no marker":
        (version.directory / "checkout.json").unlink()
    else:
        (version.directory / "checkout.json").write_text("{")
    again = checkout_version(dataset(), model(), home=home)
    assert target.read_bytes() == good
    assert len(read_manifest(again.manifest_path)) == 20
    assert {path.name for path in (version.directory / "images/cat").iterdir()} == {f"{i}.png" for i in range(10)}


def test_leftovers_of_a_killed_checkout_are_cleared(home: Path) -> None:
    md5 = list_tags(dataset(), home=home)["v1.0.0"]
    killed = home / "worktrees" / "pets" / f".{md5}.partial-0badc0de"
    (killed / "images").mkdir(parents=True)
    version = checkout_version(dataset(), model(), home=home)
    assert not killed.exists()
    assert len(read_manifest(version.manifest_path)) == 20


def test_checkouts_of_earlier_releases_are_used_on(home: Path) -> None:
    first = checkout_version(dataset(), model(), home=home)
    images = first.directory / "images"
    folders = [images, *sorted(path for path in images.rglob("*") if path.is_dir())]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    lines = (
        f"{path.relative_to(images).as_posix()}\0{path.stat().st_size}\0{path.stat().st_mtime_ns}\n" for path in files
    )
    marker = json.loads((first.directory / "checkout.json").read_bytes())
    assert marker["listing"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert (marker["files"], marker["bytes"]) == (20, sum(path.stat().st_size for path in files))


def test_truncated_manifest_is_made_again(home: Path) -> None:
    version = checkout_version(dataset(), model(), home=home)
    version.manifest_path.write_bytes(version.manifest_path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="Materialise the dataset again"):
        read_manifest(version.manifest_path)
    assert len(read_manifest(checkout_version(dataset(), model(), home=home).manifest_path)) == 20


def test_concurrent_checkouts_share_the_work(home: Path) -> None:
    results: list[object] = []

    def check_out() -> None:
        try:
            results.append(checkout_version(dataset(), model(), home=home))
        except BaseException as err:
            results.append(err)

    threads = [threading.Thread(target=check_out) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert results[0] == results[1] == results[2]
    assert isinstance(results[0], DatasetVersion)


def cached_file(home: Path, data: bytes) -> Path:
    (found,) = [p for p in (home / "datasets/pets/.dvc/cache").rglob("*") if p.is_file() and p.read_bytes() == data]
    return found


def test_missing_cache_without_a_remote_says_what_to_do(home: Path) -> None:
    cached_file(home, picture(0)).unlink()
    with pytest.raises(DatasetError, match=r"dvc push.*dvc remote add"):
        checkout_version(dataset(), model(), home=home)


def test_damaged_cache_is_found_and_named(home: Path) -> None:
    damaged = cached_file(home, picture(0))
    damaged.chmod(0o644)
    damaged.write_bytes(bytes(100))
    damaged.chmod(0o444)
    with pytest.raises(InvalidDatasetError, match=r"cat/0\.png"):
        checkout_version(dataset(), model(), home=home)
    assert not (home / "worktrees" / "pets" / list_tags(dataset(), home=home)["v1.0.0"]).exists()


def with_remote(home: Path, tmp_path: Path) -> None:
    """Moves the cache to a remote that a relative address in the user's own configuration names."""
    repository = home / "datasets" / "pets"
    shutil.copytree(repository / ".dvc" / "cache", tmp_path / "remote")
    with (repository / ".dvc" / "config").open("a") as file:
        file.write("    remote = far\n['remote \"far\"']\n    url = ../../../../remote\n")


def test_missing_cache_is_pulled_from_the_remote(home: Path, tmp_path: Path) -> None:
    with_remote(home, tmp_path)
    shutil.rmtree(home / "datasets/pets/.dvc/cache")
    version = checkout_version(dataset(), model(), home=home)
    assert len(read_manifest(version.manifest_path)) == 20


def test_damaged_cache_is_replaced_from_the_remote(home: Path, tmp_path: Path) -> None:
    with_remote(home, tmp_path)
    damaged = cached_file(home, picture(0))
    damaged.chmod(0o644)
    damaged.write_bytes(bytes(100))
    damaged.chmod(0o444)
    version = checkout_version(dataset(), model(), home=home)
    assert (version.directory / "images/cat/0.png").read_bytes() == picture(0)


def test_unreachable_remote_is_named(home: Path, tmp_path: Path) -> None:
    with_remote(home, tmp_path)
    shutil.rmtree(home / "datasets/pets/.dvc/cache")
    shutil.rmtree(tmp_path / "remote")
    with pytest.raises(DatasetError, match="DVC remote 'far'"):
        checkout_version(dataset(), model(), home=home)


def test_what_dvc_has_to_say_needs_no_stream_of_the_moment_that_it_was_imported_in(home: Path, tmp_path: Path) -> None:
    """A test runner, or a step of Dagster, may have closed it since: DVC's handler then raised from its log call."""
    from dvc import logger as dvc_logger

    with_remote(home, tmp_path)
    shutil.rmtree(home / "datasets/pets/.dvc/cache")
    shutil.rmtree(tmp_path / "remote")
    closed = io.StringIO()
    with contextlib.redirect_stderr(closed):
        dvc_logger.setup(logging.WARNING)
    closed.close()
    with pytest.raises(DatasetError, match="DVC remote 'far'"):
        checkout_version(dataset(), model(), home=home)


def test_reads_a_repository_made_with_dvc_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own layout: `data.dvc`, annotations in git, an annotated tag."""
    from dvc.repo import Repo

    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    repository = tmp_path / "ds" / "mine"
    write_pictures(repository / "data", [f"{i}.png" for i in range(8)])
    rows = "".join(f"data/{i}.png,{'train' if i < 6 else 'test'},{'cat' if i % 2 else 'dog'}\n" for i in range(8))
    (repository / "annotations.csv").write_text(f"path,split,label\n{rows}")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, "-C", repository, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    with Repo.init(str(repository)) as repo:
        cast(Any, repo).add(str(repository / "data"))  # Its decorator hides that it is a method.
    git("add", "-A")
    git("commit", "--quiet", "-m", "one")
    git("tag", "-a", "v1", "-m", "one")
    config = dataset("mine", "v1", ds_root=str(tmp_path / "ds"), valid_fraction=0.3, reference_fraction=0.3)
    version = checkout_version(config, model(), home=tmp_path / "home")
    manifest = read_manifest(version.manifest_path)
    assert manifest["path"].tolist() == [f"data/{i}.png" for i in range(8)]
    assert manifest["labels"].str[0].tolist() == ["dog", "cat"] * 4
    assert (manifest["split"] == "test").sum() == 2
