"""The two pictures of an explanation: the heat-map, and the heat-map over the image.

Both are drawn from the small class-activation map that the model returns with its probabilities (Grad-CAM, Selvaraju
et al. 2017, section 3), when the answer is made and again whenever a stored prediction is shown: only the small map is
ever stored. The work is bounded by the size of the picture, never by the size of the upload.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

LONGEST_SIDE_PX = 640
SMALLEST_SIDE_PX = 256
"""Longest side of the picture of a tiny image, which is enlarged pixel by pixel so that one can see it."""
JPEG_QUALITY = 90
PNG_COMPRESSION = 3
MOST_CELLS = 64
"""On a side of a map."""
STRONGEST_TINT = 0.75
"""Share of heat-map colour where the map is 1; where it is 0 the image stays as it is."""
_INFERNO = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, np.newaxis], cv2.COLORMAP_INFERNO)
"""`(256, 1, 3)` BGR, made once: OpenCV would make it for each picture, which takes longer than to colour one."""
BLANK = "The heat-map is blank: no part of the image raises the class's score by more than rounding does."


class Explain(StrEnum):
    """What a client may ask for beside the probabilities."""

    JPEG = "jpeg"
    PNG = "png"
    CAM = "cam"
    NONE = "none"

    @property
    def media_type(self) -> str | None:
        """Media type of the pictures; None where there are none."""
        return {"jpeg": "image/jpeg", "png": "image/png"}.get(self.value)


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures of one prediction, all of the same size.

    Attributes:
        overlaid: the heat-map over the image.
        raw_heat_map: the heat-map alone, in the colours of `cv2.COLORMAP_INFERNO` (dark 0 to bright 1).
        explain: the format of all of them, see `media_type`.
        image: `(H, W, 3)` uint8 BGR, the image in the size of the pictures.
    """

    overlaid: bytes
    raw_heat_map: bytes
    explain: Explain
    image: NDArray[Any]

    @property
    def media_type(self) -> str | None:
        """Media type of the pictures."""
        return self.explain.media_type

    @property
    def original(self) -> bytes:
        """The image itself, encoded when it is asked for: whoever has just sent it does not need it back."""
        return _encode(self.image, self.explain)


def draw(
    image: NDArray[np.uint8], cam: NDArray[np.float32], explain: Explain, *, longest_px: int = LONGEST_SIDE_PX
) -> Pictures:
    """Draws an explanation.

    Args:
        image: `(H, W, 3)` uint8, RGB, upright; of any size.
        cam: `(h, w)` float, 0–1, any size of its own; what lies outside is clipped, what is not a number counts as 0.
        explain: JPEG or PNG.
        longest_px: most pixels of the longest side, at least `SMALLEST_SIDE_PX`.

    Returns:
        Pictures with a longest side of `SMALLEST_SIDE_PX` to `longest_px` and the proportions of the image.

    Raises:
        ValueError: the arrays are not as described, or `explain` asks for no pictures.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"Expected one (H, W, 3) uint8 RGB image. Received: {image.dtype} {image.shape}.")
    if cam.ndim != 2 or 0 in cam.shape:
        raise ValueError(f"Expected a map of (h, w). Received: {cam.shape}.")
    if explain.media_type is None:
        raise ValueError(f"Expected jpeg or png. Received: {explain}.")
    picture = cv2.cvtColor(_picture_sized(image, longest_px), cv2.COLOR_RGB2BGR)
    height, width = picture.shape[:2]
    small = np.minimum(np.fmax(cam.astype(np.float32), 0.0), 1.0)  # `fmax` passes over what is not a number.
    # Cubic is smooth where linear shows the cells as diamonds. In 8 bits, which is what the colours have, as OpenCV's
    # cubic and its blending on floats take four times as long, more than a small model's answer.
    opencv: Any = cv2  # Its types know neither 8 bits nor which of its results are.
    smooth: NDArray[np.uint8] = opencv.resize(
        opencv.convertScaleAbs(small, alpha=255.0), (width, height), interpolation=cv2.INTER_CUBIC
    )
    heat: NDArray[np.uint8] = opencv.applyColorMap(smooth, _INFERNO)
    tint = opencv.merge([opencv.convertScaleAbs(smooth, alpha=STRONGEST_TINT)] * 3)
    kept = opencv.multiply(picture, opencv.bitwise_not(tint), scale=1 / 255)
    overlaid: NDArray[np.uint8] = opencv.add(kept, opencv.multiply(heat, tint, scale=1 / 255))
    return Pictures(
        overlaid=_encode(overlaid, explain), raw_heat_map=_encode(heat, explain), explain=explain, image=picture
    )


def map_of_whole(
    cam: NDArray[np.float32], shape: tuple[int, ...], box: tuple[int, int, int, int]
) -> NDArray[np.float32]:
    """Returns the map of a whole image from the map of that part of it which a model saw.

    Args:
        cam: `(h, w)` float32, 0–1, over the box.
        shape: (height, width) of the image, in pixels.
        box: top, left, bottom and right, in pixels of the image; it may reach beyond.

    Returns:
        A map with cells of about the same size, at most `MOST_CELLS` on a side; 0 where the model saw nothing.
    """
    top, left, bottom, right = box
    cell = (bottom - top) / cam.shape[0], (right - left) / cam.shape[1]
    rows, columns = (min(MOST_CELLS, max(1, round(shape[axis] / cell[axis]))) for axis in (0, 1))
    ys = ((np.arange(rows) + 0.5) * shape[0] / rows - top) / cell[0] - 0.5
    xs = ((np.arange(columns) + 0.5) * shape[1] / columns - left) / cell[1] - 0.5
    grid_x, grid_y = np.meshgrid(xs.astype(np.float32), ys.astype(np.float32))
    placed = cv2.remap(cam.astype(np.float32), grid_x, grid_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    is_seen = (np.abs(ys - (cam.shape[0] - 1) / 2) <= cam.shape[0] / 2)[:, np.newaxis] & (
        np.abs(xs - (cam.shape[1] - 1) / 2) <= cam.shape[1] / 2
    )
    return np.where(is_seen, placed, np.float32(0.0))


def small_map(cam: NDArray[np.float32]) -> list[list[float]]:
    """Returns `(h, w)` as rows of numbers with four decimals; JSON has no word for what is no number."""
    return [[round(float(value), 4) for value in row] for row in np.nan_to_num(cam, nan=0.0, posinf=1.0, neginf=0.0)]


def is_blank(cam: NDArray[np.float32]) -> bool:
    """Whether nothing of a map is above 0; what is not a number counts as 0."""
    return not bool((cam > 0.0).any())


def to_base64(data: bytes) -> str:
    """Returns bytes as the plain base64 text that the original's clients decode."""
    return base64.b64encode(data).decode("ascii")


def _picture_sized(image: NDArray[Any], longest_px: int) -> NDArray[Any]:
    height, width = image.shape[:2]
    longest = max(height, width)
    if longest > longest_px:
        scale, interpolation = longest_px / longest, cv2.INTER_AREA
    elif longest < SMALLEST_SIDE_PX:
        scale, interpolation = SMALLEST_SIDE_PX / longest, cv2.INTER_NEAREST
    else:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image, size, interpolation=interpolation)


def _encode(bgr: NDArray[Any], explain: Explain) -> bytes:
    if explain is Explain.JPEG:
        ok, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    else:
        ok, data = cv2.imencode(".png", bgr, [cv2.IMWRITE_PNG_COMPRESSION, PNG_COMPRESSION])
    if not ok:
        raise ValueError(f"Expected an encodable picture. Received: {bgr.dtype} {bgr.shape}.")
    return data.tobytes()
