"""Central storage on a folder and on an object store (fsspec's memory file system), held to the same contract."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from cv_platform.errors import (
    BundleExistsError,
    BundleNotFoundError,
    CorruptBundleError,
    PointerMovedError,
    StorageError,
)
from cv_platform.storage import (
    BundleMetadata,
    CentralStorage,
    ProductionPointer,
    WorkerHeartbeat,
    new_version,
)

NOW = datetime(2026, 1, 31, 6, tzinfo=UTC)


@pytest.fixture(params=["folder", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> CentralStorage:
    if request.param == "folder":
        return CentralStorage(tmp_path / "storage")
    return CentralStorage(f"memory://{uuid4()}/prefix")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "saved_model").mkdir(parents=True)
    (folder / "cats.keras").write_bytes(b"weights")
    (folder / "saved_model" / "graph.pb").write_bytes(b"graph")
    return folder


def metadata(version: str) -> BundleMetadata:
    return BundleMetadata(
        model_name="cats",
        version=version,
        created_utc=NOW,
        classifier_type="multi-class",
        class_names=("cat", "dog"),
        image_size=(8, 8),
        uae_dims=2,
        feature_dims=3,
        preprocessing_hash="p",
        encoder_hash="e",
        ds_name="cats",
        dvc_tag="v1",
        dvc_md5="m",
    )


def test_versions_sort_by_time_and_differ_within_a_second() -> None:
    later = new_version(datetime(2026, 2, 1, tzinfo=UTC))
    versions = {new_version(NOW) for _ in range(100)}
    assert len(versions) == 100
    assert max(versions) < later


def test_a_published_bundle_is_fetched_with_its_files(storage: CentralStorage, export: Path, tmp_path: Path) -> None:
    version = new_version(NOW)
    published = storage.publish_bundle(export, metadata(version))
    folder, read = storage.fetch_bundle("cats", version, tmp_path / "cache")
    assert read == published
    assert (folder / "cats.keras").read_bytes() == b"weights"
    assert (folder / "saved_model" / "graph.pb").read_bytes() == b"graph"
    assert storage.bundle_versions("cats") == [version]


class Syncs:
    """Notes what is synced, by inode, and whether `watched` existed at the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, watched: Path) -> None:
        self.seen: list[tuple[int, bool]] = []
        sync = os.fsync

        def noted(handle: int) -> None:
            self.seen.append((os.fstat(handle).st_ino, watched.exists()))
            sync(handle)

        monkeypatch.setattr(os, "fsync", noted)

    def has(self, path: Path, *, watched_existed: bool) -> bool:
        return (path.stat().st_ino, watched_existed) in self.seen


def test_files_and_folders_of_a_bundle_are_on_the_disk_before_its_metadata(
    tmp_path: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = new_version(NOW)
    root = tmp_path / "storage"
    bundle = root / "models" / "cats" / version
    syncs = Syncs(monkeypatch, bundle / "cats.yaml")
    CentralStorage(root).publish_bundle(export, metadata(version))
    payload = [bundle / "cats.keras", bundle / "saved_model" / "graph.pb"]
    folders = [bundle / "saved_model", bundle, bundle.parent, root / "models", root, tmp_path]
    assert [str(path) for path in [*payload, *folders] if not syncs.has(path, watched_existed=False)] == []
    assert syncs.has(bundle / "cats.yaml", watched_existed=False)
    assert syncs.has(bundle, watched_existed=True), "the metadata's own name"


def test_a_replaced_file_is_on_the_disk_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = CentralStorage(tmp_path / "storage")
    folder = tmp_path / "storage" / "services" / "service"
    pointer = ProductionPointer(model_name="cats", version="v", since_utc=NOW)
    syncs = Syncs(monkeypatch, folder / "production.json")
    storage.write_pointer("service", pointer)
    assert syncs.has(folder, watched_existed=True)
    assert all(syncs.has(path, watched_existed=False) for path in [folder.parent, tmp_path / "storage", tmp_path])
    syncs.seen.clear()
    storage.write_pointer("service", pointer)
    assert [inode for inode, _ in syncs.seen] == [
        (folder / "production.json").stat().st_ino,
        folder.stat().st_ino,
    ], "the content, then the name"


def test_an_object_store_is_asked_for_no_local_syncs(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = Syncs(monkeypatch, export)
    CentralStorage(f"memory://{uuid4()}/prefix").publish_bundle(export, metadata(new_version(NOW)))
    assert syncs.seen == []


def test_versions_are_immutable(storage: CentralStorage, export: Path) -> None:
    version = new_version(NOW)
    storage.publish_bundle(export, metadata(version))
    with pytest.raises(BundleExistsError, match=version):
        storage.publish_bundle(export, metadata(version))


def test_metadata_without_the_files_of_their_runtime_are_not_published(storage: CentralStorage, export: Path) -> None:
    wrong = metadata(new_version(NOW)).model_copy(update={"runtime": "onnx"})
    with pytest.raises(CorruptBundleError, match=r"expected model\.onnx.* onnx .*saved_model/graph\.pb.*the export"):
        storage.publish_bundle(export, wrong)
    (export / "saved_model" / "graph.pb").rename(export / "model.onnx")
    with pytest.raises(CorruptBundleError, match=r"expected saved_model,.* tensorflow "):
        storage.publish_bundle(export, wrong.model_copy(update={"runtime": "tensorflow"}))
    assert storage.bundle_versions("cats") == []
    storage.publish_bundle(export, wrong)


def test_a_bundle_whose_publication_died_is_not_listed(tmp_path: Path, export: Path) -> None:
    storage = CentralStorage(tmp_path / "storage")
    half = tmp_path / "storage" / "models" / "cats" / new_version(NOW)
    half.mkdir(parents=True)
    (half / "cats.keras").write_bytes(b"half")
    assert storage.bundle_versions("cats") == []
    with pytest.raises(BundleNotFoundError, match="materialise its bento first"):
        storage.fetch_bundle("cats", half.name, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, export: Path, damage: str) -> None:
    storage = CentralStorage(tmp_path / "storage")
    version = new_version(NOW)
    storage.publish_bundle(export, metadata(version))
    victim = tmp_path / "storage" / "models" / "cats" / version / "cats.keras"
    if damage == "changed":
        victim.write_bytes(b"weightz")
    else:
        victim.unlink()
    with pytest.raises(CorruptBundleError, match=rf"cats\.keras.*Restore .*{version} .*remove it and materialise"):
        storage.fetch_bundle("cats", version, tmp_path / "cache")


@pytest.mark.parametrize("text", ["", "[]", "{", "model_name: cats", "format_version: 99\n"])
def test_garbage_metadata_are_a_corrupt_bundle(tmp_path: Path, text: str) -> None:
    storage = CentralStorage(tmp_path / "storage")
    version = new_version(NOW)
    folder = tmp_path / "storage" / "models" / "cats" / version
    folder.mkdir(parents=True)
    (folder / "cats.yaml").write_text(text)
    with pytest.raises(CorruptBundleError):
        storage.read_metadata("cats", version)


def test_metadata_of_a_newer_format_ask_for_an_update(tmp_path: Path, export: Path) -> None:
    storage = CentralStorage(tmp_path / "storage")
    version = new_version(NOW)
    storage.publish_bundle(export, metadata(version).model_copy(update={"format_version": 99}))
    with pytest.raises(CorruptBundleError, match="format 2 or older"):
        storage.read_metadata("cats", version)


def test_a_bundle_of_release_0_1_is_read(tmp_path: Path, export: Path) -> None:
    storage = CentralStorage(tmp_path / "storage")
    published = storage.publish_bundle(export, metadata(new_version(NOW)))
    path = tmp_path / "storage" / "models" / "cats" / published.version / "cats.yaml"
    text = path.read_text().replace("format_version: 2", "format_version: 1").replace("ds_name: ", "dataset_name: ")
    path.write_text(text)
    assert storage.read_metadata("cats", published.version) == published.model_copy(update={"format_version": 1})


def test_the_pointer_moves_and_is_read_back(storage: CentralStorage) -> None:
    assert storage.read_pointer("service") is None
    pointer = ProductionPointer(model_name="cats", version="v", since_utc=NOW)
    storage.write_pointer("service", pointer)
    storage.write_pointer("service", pointer.model_copy(update={"version": "w", "previous_version": "v"}))
    read = storage.read_pointer("service")
    assert read is not None
    assert (read.version, read.previous_version, read.since_utc) == ("w", "v", NOW)


def test_a_garbage_pointer_is_an_error_and_no_silence(tmp_path: Path) -> None:
    storage = CentralStorage(tmp_path)
    path = tmp_path / "services" / "service" / "production.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"model_name": "cats"')
    with pytest.raises(StorageError, match=r"production\.json"):
        storage.read_pointer("service")


def test_heartbeats_come_and_go_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    storage = CentralStorage(tmp_path)
    for worker in ("b", "a"):
        storage.write_heartbeat("service", WorkerHeartbeat(worker_id=worker, beat_utc=NOW))
    (tmp_path / "services" / "service" / "workers" / "c.json").write_text("{")
    assert [beat.worker_id for beat in storage.read_heartbeats("service")] == ["a", "b"]
    storage.remove_heartbeat("service", "a")
    storage.remove_heartbeat("service", "a")
    assert [beat.worker_id for beat in storage.read_heartbeats("service")] == ["b"]


def test_writing_leaves_no_partial_files(tmp_path: Path) -> None:
    storage = CentralStorage(tmp_path)
    storage.write_pointer("service", ProductionPointer(model_name="cats", version="v", since_utc=NOW))
    assert [path.name for path in (tmp_path / "services" / "service").iterdir()] == ["production.json"]


def test_reference_data_and_reports_are_kept(storage: CentralStorage, tmp_path: Path) -> None:
    parquet = tmp_path / "rows.parquet"
    parquet.write_bytes(b"rows")
    storage.publish_reference_data(parquet, "cats", "v")
    fetched = storage.fetch_reference_data("cats", "v", tmp_path / "cache")
    assert fetched.name == "cats_ref_data.parquet"
    assert fetched.read_bytes() == b"rows"
    with pytest.raises(BundleNotFoundError, match="w"):
        storage.fetch_reference_data("cats", "w", tmp_path / "cache")
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<p>")
    assert storage.publish_report("cats", "r1", report).endswith("reports/cats/r1")


@pytest.mark.parametrize("part", ["..", ".", "a/b", "a\\b", "", "a\0"])
def test_names_cannot_leave_their_folder(storage: CentralStorage, part: str) -> None:
    with pytest.raises(StorageError, match="Expected a name"):
        storage.read_metadata("cats", part)
    with pytest.raises(StorageError, match="Expected a name"):
        storage.read_pointer(part)


def test_an_unknown_url_is_refused_with_what_to_install() -> None:
    with pytest.raises(StorageError, match="CV_STORAGE"):
        CentralStorage("nosuch://bucket")


def test_moves_that_race_are_made_one_after_the_other(tmp_path: Path):
    """Each move counts one on; a move that overwrote another's would lose its count."""
    storage = CentralStorage(tmp_path)
    storage.swap_pointer("service", None, ProductionPointer(model_name="cats", version="0", since_utc=NOW))

    def count(who: int) -> None:
        for _ in range(25):
            while True:
                seen = storage.read_pointer("service")
                assert seen is not None
                new = seen.model_copy(update={"version": str(int(seen.version) + 1), "model_name": f"cats_{who}"})
                try:
                    storage.swap_pointer("service", seen, new)
                except PointerMovedError:
                    continue
                break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    last = storage.read_pointer("service")
    assert last is not None
    assert last.version == "100"


def test_a_pointer_is_moved_from_where_it_was_seen_and_from_nowhere_else(storage: CentralStorage):
    first = ProductionPointer(model_name="cats", version="1", since_utc=NOW)
    second = first.model_copy(update={"version": "2"})
    with pytest.raises(PointerMovedError, match=r"at cats 1 .*Received: nothing"):
        storage.swap_pointer("service", first, second)
    storage.swap_pointer("service", None, None)
    storage.swap_pointer("service", None, first)
    with pytest.raises(PointerMovedError, match=r"at nothing\. Received: cats 1"):
        storage.swap_pointer("service", None, second)
    with pytest.raises(PointerMovedError, match="Received: cats 1"):
        storage.swap_pointer("service", second, None)
    storage.swap_pointer("service", first, None)
    assert storage.read_pointer("service") is None
