from pathlib import Path

import fsspec
import pytest

from cv_platform import disk_space
from cv_platform.deployment.bundle import publish_model
from cv_platform.disk_space import free_bytes, require_free_space
from cv_platform.errors import DiskSpaceError
from cv_platform.storage import CentralStorage, new_version
from cv_platform_tests.tiny_models import tiny_images, tiny_metadata


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
    for name in ("m.keras", "m_uae.keras"):
        (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(DiskSpaceError, match="the bundle of m"):
        publish_model(
            model_name="m",
            version=new_version(),
            keras_path=tmp_path / "m.keras",
            uae_path=tmp_path / "m_uae.keras",
            golden_images=tiny_images(1),
            class_names=("a", "b"),
            classifier_type="multi-class",
            preprocessing_hash="0",
            encoder_hash="0",
            dataset_name="d",
            dvc_tag="v1",
            dvc_md5="0",
            storage=CentralStorage(tmp_path / "storage"),
            bentoml_home=tmp_path / "bentoml",
            cache=tmp_path / "cache",
            spare_bytes=10**15,
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.keras", "m_uae.keras"]


def test_a_download_that_would_fill_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "model.onnx").write_bytes(b"weights")
    storage = CentralStorage("memory://test_disk_space")
    published = storage.publish_bundle(tmp_path / "bundle", tiny_metadata())
    try:
        monkeypatch.setattr(disk_space, "SPARE_BYTES", 10**15)
        with pytest.raises(DiskSpaceError, match=f"a copy of tiny {published.version}"):
            storage.fetch_bundle("tiny", published.version, tmp_path / "cache")
        monkeypatch.undo()
        folder, _ = storage.fetch_bundle("tiny", published.version, tmp_path / "cache")
        assert (folder / "model.onnx").read_bytes() == b"weights"
    finally:
        fsspec.filesystem("memory").rm("/test_disk_space", recursive=True)
