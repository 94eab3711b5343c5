"""What the engines of `compute` make of a dataset: the same bytes, whoever works on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from cv_platform.compute.engine import Engine, Outcome, R, S
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


class DiesOf:
    """An engine whose processes die of one image."""

    workers, worth_seconds = 1, 0.0

    def __init__(self, name: str) -> None:
        self.name = name

    def ask(self, question: Callable[[], R]) -> dict[str, R]:
        return {}

    def run(self, function: Callable[[S], R], shards: Iterable[S], *, in_order: bool) -> Iterator[Outcome[S, R]]:
        for shard in shards:
            dies = self.name in [entry.path for entry in getattr(shard, "entries", ())]
            yield Outcome(shard, None if dies else function(shard), "has ended 3 processes" if dies else None)


def test_an_image_that_no_process_survives_is_a_row_like_others_that_cannot_be_read(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", 6)
    path = build_manifest(
        tmp_path,
        data_path="images",
        annotations=None,
        model=model(),
        dataset=dataset(),
        engine=DiesOf("cat/3.png"),
    )
    manifest = read_manifest(path).set_index("path")
    assert manifest["is_readable"].sum() == 11
    row = manifest.loc["images/cat/3.png"]
    assert row["problem"].endswith("one that has ended 3 processes. Save it anew.")
    assert (row["status"], row["split"]) == ("quarantined", None)
    assert row["sha256"] == file_sha256(tmp_path / "images/cat/3.png")
