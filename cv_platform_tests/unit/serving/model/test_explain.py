from typing import Any, cast

import cv2
import numpy as np
import pytest

from cv_platform.serving.model.explain import (
    LONGEST_SIDE_PX,
    SMALLEST_SIDE_PX,
    STRONGEST_TINT,
    Explain,
    draw,
    map_of_whole,
    small_map,
    to_base64,
)

INFERNO_LOW, INFERNO_HIGH = (0, 0, 4), (252, 255, 164)


def decoded(data: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def flat(red: int, green: int, blue: int, height: int = 300, width: int = 400) -> np.ndarray:
    return np.full((height, width, 3), (red, green, blue), dtype=np.uint8)


def cam(value: float) -> np.ndarray:
    return np.full((4, 4), value, dtype=np.float32)


def test_leaves_the_image_as_it_is_where_the_map_is_zero():
    pictures = draw(flat(200, 30, 10), cam(0.0), Explain.PNG)
    np.testing.assert_array_equal(decoded(pictures.overlaid), flat(200, 30, 10))
    np.testing.assert_array_equal(decoded(pictures.original), flat(200, 30, 10))
    np.testing.assert_array_equal(decoded(pictures.raw_heat_map), flat(*INFERNO_LOW))


def test_mixes_image_and_colour_in_rgb_order_where_the_map_is_one():
    pictures = draw(flat(200, 30, 10), cam(1.0), Explain.PNG)
    np.testing.assert_array_equal(decoded(pictures.raw_heat_map), flat(*INFERNO_HIGH))
    expected = [
        round(i * (1 - STRONGEST_TINT) + h * STRONGEST_TINT) for i, h in zip((200, 30, 10), INFERNO_HIGH, strict=True)
    ]
    np.testing.assert_allclose(decoded(pictures.overlaid)[0, 0], expected, atol=1)


def test_the_map_of_a_part_lies_where_that_part_is():
    seen = np.arange(1, 17, dtype=np.float32).reshape(4, 4) / 16
    # The middle 400 of 800 columns, in cells of 100 pixels; then 400 rows of which an image of 200 fills the middle.
    cropped = map_of_whole(seen, (400, 800, 3), (0, 200, 400, 600))
    np.testing.assert_allclose(cropped[:, 2:6], seen, atol=1e-6)
    assert (cropped[:, [0, 1, 6, 7]] == 0).all()
    np.testing.assert_allclose(map_of_whole(seen, (200, 400, 3), (-100, 0, 300, 400)), seen[1:3], atol=1e-6)
    assert map_of_whole(seen, (1, 65_535, 3), (0, 32_767, 1, 32_768)).shape[1] <= 64


def test_the_hot_spot_is_where_the_map_has_it():
    hot = np.zeros((4, 4), dtype=np.float32)
    hot[0, 3] = 1.0  # Upper right.
    luma = decoded(draw(flat(0, 0, 0), hot, Explain.PNG).raw_heat_map).sum(axis=2)
    assert luma[:75, 300:].mean() > 10 * luma[150:, :200].mean()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (300, 400, (300, 400)),
        (1280, 640, (LONGEST_SIDE_PX, LONGEST_SIDE_PX // 2)),
        (8, 8, (SMALLEST_SIDE_PX, SMALLEST_SIDE_PX)),
        (4, 8, (SMALLEST_SIDE_PX // 2, SMALLEST_SIDE_PX)),
        (1, 1, (SMALLEST_SIDE_PX, SMALLEST_SIDE_PX)),
        (1, 30_000, (1, LONGEST_SIDE_PX)),
        (70_000, 1, (LONGEST_SIDE_PX, 1)),
    ],
)
def test_bounds_the_pictures_and_keeps_the_proportions(height: int, width: int, expected: tuple[int, int]):
    pictures = draw(flat(1, 2, 3, height, width), cam(0.5), Explain.JPEG)
    for picture in (pictures.original, pictures.overlaid, pictures.raw_heat_map):
        assert decoded(picture).shape == (*expected, 3)


def test_shows_the_pixels_of_a_tiny_image_without_blurring_them():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[::2] = 255
    assert set(np.unique(decoded(draw(image, cam(0.0), Explain.PNG).original))) == {0, 255}


def test_a_map_with_values_out_of_range_or_not_a_number_is_drawn_clipped():
    wild = np.array([[np.nan, -3.0], [np.inf, 7.0]], dtype=np.float32)
    picture = decoded(draw(flat(0, 0, 0), wild, Explain.PNG).raw_heat_map)
    np.testing.assert_array_equal(picture[0, 0], INFERNO_LOW)
    np.testing.assert_array_equal(picture[-1, -1], INFERNO_HIGH)


@pytest.mark.parametrize(("explain", "start"), [(Explain.JPEG, b"\xff\xd8\xff"), (Explain.PNG, b"\x89PNG")])
def test_encodes_in_the_format_asked_for(explain: Explain, start: bytes):
    pictures = draw(flat(9, 9, 9), cam(0.3), explain)
    assert pictures.media_type == f"image/{explain}"
    for picture in (pictures.original, pictures.overlaid, pictures.raw_heat_map):
        assert picture.startswith(start)


def test_refuses_what_is_no_image_or_no_map():
    with pytest.raises(ValueError, match=r"uint8 RGB"):
        draw(cast(Any, flat(1, 2, 3).astype(np.float32)), cam(0.5), Explain.JPEG)
    with pytest.raises(ValueError, match=r"map of \(h, w\)"):
        draw(flat(1, 2, 3), np.zeros((0, 4), dtype=np.float32), Explain.JPEG)
    with pytest.raises(ValueError, match="jpeg or png"):
        draw(flat(1, 2, 3), cam(0.5), Explain.CAM)


def test_small_map_has_four_decimals_and_base64_no_line_breaks():
    assert small_map(np.array([[1 / 3, 0.0], [1.0, 0.99999]], dtype=np.float32)) == [[0.3333, 0.0], [1.0, 1.0]]
    assert small_map(np.array([[np.nan, np.inf]], dtype=np.float32)) == [[0.0, 1.0]]
    assert to_base64(b"\xff" * 90) == "/" * 120
