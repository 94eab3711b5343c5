"""Machines that do not see the check-out: its images come from central storage, a folder or a real S3 API (moto)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs
from s3fs import S3FileSystem

from cv_platform.compute.engine import Engine, Outcome, R, S
from cv_platform.datasets import manifest as manifests
from cv_platform.datasets import origins
from cv_platform.datasets.embeddings import embed_dataset
from cv_platform.datasets.importing import ImportRules, import_dataset
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.packing import pack_images
from cv_platform.datasets.publishing import Sharing
from cv_platform.datasets.shards import writing
from cv_platform.datasets.stand_ins import tars
from cv_platform.datasets.versions import checkout_version, list_tags
from cv_platform.encoders import embeddings
from cv_platform.errors import ComputeError
from cv_platform.files import file_sha256, write_file
from cv_platform.maintenance.garbage import Garbage, collect, find_garbage
from cv_platform.object_store import ObjectStore
from cv_platform.records import DatasetVersion
from cv_platform.settings import Settings
from cv_platform_tests.support.blind_node import blind_cluster
from cv_platform_tests.support.elsewhere import Apart
from cv_platform_tests.support.pictures import class_folders, picture
from cv_platform_tests.unit.datasets.conftest import dataset, model
from cv_platform_tests.unit.encoders.test_encoder import own_file


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "central") if request.param == "folder" else request.getfixturevalue("s3_url")


def import_pets(tmp_path: Path, *homes: Path, above: int) -> None:
    """Imports 40 images, of which one does not decode, into installations."""
    source = class_folders(tmp_path / "pets", 20)
    (source / "dog/cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for home in homes:
        rules = ImportRules(tar_above=above, max_left_out_fraction=0.1)
        import_dataset(source, ds_name="pets", tag="v1.0.0", ds_root=home / "datasets", rules=rules)


def stored_files(storage: str) -> list[str]:
    """Lists what central storage has of images."""
    files, root = url_to_fs(storage)
    return sorted(path.removeprefix(f"{root}/images/pets/") for path in files.find(f"{root}/images"))


def packed_files(version: DatasetVersion, **options: Any) -> dict[str, str]:
    """Returns the sha256 of each file of a pack, train as JPEG, in shards of 4 images, and no notes."""
    packed = pack_images(version, model(), quarantined=(), uint8_budget_bytes=0, **options)
    notes = {"packed.json", "verified.json", "published.json"}
    return {path.name: file_sha256(path) for path in packed.directory.iterdir() if path.name not in notes}


@contextmanager
def one_apart(kind: str, hidden: Path, node_home: Path) -> Iterator[Engine]:
    """Yields an engine of a machine that does not see `hidden`."""
    if kind == "apart":
        yield Apart(hidden)
        return
    pytest.importorskip("ray", reason="Ray, of the extra ray")
    with blind_cluster(hidden, node_home) as engine:
        yield engine


@pytest.mark.parametrize("kind", ["apart", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("above", [1000, 8], ids=["files", "tars"])
def test_what_is_made_by_who_does_not_see_the_check_out_has_the_same_bytes(
    storage: str, above: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "MOST_IMAGES", 6)
    monkeypatch.setattr(manifests, "_IMAGES_PER_PART", 7)
    monkeypatch.setattr(writing, "SHARD_BYTES", 4 * model().image_size[0] ** 2 * 3)
    monkeypatch.setattr(embeddings, "_PART_IMAGES", 16)
    alone, hidden = tmp_path / "alone", tmp_path / "hidden"
    home = hidden / "home"
    import_pets(tmp_path, alone, home, above=above)
    encoder, sharing = own_file(hidden, ["N", 3]), Sharing(storage, home / "datasets" / "pets")
    expected = checkout_version(dataset(), model(), home=alone)
    wanted = [
        file_sha256(expected.manifest_path),
        file_sha256(embed_dataset(expected, encoder, home=alone).path),
        packed_files(expected, home=alone),
    ]
    with one_apart(kind, hidden, tmp_path / "node") as engine:
        with pytest.raises(ComputeError, match="CV_SHARE_PACKS=1"):
            checkout_version(dataset(), model(), home=home, engine=engine)
        made = checkout_version(dataset(), model(), home=home, engine=engine, shared_in=storage)
        sent = stored_files(storage)
        with pytest.raises(ComputeError, match="CV_SHARE_PACKS=1"):
            embed_dataset(made, encoder, home=home, engine=engine)
        vectors = embed_dataset(made, encoder, home=home, engine=engine, sharing=sharing)
        with pytest.raises(ComputeError, match="CV_SHARE_PACKS=1"):
            packed_files(made, home=home, engine=engine)
        packs = packed_files(made, home=home, engine=engine, sharing=sharing)
        assert [file_sha256(made.manifest_path), file_sha256(vectors.path), packs] == wanted
        again = checkout_version(dataset(split_seed=1), model(), home=home, engine=engine, shared_in=storage)
        assert again.manifest != made.manifest
        assert stored_files(storage) == sent


def test_without_central_storage_a_machine_that_does_not_see_the_check_out_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    import_pets(tmp_path, home, above=1000)
    with pytest.raises(ComputeError, match=r"Received: none on apart\. Put CV_HOME .* or set CV_SHARE_PACKS=1"):
        checkout_version(dataset(), model(), home=home, engine=Apart(home))
    with pytest.raises(ComputeError, match=r"Nor do all of them read .* apart: .* is not there\. Set CV_STORAGE"):
        checkout_version(dataset(), model(), home=home, engine=Apart(home), shared_in=str(home / "storage"))
    assert stored_files(str(home / "storage")) == [f"versions/{list_tags(dataset(), home=home)['v1.0.0']}.json"]


class Leaving(Apart):
    """Has central storage leave when the first shard is there, and come back when a shard has missed it."""

    def __init__(self, hidden: Path, leave: Callable[[], object], come_back: Callable[[], object]) -> None:
        super().__init__(hidden)
        self._leave, self._come_back, self.missed = leave, come_back, 0

    def run(self, function: Callable[[S], R], shards: Iterable[S], *, in_order: bool) -> Iterator[Outcome[S, R]]:
        log, handler = logging.getLogger("cv_platform.compute.engine"), logging.Handler()
        handler.emit = self._note
        log.addHandler(handler)
        self._leave()
        try:
            yield from super().run(function, shards, in_order=in_order)
        finally:
            log.removeHandler(handler)

    def _note(self, record: logging.LogRecord) -> None:
        assert "is tried again" in record.getMessage()
        self.missed += 1
        self._come_back()


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_central_storage_that_is_away_for_a_moment_is_waited_for(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    import_pets(tmp_path, home, above=1000)
    if kind == "folder":
        storage, central = str(tmp_path / "central"), tmp_path / "central"
        leave, come_back = partial(central.rename, tmp_path / "away"), partial((tmp_path / "away").rename, central)
    else:
        storage = str(request.getfixturevalue("s3_url"))
        address = os.environ["AWS_ENDPOINT_URL"]

        def move(url: str) -> None:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            S3FileSystem.clear_instance_cache()
            origins._store.cache_clear()

        leave, come_back = partial(move, "http://127.0.0.1:9"), partial(move, address)
    engine = Leaving(home, leave, come_back)
    made = checkout_version(dataset(), model(), home=home, engine=engine, shared_in=storage)
    assert (engine.missed, len(read_manifest(made.manifest_path))) == (1, 41)


def test_garbage_collection_removes_the_images_that_no_version_needs(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    settings = Settings.from_environment({"CV_HOME": str(home), "CV_STORAGE": storage})
    made = dict[str, DatasetVersion]()
    for tag, count in (("v1.0.0", 5), ("v2.0.0", 6)):
        source = class_folders(tmp_path / tag, count)
        (source / "cat" / "0.png").write_bytes(picture(100 + count))  # Which no other version has.
        import_dataset(source, ds_name="pets", tag=tag, ds_root=home / "datasets")
        made[tag] = checkout_version(dataset(tag=tag), model(), home=home, engine=Apart(home), shared_in=storage)
    record = home / "records" / "tiny" / "dataset.json"
    write_file(record, json.dumps({"directory": str(made["v2.0.0"].directory)}))
    item, later = "images of pets in central storage", time.time() + 100 * 86_400

    def garbage(now: float) -> Garbage:
        return find_garbage(settings, unfinished_runs=(), now=now)

    assert item not in {it.name for it in garbage(time.time()).items}
    before = stored_files(storage)
    found = garbage(later)
    collect(settings, found)
    old, new = made["v1.0.0"].provenance.dvc_md5, made["v2.0.0"].provenance.dvc_md5
    only_old = hashlib.md5(picture(105)).hexdigest()
    gone = {f"versions/{old}.json", *(f"files/md5/{md5[:2]}/{md5[2:]}" for md5 in (f"{old}.dir", only_old))}
    assert set(before) - set(stored_files(storage)) == gone
    assert {it.name: it.bytes for it in found.items}[item] > len(picture(105))
    assert item not in {it.name for it in garbage(later).items}

    record.unlink()
    files, root = url_to_fs(storage)
    listing = f"{root}/images/pets/files/md5/{new[:2]}/{new[2:]}.dir"
    content = files.cat_file(listing)
    files.rm(listing)
    assert item not in {it.name for it in garbage(time.time()).items}, "as where somebody is sending it"
    files.pipe_file(listing, content)
    assert collect(settings, garbage(later))
    assert stored_files(storage) == []

    def images(seed: int) -> int:
        """Returns how many images somebody describes who needs what was removed."""
        wanted = dataset(tag="v2.0.0", split_seed=seed)
        again = checkout_version(wanted, model(), home=home, engine=Apart(home), shared_in=storage)
        return len(read_manifest(again.manifest_path))

    assert images(1) == 12
    one_of_them = hashlib.md5(picture(106)).hexdigest()
    for seed, lost in enumerate((f"files/md5/{one_of_them[:2]}/{one_of_them[2:]}", f"versions/{new}.json"), 2):
        files.rm(f"{root}/images/pets/{lost}")
        assert images(seed) == 12
        assert set(stored_files(storage)) == set(before) - gone

    class KilledError(BaseException):
        """Ends a process that has deleted a file."""

    def remove_one(store: ObjectStore, paths: Sequence[str]) -> None:
        remove(store, paths[:1])
        raise KilledError

    remove = ObjectStore.remove_files
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "remove_files", remove_one)
        with pytest.raises(KilledError):
            collect(settings, garbage(later))
    assert set(before) - gone - set(stored_files(storage)) == {listing.removeprefix(f"{root}/images/pets/")}
    assert images(4) == 12


@pytest.mark.parametrize("content", [b"{}", b"\xff"])
def test_a_dataset_of_which_nobody_can_tell_what_is_used_stays_and_is_named(
    storage: str, content: bytes, tmp_path: Path
) -> None:
    files, root = url_to_fs(storage)
    old = {"listing": "files/md5/00/00.dir", "used_utc": "2000-01-01T00:00:00+00:00"}
    for ds_name, note in (("birds", content), ("pets", json.dumps(old).encode())):
        path = f"{root}/images/{ds_name}/versions/{'0' * 32}.json"
        files.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        files.pipe_file(path, note)
    settings = Settings.from_environment({"CV_HOME": str(tmp_path / "home"), "CV_STORAGE": storage})
    garbage = find_garbage(settings, unfinished_runs=())
    assert [line for line in garbage.kept if "images of birds in central storage: " in line and "0.json" in line]
    assert [item.name for item in collect(settings, garbage)] == ["images of pets in central storage"]
    assert [path.removeprefix(f"{root}/images/") for path in files.find(f"{root}/images")] == [
        f"birds/versions/{'0' * 32}.json"
    ]
