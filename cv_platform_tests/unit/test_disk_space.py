from pathlib import Path

import fsspec
import pytest

from cv_platform import files
from cv_platform.config import DeployConfig
from cv_platform.deployment.bundle import Place, publish_model
from cv_platform.errors import DiskSpaceError
from cv_platform.files import free_bytes, require_free_space
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.record_samples import drift_detectors, evaluation, trained_model
from cv_platform_tests.support.tiny_models import tiny_images, tiny_metadata


def test_what_fits_may_begin_even_where_the_folder_is_still_to_be_made(tmp_path: Path) -> None:
    require_free_space(tmp_path / "to" / "be" / "made", 1, purpose="a byte", spare_bytes=0)
    assert not (tmp_path / "to").exists()


def test_what_leaves_less_than_the_reserve_is_refused_with_both_numbers(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    with pytest.raises(DiskSpaceError, match=r"GB free at .* for the images .*1000000\.00 GB of it as a reserve.*gc"):
        require_free_space(tmp_path, 1, purpose="the images", spare_bytes=10**15)
    with pytest.raises(DiskSpaceError, match="Received"):
        require_free_space(tmp_path, 2 * free, purpose="the images", spare_bytes=0)


def test_a_bundle_that_would_fill_the_disk_is_not_exported(tmp_path: Path) -> None:
    for name in ("tiny.keras", "tiny_uae.keras"):
        (tmp_path / name).write_bytes(b"never read")
    storage = CentralStorage(tmp_path / "storage")
    place = Place(storage, tmp_path / "bentoml", tmp_path / "cache", spare_bytes=10**15)
    records = trained_model(tmp_path), drift_detectors(tmp_path), evaluation(tmp_path)
    with pytest.raises(DiskSpaceError, match="the bundle of tiny"):
        publish_model(*records, tiny_images(1), deploy=DeployConfig(), place=place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.keras", "tiny_uae.keras"]


def test_a_download_that_would_fill_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"weights")
    storage = CentralStorage("memory://test_disk_space")
    published = storage.publish_bundle(tmp_path / "bundle", tiny_metadata())
    try:
        monkeypatch.setattr(files, "SPARE_BYTES", 10**15)
        with pytest.raises(DiskSpaceError, match=f"a copy of tiny {published.version}"):
            storage.fetch_bundle("tiny", published.version, tmp_path / "cache")
        monkeypatch.undo()
        folder, _ = storage.fetch_bundle("tiny", published.version, tmp_path / "cache")
        assert (folder / "model.onnx").read_bytes() == b"weights"
    finally:
        fsspec.filesystem("memory").rm("/test_disk_space", recursive=True)
