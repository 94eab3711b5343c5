"""When images are sent to central storage; `integration/test_images_elsewhere.py` reads them there."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import pytest

from cv_platform.compute.engine import Engine
from cv_platform.datasets import publishing
from cv_platform.datasets.importing import ImportRules, import_dataset
from cv_platform.datasets.origins import Origin
from cv_platform.datasets.publishing import Sharing, find_origin
from cv_platform.datasets.repository import run_git
from cv_platform.datasets.versions import checkout_version
from cv_platform.errors import ComputeError, DatasetError, InvalidDatasetError
from cv_platform.records import DatasetVersion
from cv_platform_tests.support.away import away_from
from cv_platform_tests.support.elsewhere import Apart, Elsewhere
from cv_platform_tests.support.pictures import class_folders

from .conftest import dataset, model


def check_out(tmp_path: Path, *, links: bool = False) -> DatasetVersion:
    source, root = class_folders(tmp_path / "source", 10), tmp_path / "home" / "datasets"
    import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=root, rules=ImportRules(links=links))
    return checkout_version(dataset(), model(), home=tmp_path / "home")


def sharing(tmp_path: Path) -> Sharing:
    return Sharing(str(tmp_path / "central"), tmp_path / "home" / "datasets" / "pets")


def origin_for(engine: Engine | None, version: DatasetVersion, tmp_path: Path) -> Origin:
    seen_by, shared = version.manifest_path, sharing(tmp_path)
    return find_origin(version.directory, version.provenance, seen_by=seen_by, engine=engine, sharing=shared)


def test_nothing_is_sent_where_all_see_the_check_out(tmp_path: Path) -> None:
    version = check_out(tmp_path)
    for engine in (None, Elsewhere()):
        origin = origin_for(engine, version, tmp_path)
        assert origin.files(["images/cat/0.png"]).stored is None
    assert not (tmp_path / "central").exists()


def test_images_that_were_left_in_place_cannot_be_sent(tmp_path: Path) -> None:
    version = check_out(tmp_path, links=True)
    with pytest.raises(
        ComputeError, match=r"none on apart\. v1\.0\.0 was imported with --link, so that DVC has no copy"
    ):
        find_origin(
            version.directory,
            version.provenance,
            seen_by=version.manifest_path,
            engine=Apart(tmp_path / "home"),
            sharing=sharing(tmp_path),
        )


def test_a_tag_that_somebody_has_moved_is_not_sent_in_its_place(tmp_path: Path) -> None:
    version = check_out(tmp_path)
    root = tmp_path / "home" / "datasets"
    import_dataset(class_folders(tmp_path / "other", 11), ds_name="pets", tag="v2.0.0", ds_root=root)
    run_git(root / "pets", "tag", "--force", "v1.0.0", "v2.0.0")
    with pytest.raises(DatasetError, match="somebody has moved the tag"):
        find_origin(
            version.directory,
            version.provenance,
            seen_by=version.manifest_path,
            engine=Apart(version.directory),
            sharing=sharing(tmp_path),
        )


def test_a_file_that_dvc_does_not_track_is_named(tmp_path: Path) -> None:
    version = check_out(tmp_path)
    origin = find_origin(
        version.directory,
        version.provenance,
        seen_by=version.manifest_path,
        engine=Apart(version.directory),
        sharing=sharing(tmp_path),
    )
    stored = origin.files(["images/dog/3.png", "images/cat/0.png"]).stored
    assert stored is not None
    assert [len(place.digest) for place in stored.places] == [16, 16]
    sizes = [(version.directory / "images" / name).stat().st_size for name in ("dog/3.png", "cat/0.png")]
    assert [place.size for place in stored.places] == sizes
    removed = version.directory / "images" / "dog" / "3.png"
    removed.parent.chmod(0o700)
    removed.unlink()
    of_removed = origin.files(["images/dog/3.png"]).stored
    assert of_removed is not None
    assert [place.size for place in of_removed.places] == [0]
    with pytest.raises(InvalidDatasetError, match=r"expected DVC to track cat/x\.png"):
        origin.files(["images/cat/0.png", "images/cat/x.png"])


def test_an_import_that_is_at_work_or_was_killed_keeps_its_folder(tmp_path: Path) -> None:
    version = check_out(tmp_path)
    copied = tmp_path / "home" / "datasets" / ".pets.scratch-work" / "images" / "1.png"
    copied.parent.mkdir(parents=True)
    copied.write_bytes(b"an image")
    find_origin(
        version.directory,
        version.provenance,
        seen_by=version.manifest_path,
        engine=Apart(version.directory),
        sharing=sharing(tmp_path),
    )
    assert copied.read_bytes() == b"an image"
    assert not list(copied.parents[2].glob(".pets.sending.*"))


@pytest.mark.parametrize("step", ["_note_use", "push_images"])
def test_central_storage_that_is_away_for_a_moment_is_waited_for(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    version, apart = check_out(tmp_path), Apart(tmp_path / "home")
    with away_from(step, publishing, tmp_path / "central", monkeypatch, caplog):
        files = origin_for(apart, version, tmp_path).files(["images/cat/0.png"])
    assert apart.ask(partial(list[bytes], files))["apart"] == [(version.directory / "images/cat/0.png").read_bytes()]


def test_what_dvc_cannot_send_where_central_storage_is_there_ends_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    version = check_out(tmp_path)
    in_the_way = tmp_path / "central" / "images" / "pets" / "files"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    with pytest.raises(DatasetError, match="to take the images"):
        origin_for(Apart(version.directory), version, tmp_path)
    assert "is tried again in" not in caplog.text


def test_what_central_storage_has_lost_is_sent_again(tmp_path: Path) -> None:
    version, apart = check_out(tmp_path), Apart(tmp_path / "home")

    def read() -> list[bytes]:
        origin = origin_for(apart, version, tmp_path)
        files = origin.files(["images/cat/0.png", "images/dog/1.png"])
        return apart.ask(partial(list[bytes], files))["apart"]

    sent = read()
    objects = tmp_path / "central" / "images" / "pets" / "files" / "md5"
    name = hashlib.md5(sent[1]).hexdigest()
    (objects / name[:2] / name[2:]).unlink()
    assert read() == sent
    assert (objects / name[:2] / name[2:]).read_bytes() == sent[1]
    listing = next(objects.glob("*/*.dir")).stat()
    assert read() == sent
    assert next(objects.glob("*/*.dir")).stat().st_mtime_ns == listing.st_mtime_ns, (
        "where all is there, nothing is sent"
    )
