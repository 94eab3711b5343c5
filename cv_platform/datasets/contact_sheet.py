"""A picture of a dataset version: a row of images per class, for the web page."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cv_platform import images
from cv_platform.datasets.manifest import read_manifest
from cv_platform.fonts import by_font
from cv_platform.records import DatasetVersion

_CELL_PX = 64
_GAP_PX = 4
_LABEL_PX = 120
_MAX_CLASSES = 50
_BACKGROUND, _INK = 255, 0


def contact_sheet(version: DatasetVersion, *, per_class: int = 8) -> bytes:
    """Draws up to `per_class` readable images of each class (the first 50), chosen by sha256, and returns a PNG.

    Images keep their aspect ratio; small ones are enlarged without smoothing, so that their pixels stay visible.
    """
    manifest = read_manifest(version.manifest_path)
    usable = manifest.loc[manifest["is_readable"]].sort_values(by=["sha256", "path"])
    class_names = version.class_names[:_MAX_CLASSES]
    more = len(version.class_names) - len(class_names)
    step = _CELL_PX + _GAP_PX
    height = len(class_names) * step + _GAP_PX + (24 if more else 0)
    sheet = Image.new("RGB", (_LABEL_PX + per_class * step, height), (_BACKGROUND,) * 3)
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(class_names):
        top = _GAP_PX + row * step
        members = [row.path for row in usable.itertuples() if name in row.labels]
        for line, text in enumerate((_shortened(name), f"{len(members):,}")):
            _write(draw, top + 12 + 17 * line, text)
        for column, path in enumerate(members[:per_class]):
            data = (version.directory / path).read_bytes()
            cell = _fit(images.decode(data, max_pixels=images.MAX_LOCAL_PIXELS))
            sheet.paste(Image.fromarray(cell), (_LABEL_PX + column * step, top))
    if more:
        _write(draw, height - 20, f"and {more} more classes")
    encoded, png = cv2.imencode(".png", cv2.cvtColor(np.asarray(sheet), cv2.COLOR_RGB2BGR))
    assert encoded
    return png.tobytes()


def _write(draw: ImageDraw.ImageDraw, top: int, text: str) -> None:
    left = float(_GAP_PX)
    for run, path in by_font(text):
        font = ImageFont.truetype(path, 13)
        draw.text((left, top + 12), run, fill=(_INK,) * 3, font=font, anchor="ls")
        left += font.getlength(run)


def _shortened(name: str, length: int = 14) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _fit(image: np.ndarray) -> np.ndarray:
    """Returns `(64, 64, 3)` uint8 with the whole image centred in it."""
    height, width = image.shape[:2]
    scale = _CELL_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    cell = np.full((_CELL_PX, _CELL_PX, 3), _BACKGROUND, dtype=np.uint8)
    top, left = (_CELL_PX - size[1]) // 2, (_CELL_PX - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = resized
    return cell
