from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cv_platform.properties import PROPERTY_NAMES, batch_properties, image_properties, stacked_properties


def named(image: np.ndarray) -> dict[str, float]:
    return dict(zip(PROPERTY_NAMES, image_properties(image).tolist(), strict=True))


def flat(red: int, green: int, blue: int, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    return np.tile(np.array([red, green, blue], dtype=np.uint8), (*size, 1))


def test_flat_colour_has_only_its_colour() -> None:
    values = named(flat(200, 100, 50))
    # Luma (ITU-R BT.601): 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2, rounded to a grey level.
    assert values["luma_mean"] == 124
    assert values["luma_std"] == 0
    assert values["log_laplacian_variance"] == 0
    assert values["log_laplacian_mad"] == 0
    assert values["red_green"] == 100
    assert values["blue_yellow"] == 50 - 150
    assert values["saturation"] == 150


def test_stripes_have_the_laplacian_worked_by_hand() -> None:
    image = np.zeros((4, 6, 3), dtype=np.uint8)
    image[:, 1::2] = 100
    values = named(image)
    # Each pixel's neighbours left and right differ by 100: the kernel (1, -2, 1) gives +-200 everywhere, mean 0.
    assert values["luma_mean"] == 50
    assert values["luma_std"] == 50
    assert values["log_laplacian_variance"] == pytest.approx(np.log1p(200.0**2))
    assert values["log_laplacian_mad"] == pytest.approx(np.log1p(200.0))


def test_blur_lowers_and_noise_raises_the_laplacian() -> None:
    import cv2

    y, x = np.mgrid[0:32, 0:32]
    image = np.repeat(((x + y) % 16 * 12).astype(np.uint8)[..., None], 3, axis=2)
    noise = np.random.default_rng(0).normal(0, 25, image.shape)
    noisy = np.clip(image + noise, 0, 255).astype(np.uint8)
    key = "log_laplacian_variance"
    assert named(cv2.GaussianBlur(image, (5, 5), 2))[key] < named(image)[key] < named(noisy)[key]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 8), (3, 3), (5, 4), (50, 50), (61, 47)])
def test_values_are_those_of_their_definition(height: int, width: int) -> None:
    import cv2

    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)
    laplacian = cv2.Laplacian(luma, cv2.CV_64F)
    red, green, blue = image.reshape(-1, 3).astype(np.float64).mean(axis=0)
    expected = [
        luma.mean(),
        luma.std(),
        np.log1p(laplacian.var()),
        np.log1p(np.median(np.abs(laplacian - np.median(laplacian)))),
        red - green,
        blue - (red + green) / 2,
        (image.max(axis=2).astype(float) - image.min(axis=2)).mean(),
    ]
    np.testing.assert_allclose(image_properties(image), expected, rtol=1e-6, atol=1e-6)


def test_channel_order_is_rgb() -> None:
    assert named(flat(250, 0, 0))["red_green"] == 250
    assert named(flat(0, 0, 250))["blue_yellow"] == 250


def test_batch_is_the_images_in_order() -> None:
    pictures = [flat(i, 2 * i, 3 * i) for i in range(5)]
    rows = batch_properties(pictures)
    assert (rows.shape, rows.dtype) == ((5, 7), np.float32)
    np.testing.assert_array_equal(rows, np.stack([image_properties(picture) for picture in pictures]))
    np.testing.assert_array_equal(batch_properties(iter(pictures)), rows)


@given(height=st.integers(2, 12), width=st.integers(2, 12), count=st.integers(1, 4), seed=st.integers(0, 50))
def test_a_stack_has_the_values_of_its_images(height: int, width: int, count: int, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    np.testing.assert_allclose(stacked_properties(images), batch_properties(images), rtol=1e-5, atol=1e-4)


def test_empty_batch_has_seven_columns() -> None:
    assert batch_properties([]).shape == (0, 7)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
)
def test_refuses_what_is_not_one_rgb_image(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        image_properties(image)


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 50))
def test_any_image_has_finite_values_in_their_range(height: int, width: int, seed: int) -> None:
    values = named(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    assert all(np.isfinite(value) for value in values.values())
    assert 0 <= values["luma_mean"] <= 255
    assert 0 <= values["saturation"] <= 255
    assert -255 <= values["red_green"] <= 255
    assert -255 <= values["blue_yellow"] <= 255


def test_memory_mapped_and_strided_images_give_the_same() -> None:
    image = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(image_properties(image[::-1][::-1]), image_properties(image))
    np.testing.assert_array_equal(image_properties(image[:, ::-1]), image_properties(image[:, ::-1].copy()))
