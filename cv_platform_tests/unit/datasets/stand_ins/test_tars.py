from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from tarfile import is_tarfile

import pytest

from cv_platform.cli import main
from cv_platform.datasets.differences import compare_versions
from cv_platform.datasets.importing import ImportedDataset, ImportRules, import_dataset
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.relabelling import Decision, relabel
from cv_platform.datasets.repository import commit_version, read_version
from cv_platform.datasets.stand_ins import tars
from cv_platform.datasets.stand_ins.tars import RULE, TARS, place_tars, tars_above, write_tars
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import InvalidDatasetError
from cv_platform.records import DatasetVersion
from cv_platform_tests.support.pictures import class_folders, picture, write_pictures
from cv_platform_tests.unit.datasets.conftest import dataset, model

ABOVE, MOST = 8, 4


@pytest.fixture(autouse=True)
def small_tars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST_IMAGES", MOST)


def store(source: Path, home: Path, tag: str = "v1.0.0", above: int | None = ABOVE) -> ImportedDataset:
    rules = ImportRules(tar_above=above)
    return import_dataset(source, ds_name="pets", tag=tag, ds_root=home / "datasets", rules=rules)


def check_out(home: Path, tag: str = "v1.0.0") -> DatasetVersion:
    return checkout_version(dataset(tag=tag), model(), home=home)


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tracked(version: DatasetVersion, home: Path) -> dict[str, str]:
    """Returns the md5 of each file that DVC has of a version, by its name."""
    from cv_platform.datasets.dvc_store import check_out as check_out_of_dvc

    repository, scratch = home / "datasets/pets", home / "tracked"
    scratch.mkdir()
    check_out_of_dvc(read_version(repository, version.provenance.dvc_tag), scratch, repository=repository)
    found = {name: hashlib.md5(data).hexdigest() for name, data in files_below(scratch / "images").items()}
    shutil.rmtree(scratch)
    return found


def test_images_above_the_threshold_are_tars_to_dvc_and_the_same_files_to_all_others(tmp_path: Path) -> None:
    source, home = class_folders(tmp_path / "pets", per_class=5), tmp_path / "home"
    imported = store(source, home)
    assert "stored as tars, as they are more than 8" in imported.notes
    version = check_out(home)
    assert files_below(version.directory / "images") == files_below(source)
    assert len(read_manifest(version.manifest_path)) == 10
    assert version.directory.joinpath("images/cat/0.png").stat().st_mode & 0o222 == 0
    found = tracked(version, home)
    assert {Path(name).parent.name for name in found} == {TARS}
    assert sorted(Path(name).suffix for name in found) == [".csv"] * (len(found) // 2) + [".tar"] * (len(found) // 2)
    assert 3 <= len(found) // 2 <= 5, "each of 2 to 4 images"
    assert store(source, home).summary()[-1] == "nothing new: v1.0.0 has had the same images and labels before"
    assert store(source, home, above=None).same_as == ("v1.0.0",)  # As the dataset's repository says.


def test_as_many_images_as_the_threshold_are_files(tmp_path: Path) -> None:
    home = tmp_path / "home"
    store(class_folders(tmp_path / "pets", per_class=4), home)
    assert sorted(tracked(check_out(home), home)) == [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)]


def test_a_clone_pulls_tars_that_another_machine_has_pushed_and_has_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, home, elsewhere = class_folders(tmp_path / "pets", per_class=6), tmp_path / "home", tmp_path / "elsewhere"
    store(source, home)
    before = check_out(home)
    with (home / "datasets/pets/.dvc/config").open("a") as file:
        file.write(f"    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'remote'}\n")
    assert main(["dataset", "push", "pets", "--root", str(home / "datasets")]) == 0
    assert f"{len(tracked(before, home)) + 1} files were sent" in capsys.readouterr().out  # DVC's list of them, too.
    (elsewhere / "datasets").mkdir(parents=True)
    ignored = shutil.ignore_patterns("cache")
    shutil.copytree(home / "datasets/pets", elsewhere / "datasets/pets", ignore=ignored)
    after = check_out(elsewhere)
    assert files_below(after.directory / "images") == files_below(source)
    assert after.provenance == before.provenance
    assert read_manifest(after.manifest_path).equals(read_manifest(before.manifest_path))


def test_two_tarred_versions_differ_by_their_images_and_share_tars_and_files_of_the_others(tmp_path: Path) -> None:
    source, home = class_folders(tmp_path / "pets", per_class=12), tmp_path / "home"
    store(source, home)
    first = check_out(home)
    write_pictures(source, ["dog/8a.png", "dog/8b.png"], first_seed=100)
    (source / "dog/9.png").write_bytes(picture(200))
    store(source, home, "v2", above=None)
    second = check_out(home, "v2")
    difference = compare_versions(home / "datasets/pets", "v1.0.0", "v2", home=home)
    assert difference.summary() == (
        "v1.0.0 → v2: 2 added, 0 removed, 1 changed, 0 relabelled, 0 moved; 23 images are the same."
    )
    before, after = (
        {name: md5 for name, md5 in tracked(version, home).items() if name.endswith(".tar")}
        for version in (first, second)
    )
    others = set(after.items()) - set(before.items())
    assert len(before) >= 6
    assert 1 <= len(others) <= 3, "only tars into whose range of names the new ones fall"
    inodes = [
        {path.relative_to(version.directory): path.stat().st_ino for path in version.directory.rglob("*.png")}
        for version in (first, second)
    ]
    shared = set(inodes[0].items()) & set(inodes[1].items())
    assert len(shared) >= 12, "images of tars that both versions have are one file"


def test_a_version_that_crosses_the_threshold_differs_by_its_images_alone(tmp_path: Path) -> None:
    source, home = class_folders(tmp_path / "pets", per_class=4), tmp_path / "home"
    store(source, home)
    check_out(home)
    write_pictures(source, ["dog/4.png"], first_seed=100)
    store(source, home, "v2", above=None)
    version = check_out(home, "v2")
    assert files_below(version.directory / "images") == files_below(source)
    assert compare_versions(home / "datasets/pets", "v1.0.0", "v2", home=home).summary() == (
        "v1.0.0 → v2: 1 added, 0 removed, 0 changed, 0 relabelled, 0 moved; 8 images are the same."
    )
    (source / "dog/4.png").unlink()
    store(source, home, "v3", above=None)
    assert check_out(home, "v3").provenance.dvc_md5 == check_out(home).provenance.dvc_md5  # Back again: files.


def test_a_relabelled_version_of_tars_is_tars(tmp_path: Path) -> None:
    source, home = class_folders(tmp_path / "pets", per_class=5), tmp_path / "home"
    repository = store(source, home).directory
    sha256 = hashlib.sha256((source / "cat/0.png").read_bytes()).hexdigest()
    decision = Decision("images/cat/0.png", sha256, ("cat",), ("dog",))
    relabel(repository, "v1.0.0", b"a review", [decision], home=home, new_tag="v2")
    version = check_out(home, "v2")
    assert read_manifest(version.manifest_path)["labels"].tolist().count(["dog"]) == 6
    assert {Path(name).parent.name for name in tracked(version, home)} == {TARS}
    kept = files_below(source)
    moved = {f"dog/0-{sha256[:12]}.png": kept.pop("cat/0.png")}
    assert files_below(version.directory / "images") == {**kept, **moved}


_KILLED_AT_THE_SIXTH_IMAGE = f"""
import os, signal, sys, tarfile
from pathlib import Path
from cv_platform.datasets.importing import ImportRules, import_dataset
from cv_platform.datasets.stand_ins import tars

tars.MOST_IMAGES = {MOST}
add, added = tarfile.TarFile.addfile, []

def add_five(tar, header, data):
    added.append(header.name)
    if len(added) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    add(tar, header, data)

tarfile.TarFile.addfile = add_five
rules = ImportRules(tar_above={ABOVE})
import_dataset(Path(sys.argv[1]), ds_name="pets", tag="v1.0.0", ds_root=Path(sys.argv[2]), rules=rules)
"""


def test_a_killed_import_leaves_no_version_and_the_next_one_writes_the_missing_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, home = class_folders(tmp_path / "pets", per_class=6), tmp_path / "home"
    killed = subprocess.run([sys.executable, "-c", _KILLED_AT_THE_SIXTH_IMAGE, source, home / "datasets"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (home / "datasets/pets").exists()
    (scratch,) = (home / "datasets").glob(".pets.scratch-*")
    whole = {path: path.stat().st_ino for path in (scratch / "images" / TARS).glob("*.tar")}
    assert whole, "the first tar was whole"
    added: list[str] = []
    add = tarfile.TarFile.addfile

    def counted(tar: tarfile.TarFile, header: tarfile.TarInfo, data: object) -> None:
        added.append(header.name)
        add(tar, header, data)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(tarfile.TarFile, "addfile", counted)
    store(source, home)
    assert 0 < len(added) < 12
    assert sorted(path.name for path in (home / "datasets").iterdir()) == [".pets.lock", "pets"]
    assert files_below(check_out(home).directory / "images") == files_below(source)


def test_a_damaged_tar_is_named_and_pulled_again_where_there_is_a_remote(tmp_path: Path) -> None:
    source, home = class_folders(tmp_path / "pets", per_class=5), tmp_path / "home"
    repository = store(source, home).directory
    shutil.copytree(repository / ".dvc/cache", tmp_path / "remote")
    damaged = next(path for path in (repository / ".dvc/cache").rglob("*") if path.is_file() and is_tarfile(path))

    def damage() -> None:
        content = bytearray(damaged.read_bytes())
        content[600] ^= 1
        damaged.chmod(0o644)
        damaged.write_bytes(content)
        damaged.chmod(0o444)

    damage()
    with pytest.raises(InvalidDatasetError, match=rf"expected {TARS}/[0-9a-f]+\.tar as DVC recorded"):
        check_out(home)
    with (repository / ".dvc/config").open("a") as file:
        file.write(f"    remote = store\n['remote \"store\"']\n    url = {tmp_path / 'remote'}\n")
    assert files_below(check_out(home).directory / "images") == files_below(source)


def written(folder: Path, names: list[str]) -> Path:
    """Writes tars of pictures with these names, and returns the folder that DVC would track."""
    files = {name: folder / f"source-{number}.png" for number, name in enumerate(names)}
    for number, file in enumerate(files.values()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
        os.utime(file, (number, number))
    write_tars(folder / "images", files)
    return folder / "images"


def test_tars_are_the_same_bytes_whoever_writes_them_and_a_bare_tar_reads_them(tmp_path: Path) -> None:
    names = ["train/déjà vu/1.png", *(f"train/{'long ' * 40}/{i}.png" for i in range(6)), "odd \udcff.png", 'a"b,c.png']
    one, two = (files_below(written(tmp_path / folder, names) / TARS) for folder in ("one", "two"))
    assert one == two
    read: dict[str, bytes] = {}
    for path in sorted((tmp_path / "one/images" / TARS).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert (member.mtime, member.uid, member.uname) == (0, 0, "")
                read[member.name] = file.read()
    assert read == {name: picture(number) for number, name in enumerate(names)}
    place_tars(tmp_path / "one/images", version="pets v1")
    assert files_below(tmp_path / "one/images") == read


@pytest.mark.parametrize("added", ["001500-b.png", "000000-a.png", "999999.png"])
def test_a_few_more_images_change_few_tars(monkeypatch: pytest.MonkeyPatch, added: str) -> None:
    monkeypatch.setattr(tars, "MOST_IMAGES", 100)
    names = [f"{number:06}.png" for number in range(3000)]
    before = {tuple(run) for run in tars._runs(names)}
    after = {tuple(run) for run in tars._runs(sorted([*names, added]))}
    assert all(len(run) <= 100 for run in before | after)
    assert len([run for run in before if len(run) < 50]) <= 1
    assert len(before) >= 30
    assert len(after - before) <= 3


@pytest.mark.parametrize("path", ["../a.png", "/etc/passwd", "x/../../b.png"])
def test_refuses_an_index_that_leads_elsewhere(tmp_path: Path, path: str) -> None:
    images = written(tmp_path, [path])
    with pytest.raises(InvalidDatasetError, match="pets v1: expected paths below a folder in tarred-images/"):
        place_tars(images, version="pets v1")


@pytest.mark.parametrize(
    ("damage", "received"),
    [("bytes", "other bytes of 0.png"), ("no tar", "No such file"), ("no table", "a table of nonsense")],
)
def test_names_a_tar_that_does_not_fit_its_index(tmp_path: Path, damage: str, received: str) -> None:
    images = written(tmp_path, ["0.png", "1.png"])
    (tar,), (index,) = ((images / TARS).glob(f"*{suffix}") for suffix in (".tar", ".csv"))
    if damage == "bytes":
        tar.write_bytes(bytes(tar.stat().st_size))
    elif damage == "no tar":
        tar.unlink()
    else:
        index.write_text("nonsense\n")
    with pytest.raises(InvalidDatasetError, match=rf"pets v1: expected tarred-images/{index.stem}.*{received}"):
        place_tars(images, version="pets v1")


def test_a_file_of_another_check_out_that_has_changed_is_not_taken_over(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(3)]
    first, second = written(tmp_path / "versions/one", names), written(tmp_path / "versions/two", names)
    place_tars(first, version="pets v1")
    (first / "1.png").write_bytes(picture(77))
    (first / "2.png").unlink()
    place_tars(second, version="pets v2")
    assert files_below(second) == {name: picture(number) for number, name in enumerate(names)}
    assert [(first / "0.png").samefile(second / "0.png"), (second / "1.png").stat().st_nlink] == [True, 1]


def test_a_repository_whose_threshold_is_no_number_says_what_one_is(tmp_path: Path) -> None:
    source, home = class_folders(tmp_path / "pets", per_class=2), tmp_path / "home"
    repository = store(source, home).directory
    assert (tars_above(repository), tars_above(tmp_path / "none")) == (ABOVE, tars.TAR_ABOVE)
    dvc_file = read_version(repository, "v1.0.0").dvc_file
    commit_version(repository, "v2", dvc_file=dvc_file, annotations=None, message="two", beside={RULE: b"{}"})
    with pytest.raises(InvalidDatasetError, match=r'tars\.json such as \{"above": 50000\}\. Received: b\'\{\}\''):
        store(source, home, "v3", above=None)
