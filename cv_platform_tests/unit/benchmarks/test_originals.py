"""The replicas: slow by design, but right about what they replicate."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.original_input import dataset
from benchmarks.original_serving import _as_text, _pictures
from cv_platform.config import AugmentConfig

CLASSES = 3


@pytest.fixture
def files(tmp_path: Path) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Seven 8×8 PNG files of their own grey level each, their class indices, and their levels."""
    levels = np.arange(10, 80, 10)
    paths = []
    for level in levels:
        path = tmp_path / f"{level}.png"
        assert cv2.imwrite(str(path), np.full((8, 8, 3), level, np.uint8))
        paths.append(path)
    return paths, np.arange(7) % CLASSES, levels


@pytest.mark.xdist_group("tensorflow")
def test_input_gives_every_image_once_an_epoch_with_its_label_in_another_order(
    files: tuple[list[Path], np.ndarray, np.ndarray],
) -> None:
    paths, labels, levels = files
    pipeline = dataset(paths, labels, classes=CLASSES, image_size=(16, 16), batch_size=4, augment=None)
    epochs = []
    for _ in range(2):
        batches = [(images.numpy(), targets.numpy()) for images, targets in pipeline]
        assert [images.shape for images, _ in batches] == [(4, 16, 16, 3), (3, 16, 16, 3)]
        images, targets = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        assert images.dtype == np.float32
        # Images of one grey level keep it when they are resized.
        seen = np.rint(255 * images[:, 0, 0, 0]).astype(int)
        assert sorted(seen) == list(levels)
        assert [labels[list(levels).index(level)] for level in seen] == list(targets.argmax(axis=1))
        epochs.append(list(seen))
    assert epochs[0] != epochs[1]


@pytest.mark.xdist_group("tensorflow")
def test_input_augments_one_image_at_a_time(files: tuple[list[Path], np.ndarray, np.ndarray]) -> None:
    paths, labels, levels = files
    augment = AugmentConfig(sometimes=1.0, brightness_fraction=0.2, flip_horizontal=0.5)
    pipeline = dataset(paths, labels, classes=CLASSES, image_size=(8, 8), batch_size=7, augment=augment)
    [(images, _)] = list(pipeline)
    seen = np.sort(255 * images.numpy()[:, 0, 0, 0])
    assert not np.allclose(seen, levels)
    assert np.all(np.abs(seen - levels) <= 0.2 * levels + 10)


def test_pictures_have_the_size_of_the_upload() -> None:
    heat = np.zeros((50, 50), np.uint8)
    heat[20:30, 20:30] = 255
    picture = np.full((240, 320, 3), 200, np.uint8)
    coloured, overlaid = _pictures(heat, picture)
    assert coloured.shape == overlaid.shape == picture.shape
    assert not np.array_equal(coloured[120, 160], coloured[0, 0])


def test_text_is_a_png_of_the_picture_in_rgb() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(_as_text(picture)), np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(decoded, picture)
