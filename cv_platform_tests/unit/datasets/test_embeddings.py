from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from cv_platform.config import EncoderConfig
from cv_platform.datasets.embeddings import embed_dataset, read_embeddings
from cv_platform.encoders.encoder import open_encoder
from cv_platform.errors import DatasetError, InvalidDatasetError
from cv_platform.images import preprocess
from cv_platform_tests.unit.validation.conftest import Checkout

ENCODER = EncoderConfig(input_px=32)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """Six images of noise in two splits, one file that is none, and one that the manifest takes for an image."""
    made = Checkout(tmp_path / "checkout", [])
    generator = np.random.default_rng(0)
    for number in range(6):
        split = "train" if number < 4 else "test"
        made.add(f"images/{number}.png", split, ["cat"], generator.integers(0, 255, (20, 24, 3), dtype=np.uint8))
    made.add("images/text.png", "train", ["cat"], b"no image", problem="not an image")
    made.add("images/cut.png", "train", ["cat"], b"\x89PNG\r\n\x1a\n")
    return made


def test_each_readable_image_has_the_vector_of_its_pixels(checkout: Checkout, tmp_path: Path) -> None:
    version = checkout.version(["cat"])
    made = embed_dataset(version, ENCODER, home=tmp_path)
    encoder = open_encoder(ENCODER, tmp_path)
    assert (made.images, made.features, made.encoder) == (6, 1280, encoder.key)
    paths = pd.Series([*(f"images/{number}.png" for number in range(6)), "images/text.png", "images/cut.png", "other"])
    vectors = read_embeddings(made, version.manifest, paths)
    assert vectors.dtype == np.float16
    assert np.isnan(vectors[6:]).all(), "what does not decode has none"
    pixels = [preprocess((checkout.directory / path).read_bytes(), (32, 32)) for path in paths[:6]]
    np.testing.assert_allclose(vectors[:6], encoder.embed(np.stack(pixels)), rtol=2e-3, atol=1e-3)


def test_vectors_follow_the_bits_that_are_declared(checkout: Checkout, tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 4096, (40, 40, 3), dtype=np.uint16)
    data = cv2.imencode(".png", deep)[1].tobytes()
    checkout.add("images/deep.png", "train", ["cat"], data)
    plain = checkout.version(["cat"])
    declared, paths = plain.model_copy(update={"sample_bits": 12}), ["images/deep.png", "images/0.png"]
    vectors = {}
    for version in (plain, declared):
        made = embed_dataset(version, ENCODER, home=tmp_path)
        vectors[version.sample_bits] = read_embeddings(made, version.manifest, paths)
    np.testing.assert_allclose(vectors[12][1], vectors[None][1], rtol=2e-3, atol=1e-3)
    encoder = open_encoder(ENCODER, tmp_path, 12)
    scaled = cv2.imencode(".png", (deep >> 4).astype(np.uint8))[1].tobytes()
    for pixels in (encoder.pixels(data), preprocess(scaled, (32, 32))):
        np.testing.assert_allclose(vectors[12][0], encoder.embed(pixels[None])[0], rtol=2e-3, atol=1e-3)
    assert np.abs(vectors[12][0] - vectors[None][0]).max() > 0.1


def test_what_is_there_is_used_again_and_only_new_images_are_computed(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = embed_dataset(checkout.version(["cat"]), ENCODER, home=tmp_path)
    written = first.path.stat()
    assert embed_dataset(checkout.version(["cat"]), ENCODER, home=tmp_path) == first
    assert first.path.stat().st_ino == written.st_ino
    # A version with one more image: no other file is decoded.
    checkout.add("images/new.png", "train", ["cat"], np.full((9, 9, 3), 7, np.uint8))
    changed = checkout.version(["cat"]).model_copy(
        update={"provenance": first.provenance.model_copy(update={"dvc_md5": "another.dir"})}
    )
    decoded: list[int] = []
    monkeypatch.setattr(
        "cv_platform.datasets.image_files.preprocess",
        lambda data, size, **limits: decoded.append(len(data)) or preprocess(data, size, **limits),
    )
    second = embed_dataset(changed, ENCODER, home=tmp_path)
    new, cut = (checkout.directory / f"images/{name}.png" for name in ("new", "cut"))
    assert sorted(decoded) == sorted([new.stat().st_size, cut.stat().st_size])
    assert second.images == 7
    assert second.content_version() != first.content_version()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_file_is_an_error_to_its_readers_and_is_made_again(
    checkout: Checkout, tmp_path: Path, damage: str
) -> None:
    version = checkout.version(["cat"])
    made = embed_dataset(version, ENCODER, home=tmp_path)
    made.path.chmod(0o644)
    made.path.write_bytes(made.path.read_bytes()[:-100]) if damage == "cut" else made.path.unlink()
    paths = pd.Series(["images/0.png"])
    with pytest.raises(DatasetError, match="Materialise embeddings, then this asset"):
        read_embeddings(made, version.manifest, paths)
    again = embed_dataset(version, ENCODER, home=tmp_path)
    assert np.isfinite(read_embeddings(again, version.manifest, paths)).all()


def test_embeddings_of_other_splits_are_refused(checkout: Checkout, tmp_path: Path) -> None:
    made = embed_dataset(checkout.version(["cat"]), ENCODER, home=tmp_path)
    with pytest.raises(DatasetError, match=r"Expected embeddings of other\.parquet\. Received: those of manifest"):
        read_embeddings(made, "other.parquet", pd.Series(["images/0.png"]))


@pytest.mark.parametrize("change", ["another image", "gone"])
def test_a_checkout_that_changed_since_it_was_described_is_refused_and_leaves_nothing_wrong(
    checkout: Checkout, tmp_path: Path, change: str
) -> None:
    version = checkout.version(["cat"])
    path = checkout.directory / "images/2.png"
    content = path.read_bytes()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(cv2.imencode(".png", np.zeros((20, 24, 3), np.uint8))[1].tobytes())
    with pytest.raises(InvalidDatasetError, match="Materialise the dataset again"):
        embed_dataset(version, ENCODER, home=tmp_path)
    path.write_bytes(content)
    made = embed_dataset(version, ENCODER, home=tmp_path)
    vector = read_embeddings(made, version.manifest, pd.Series(["images/2.png"]))
    expected = open_encoder(ENCODER, tmp_path).embed(preprocess(content, (32, 32))[None])
    np.testing.assert_allclose(vector, expected, rtol=2e-3, atol=1e-3)
