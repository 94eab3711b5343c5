from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from cv_platform.datasets import near_copies
from cv_platform.datasets.near_copies import MAX_DISTANCE, find_near_copies, thumbnail


def scene(seed: int, side: int = 64) -> NDArray[np.uint8]:
    """Draws `(side, side, 3)`: discs of any size and colour on a gradient, no two seeds alike."""
    generator = np.random.default_rng(seed)
    image = np.full((side, side, 3), generator.integers(60, 160, 3), np.uint8)
    for _ in range(8):
        centre = tuple(int(at) for at in generator.integers(0, side, 2))
        colour = tuple(int(level) for level in generator.integers(0, 200, 3))
        cv2.circle(image, centre, int(generator.integers(4, side // 3)), colour, -1)
    return image


def jpeg(image: NDArray[np.uint8], quality: int = 60) -> NDArray[np.uint8]:
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), dtype=np.uint8)


COPIES = {
    "saved again": jpeg,
    "mirrored": lambda image: image[:, ::-1],
    "brightened": lambda image: np.clip(image * 1.2, 0, 255).astype(np.uint8),
    "darkened": lambda image: (image * 0.7).astype(np.uint8),
    "cropped on all sides": lambda image: image[4:-4, 4:-4],
    "cropped at a corner": lambda image: image[4:, 4:],
    "half as large": lambda image: cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "mirrored, cropped and saved again": lambda image: jpeg(np.ascontiguousarray(image[2:, 2:][:, ::-1])),
}


def thumbnails(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.stack([thumbnail(np.ascontiguousarray(image)) for image in images])


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found_among_honest_images_and_nothing_else(kind: str) -> None:
    scenes = [scene(seed) for seed in range(60)]
    found = find_near_copies(thumbnails([*scenes, COPIES[kind](scenes[7]), COPIES[kind](scenes[31])]))
    assert found.pairs.tolist() == [[7, 60], [31, 61]]
    assert (found.distances <= found.limit).all()
    assert found.limit == MAX_DISTANCE


def test_a_crop_by_less_than_a_pixel_of_the_thumbnail_hides_no_copy_of_fine_detail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shelf(seed: int) -> NDArray[np.uint8]:
        generator = np.random.default_rng(seed)
        image = np.zeros((160, 160, 3), np.uint8)
        for _ in range(900):
            centre = tuple(int(at) for at in generator.integers(0, 160, 2))
            colour = tuple(int(level) for level in generator.integers(0, 255, 3))
            cv2.circle(image, centre, int(generator.integers(5, 10)), colour, -1)
        return image

    shelves, others = [shelf(seed) for seed in range(4)], [scene(seed) for seed in range(40)]
    images = thumbnails([*shelves, *(image[7:, 7:] for image in shelves), *others])
    assert find_near_copies(images).pairs.tolist() == [[at, 4 + at] for at in range(4)]
    monkeypatch.setattr(near_copies, "_DOUBT", 1.0)
    assert find_near_copies(images).pairs.tolist() == []


def test_an_index_of_many_images_finds_the_copies_that_a_search_of_all_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (3000, 6, 6), dtype=np.uint8)
    images = np.stack([cv2.resize(field, (32, 32), interpolation=cv2.INTER_CUBIC) for field in noise])
    copies = (images[:50, :, ::-1], images[50:100] // 2)
    planted = np.concatenate([images, *copies]).astype(np.uint8)
    exact = find_near_copies(planted)
    monkeypatch.setattr(near_copies, "EXACT_IMAGES", 100)
    indexed = find_near_copies(planted)
    wanted = [[at, 3000 + at] for at in range(100)]
    assert indexed.pairs.tolist() == exact.pairs.tolist() == wanted


def test_vectors_propose_what_thumbnails_do_not() -> None:
    # Sixteen images that are coarsely alike hide the copy from a search of five neighbours by thumbnails alone.
    copy = scene(0)[8:, 8:]
    alike = [np.clip(scene(0)[8:, 8:].astype(int) + delta, 0, 255).astype(np.uint8) for delta in range(-40, 40, 5)]
    images = [scene(0), *[scene(seed) for seed in range(1, 40)], *alike, copy]
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(len(images), 8)).astype(np.float16)
    vectors[-1] = vectors[0]
    last = len(images) - 1
    assert [0, last] in find_near_copies(thumbnails(images), vectors).pairs.tolist()


def test_copies_of_copies_are_one_set_and_others_are_alone() -> None:
    scenes = [scene(seed) for seed in range(30)]
    found = find_near_copies(thumbnails([*scenes, jpeg(scenes[3]), np.ascontiguousarray(scenes[3][:, ::-1])]))
    sets = found.sets(32)
    assert len({sets[3], sets[30], sets[31]}) == 1
    assert len(set(sets.tolist())) == 30


def test_where_all_images_are_alike_none_is_called_a_copy() -> None:
    from sklearn.datasets import load_digits

    given: Any = load_digits()
    digits = (given.images[:600] * 255 / 16).astype(np.uint8)
    images = [np.repeat(image[..., None], 3, axis=2) for image in digits]
    found = find_near_copies(thumbnails(images))
    assert found.limit < MAX_DISTANCE / 2
    assert len(np.unique(found.pairs)) <= 0.005 * len(images)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_images_of_one_colour_and_few_images_are_no_copies(count: int) -> None:
    found = find_near_copies(np.full((count, 32, 32), 9, np.uint8), np.ones((count, 4), np.float16))
    assert found.pairs.shape == (0, 2)
    assert len(set(found.sets(count).tolist())) == count
