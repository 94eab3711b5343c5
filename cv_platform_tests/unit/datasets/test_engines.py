"""What the engines of `compute` make of a dataset: the same bytes, whoever works on it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cv_platform.compute.engine import Engine
from cv_platform.compute.local import LocalEngine
from cv_platform.config import EncoderConfig
from cv_platform.datasets import manifest as manifests
from cv_platform.datasets.embeddings import embed_dataset
from cv_platform.datasets.manifest import build_manifest, read_manifest
from cv_platform.datasets.packing import pack_images
from cv_platform.datasets.shards import writing
from cv_platform.encoders import embeddings
from cv_platform.files import file_sha256
from cv_platform.records import DatasetVersion, Provenance
from cv_platform_tests.support.pictures import class_folders
from cv_platform_tests.unit.encoders.test_encoder import own_file

from .conftest import dataset, model


def prepare(directory: Path, home: Path, encoder: EncoderConfig, engine: Engine | None) -> dict[str, str]:
    """Returns the sha256 of all that is made of the images in `directory`."""
    manifest = build_manifest(
        directory, data_path="images", annotations=None, model=model(), dataset=dataset(), engine=engine
    )
    version = DatasetVersion(
        provenance=Provenance(ds_name="pets", dvc_tag="v1.0.0", dvc_md5="0" * 32),
        git_commit="1" * 40,
        directory=directory,
        manifest=manifest.name,
        class_names=("cat", "dog"),
    )
    vectors = embed_dataset(version, encoder, home=home, engine=engine)
    packed = pack_images(version, model(), quarantined=(), home=home, engine=engine)
    files = [manifest, vectors.path, *sorted(packed.directory.glob("*.*"))]
    return {path.name: file_sha256(path) for path in files if path.name not in {"packed.json", "verified.json"}}


def require_same_bytes(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepares 40 images by this process and, in many shards, by an engine."""
    monkeypatch.setattr(manifests, "_IMAGES_PER_PART", 7)
    monkeypatch.setattr(embeddings, "_PART_IMAGES", 16)
    monkeypatch.setattr(writing, "SHARD_BYTES", 4 * model().image_size[0] ** 2 * 3)
    class_folders(folder / "alone" / "images", 20)
    (folder / "alone/images/dog/cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    shutil.copytree(folder / "alone", folder / "together")
    encoder = own_file(folder, ["N", 3])
    alone = prepare(folder / "alone", folder / "home-alone", encoder, None)
    assert len(alone) > 15
    assert prepare(folder / "together", folder / "home-together", encoder, engine) == alone


def test_processes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_same_bytes(tmp_path, LocalEngine(2, worth_seconds=0), monkeypatch)


MANIFEST = """
import sys
from pathlib import Path
from cv_platform.compute.local import LocalEngine
from cv_platform.datasets import manifest as manifests
from cv_platform_tests.support import poison
from cv_platform_tests.unit.datasets.conftest import dataset, model
manifests.describe = poison.describes
folder = Path(sys.argv[1])
engine = LocalEngine(notes=folder / "notes")
manifests.build_manifest(
    folder, data_path="images", annotations=None, model=model(), dataset=dataset(), engine=engine
)
"""


def test_a_manifest_that_an_image_has_ended_names_it_when_it_is_made_again(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 6)
    command = [sys.executable, "-c", MANIFEST, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    require_poison_named(tmp_path)


def require_poison_named(directory: Path) -> None:
    """Looks into the manifest of 12 images, one of which ends its process."""
    (path,) = directory.glob("manifest-*.parquet")
    manifest = read_manifest(path).set_index("path")
    assert manifest["is_readable"].sum() == 11
    row = manifest.loc["images/cat/3.png"]
    assert "one that has ended 3 processes, the last of which " in row["problem"]
    assert (row["status"], row["split"]) == ("quarantined", None)
    assert row["sha256"] == file_sha256(directory / "images/cat/3.png")
