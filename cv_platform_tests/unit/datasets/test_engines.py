"""What the engines of `compute` make of a dataset: the same bytes, whoever works on it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cv_platform.compute.engine import Engine
from cv_platform.compute.local import LocalEngine
from cv_platform.config import EncoderConfig
from cv_platform.datasets import manifest as manifests
from cv_platform.datasets.embeddings import embed_dataset, read_embeddings
from cv_platform.datasets.manifest import build_manifest, read_manifest
from cv_platform.datasets.packing import pack_images
from cv_platform.datasets.shards import writing
from cv_platform.encoders import embeddings
from cv_platform.errors import ShardError
from cv_platform.files import file_sha256
from cv_platform.records import DatasetVersion, Provenance
from cv_platform_tests.support import poison
from cv_platform_tests.support.pictures import class_folders
from cv_platform_tests.unit.encoders.test_encoder import own_file

from .conftest import dataset, model


def described(directory: Path, engine: Engine | None) -> DatasetVersion:
    """Returns the images in `directory` with a manifest."""
    manifest = build_manifest(
        directory, data_path="images", annotations=None, model=model(), dataset=dataset(), engine=engine
    )
    return DatasetVersion(
        provenance=Provenance(ds_name="pets", dvc_tag="v1.0.0", dvc_md5="0" * 32),
        git_commit="1" * 40,
        directory=directory,
        manifest=manifest.name,
        class_names=("cat", "dog"),
    )


PROCESSES = LocalEngine(2, worth_seconds=0)


def prepare(directory: Path, home: Path, encoder: EncoderConfig, engine: Engine | None) -> dict[str, str]:
    """Returns the sha256 of all that is made of the images in `directory`."""
    version = described(directory, engine)
    vectors = embed_dataset(version, encoder, home=home, engine=engine)
    packed = pack_images(version, model(), quarantined=(), home=home, engine=engine)
    files = [version.manifest_path, vectors.path, *sorted(packed.directory.glob("*.*"))]
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
    require_same_bytes(tmp_path, PROCESSES, monkeypatch)


def version_of_twelve(directory: Path) -> DatasetVersion:
    """Returns images of which `poison` knows one that ends its process, once they are described."""
    class_folders(directory / "images", 6)
    return described(directory, None)


@pytest.mark.parametrize("budget_bytes", [10**9, 1])
def test_an_image_that_ends_its_process_among_others_alone_is_packed_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_bytes: int
) -> None:
    version = version_of_twelve(tmp_path)
    hashes = {}
    for function in (writing.write_shard, poison.packs_alone):
        monkeypatch.setattr(writing, "write_shard", function)
        home = tmp_path / function.__name__
        packed = pack_images(
            version, model(), quarantined=(), home=home, engine=PROCESSES, uint8_budget_bytes=budget_bytes
        )
        shards = [*packed.directory.glob("*.uint8"), *packed.directory.glob("*.jpeg")]
        hashes[function.__name__] = {path.name: file_sha256(path) for path in shards}
    assert hashes["write_shard"] == hashes["packs_alone"]
    assert {Path(name).suffix for name in hashes["write_shard"]} == {".uint8"} | (
        {".jpeg"} if budget_bytes == 1 else set()
    )


def test_an_image_that_no_packing_survives_is_named_and_all_other_shards_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    require_packing_names_poison(tmp_path, PROCESSES, monkeypatch)
    caplog.clear()
    with caplog.at_level("INFO"):
        pack_images(described(tmp_path, None), model(), quarantined=(), home=tmp_path, engine=PROCESSES)
    assert re.search(r"\d+ of \d+ shards were finished by a packing that has ended early", caplog.text)


def require_packing_names_poison(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs 12 images in shards of 2, one of which ends its process."""
    version = version_of_twelve(folder)
    monkeypatch.setattr(writing, "SHARD_BYTES", 2 * model().image_size[0] ** 2 * 3)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_shard", poison.packs)
        with pytest.raises(ShardError, match=r"Received: images/cat/3\.png \(has ended 3 .*\)\. All others are done"):
            pack_images(version, model(), quarantined=(), home=folder, engine=engine)
    (unfinished,) = (path for path in (folder / "packed").glob(".*") if path.is_dir())
    finished = {path.name for path in unfinished.glob("*.uint8")}
    packed = pack_images(version, model(), quarantined=(), home=folder / "whole", engine=engine)
    assert len({path.name for path in packed.directory.glob("*.uint8")} - finished) == 1


def test_an_image_that_no_embedding_survives_has_none_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    require_embedding_without_poison(tmp_path, PROCESSES, monkeypatch)
    assert re.search(r"images/cat/3\.png has no embedding: it has ended 3 processes, the last of which", caplog.text)
    assert "images/cat/0.png to images/dog/5.png" in caplog.text


def require_embedding_without_poison(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeds 12 images, one of which ends its process."""
    version, encoder = version_of_twelve(folder), own_file(folder, ["N", 3])
    whole = embed_dataset(version, encoder, home=folder / "whole")
    monkeypatch.setattr(embeddings, "embed_part", poison.embeds)
    made = embed_dataset(version, encoder, home=folder / "home", engine=engine)
    paths = read_manifest(version.manifest_path)["path"]
    assert made.images == 11
    vectors = read_embeddings(made, version.manifest, paths)
    is_poison = (paths == "images/cat/3.png").to_numpy()
    assert np.isnan(vectors[is_poison]).all()
    expected = read_embeddings(whole, version.manifest, paths)[~is_poison]
    np.testing.assert_allclose(vectors[~is_poison], expected, rtol=2e-3, atol=1e-3)  # Of float16.


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
