"""Augmentation changes what it is told to change, and does so reproducibly."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cv_platform.config import AugmentConfig
from cv_platform.training.augmentation import Augmenter

EVERYTHING = AugmentConfig(
    sometimes=0.8,
    flip_horizontal=0.5,
    flip_vertical=0.5,
    rotate_degrees=20,
    shear_degrees=10,
    scale_fraction=0.2,
    translate_fraction=0.1,
    brightness_fraction=0.2,
    contrast_fraction=0.2,
    noise_std=10,
    blur_sigma_px=1,
)


def pictures(count: int = 12) -> np.ndarray:
    """Returns `(count, 16, 16, 3)` uint8 without any symmetry."""
    return np.random.default_rng(5).integers(40, 200, (count, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip_horizontal", 1.0),
        ("flip_vertical", 1.0),
        ("rotate_degrees", 30.0),
        ("shear_degrees", 20.0),
        ("scale_fraction", 0.4),
        ("translate_fraction", 0.3),
        ("brightness_fraction", 0.5),
        ("contrast_fraction", 0.5),
        ("noise_std", 30.0),
        ("blur_sigma_px", 2.0),
    ],
)
def test_each_operation_changes_pixels_and_keeps_shape_and_dtype(field: str, value: float) -> None:
    images = pictures()
    changed = Augmenter(AugmentConfig(sometimes=1.0, **{field: value}), seed=1)(images, epoch=0, batch_index=0)

    assert changed.dtype == np.uint8
    assert changed.shape == images.shape
    moved = (changed != images).any(axis=(1, 2, 3))
    assert moved.mean() >= 0.75  # A drawn rotation or blur may be next to nothing for a few.
    np.testing.assert_array_equal(images, pictures())  # The input is left alone.


def test_horizontal_flip_mirrors_columns_and_vertical_flip_mirrors_rows() -> None:
    images = pictures()

    across = Augmenter(AugmentConfig(sometimes=1.0, flip_horizontal=1.0), seed=1)(images, epoch=0, batch_index=0)
    upside_down = Augmenter(AugmentConfig(sometimes=1.0, flip_vertical=1.0), seed=1)(images, epoch=0, batch_index=0)

    np.testing.assert_array_equal(across, images[:, :, ::-1])
    np.testing.assert_array_equal(upside_down, images[:, ::-1])


def test_a_flip_of_one_half_flips_about_half_of_the_images() -> None:
    images = pictures(400)

    changed = Augmenter(AugmentConfig(sometimes=1.0, flip_horizontal=0.5), seed=1)(images, epoch=0, batch_index=0)

    flipped = (changed == images[:, :, ::-1]).all(axis=(1, 2, 3))
    untouched = (changed == images).all(axis=(1, 2, 3))
    assert (flipped | untouched).all()
    assert 150 <= flipped.sum() <= 250  # Binomial(400, 1/2): five standard deviations are 50.


def test_sometimes_is_the_share_of_images_that_are_touched() -> None:
    images = pictures(400)

    changed = Augmenter(AugmentConfig(sometimes=0.25, flip_horizontal=1.0), seed=1)(images, epoch=0, batch_index=0)

    touched = (changed != images).any(axis=(1, 2, 3)).sum()
    assert 57 <= touched <= 143  # Binomial(400, 1/4): 100 ± five standard deviations.


def test_brightness_stays_within_its_bounds() -> None:
    grey = np.full((50, 8, 8, 3), 100, dtype=np.uint8)

    changed = Augmenter(AugmentConfig(sometimes=1.0, brightness_fraction=0.2), seed=1)(grey, epoch=0, batch_index=0)

    assert 79 <= changed.min() < 95
    assert 105 < changed.max() <= 121


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(sometimes=0.0, flip_horizontal=1.0)])
def test_nothing_switched_on_changes_nothing(config: AugmentConfig) -> None:
    augmenter = Augmenter(config, seed=1)

    np.testing.assert_array_equal(augmenter(pictures(), epoch=3, batch_index=2), pictures())


def test_batches_are_the_same_in_any_order_and_from_any_instance() -> None:
    images = pictures()
    first, second = Augmenter(EVERYTHING, seed=9), Augmenter(EVERYTHING, seed=9)
    places = [(epoch, batch) for epoch in range(2) for batch in range(3)]

    forwards = {place: first(images, epoch=place[0], batch_index=place[1]) for place in places}
    backwards = {place: second(images, epoch=place[0], batch_index=place[1]) for place in reversed(places)}

    for place in places:
        np.testing.assert_array_equal(forwards[place], backwards[place])


def test_seed_epoch_and_batch_each_give_other_changes() -> None:
    images = pictures()
    base = Augmenter(EVERYTHING, seed=9)(images, epoch=1, batch_index=2)

    for seed, epoch, batch_index in [(8, 1, 2), (9, 2, 2), (9, 1, 1), (9, 2, 1)]:
        other = Augmenter(EVERYTHING, seed=seed)(images, epoch=epoch, batch_index=batch_index)
        assert (other != base).any()


SCRIPT = """
import hashlib
from cv_platform_tests.unit.training.test_augmentation import EVERYTHING, Augmenter, pictures
import numpy as np
np.random.seed()  # Somebody else's random state must not matter.
augmenter = Augmenter(EVERYTHING, seed=4)
print(hashlib.sha256(b"".join(augmenter(pictures(), epoch=e, batch_index=7).tobytes() for e in (1, 0))).hexdigest())
print("bool" in vars(np))
"""


def test_another_process_makes_the_same_batches_without_warnings_and_leaves_numpy_as_it_is() -> None:
    import hashlib

    augmenter = Augmenter(EVERYTHING, seed=4)
    here = hashlib.sha256(b"".join(augmenter(pictures(), epoch=e, batch_index=7).tobytes() for e in (1, 0))).hexdigest()

    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [here, "False"]
