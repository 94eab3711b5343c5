"""Pictures of dataset versions for the web page: a row of images for each class, or for each kind of change."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cv_platform import images
from cv_platform.datasets.manifest import manifest_parts
from cv_platform.errors import ImageError
from cv_platform.files import write_file
from cv_platform.pages.fonts import by_font
from cv_platform.records import DatasetVersion

_CELL_PX = 96
_GAP_PX = 4
_LETTER_PX = 8
_MAX_ROWS = 50
_BACKGROUND, _INK, _NOTHING = 255, 0, 224


@dataclass(frozen=True)
class SheetRow:
    """A row of a sheet: two lines of text, and its images: files, or `(H, W, 3)` uint8, RGB."""

    title: str
    note: str
    files: Sequence[Path | np.ndarray]


def keep_contact_sheet(version: DatasetVersion) -> Path:
    """Returns the file of a version's contact sheet, beside its manifest; it is drawn once for an order of classes."""
    order = hashlib.sha256(json.dumps(version.class_names).encode()).hexdigest()[:8]
    sheet = version.manifest_path.with_suffix(f".{order}.png")
    # A checkout that has changed is made again, and then has no sheet.
    if not sheet.exists():
        write_file(sheet, contact_sheet(version))
    return sheet


def contact_sheet(version: DatasetVersion, *, per_class: int = 8) -> bytes:
    """Draws up to `per_class` readable images of each class (the first 50), chosen by sha256, and returns a PNG."""
    counts, first = Counter[str](), defaultdict[str, list[tuple[str, str]]](list)
    for part in manifest_parts(version.manifest_path, ("sha256", "path", "labels", "status")):
        images = [image for image in part.to_pylist() if image["status"] == "used"]
        counts.update(label for image in images for label in image["labels"])
        for name in version.class_names:
            members = ((image["sha256"], image["path"]) for image in images if name in image["labels"])
            first[name] = heapq.nsmallest(per_class, [*first[name], *members])
    rows = [
        SheetRow(name, f"{counts[name]:,}", [version.directory / path for _, path in first[name]])
        for name in version.class_names
    ]
    return draw_sheet(rows, columns=per_class, what="classes", sample_bits=version.sample_bits)


def draw_sheet(
    rows: Sequence[SheetRow],
    *,
    columns: int = 8,
    letters: int = 14,
    what: str = "rows",
    sample_bits: int | None = None,
) -> bytes:
    """Draws rows of images (the first 50) and returns a PNG.

    Images keep their aspect ratio; small ones are enlarged without smoothing, so that their pixels stay visible. What
    does not decode is a grey square.

    Args:
        rows: what is drawn, from above.
        columns: the most images of a row.
        letters: the most of a title; longer ones are cut.
        what: the rows are, for those that are left out.
        sample_bits: by which files are decoded, see `images.Preprocessing`.
    """
    shown, more = rows[:_MAX_ROWS], max(0, len(rows) - _MAX_ROWS)
    step, label_px = _CELL_PX + _GAP_PX, letters * _LETTER_PX + 8
    height = len(shown) * step + _GAP_PX + (24 if more else 0)
    sheet = Image.new("RGB", (label_px + columns * step, height), (_BACKGROUND,) * 3)
    draw = ImageDraw.Draw(sheet)
    for at, row in enumerate(shown):
        top = _GAP_PX + at * step
        for line, text in enumerate((_shortened(row.title, letters), row.note)):
            _write(draw, top + 12 + 17 * line, text)
        for column, image in enumerate(row.files[:columns]):
            sheet.paste(Image.fromarray(_cell(image, sample_bits)), (label_px + column * step, top))
    if more:
        _write(draw, height - 20, f"and {more} more {what}")
    encoded, png = cv2.imencode(".png", cv2.cvtColor(np.asarray(sheet), cv2.COLOR_RGB2BGR))
    assert encoded
    return png.tobytes()


def _write(draw: ImageDraw.ImageDraw, top: int, text: str) -> None:
    left = float(_GAP_PX)
    for run, path in by_font(text):
        font = ImageFont.truetype(path, 13)
        draw.text((left, top + 12), run, fill=(_INK,) * 3, font=font, anchor="ls")
        left += font.getlength(run)


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _cell(image: Path | np.ndarray, sample_bits: int | None) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return _fit(image)
    try:
        made = images.Preprocessing(sample_bits=sample_bits)
        return _fit(images.decode(image.read_bytes(), max_pixels=images.MAX_LOCAL_PIXELS, preprocessing=made))
    except (ImageError, OSError):
        return np.full((_CELL_PX, _CELL_PX, 3), _NOTHING, dtype=np.uint8)


def _fit(image: np.ndarray) -> np.ndarray:
    """Returns `(96, 96, 3)` uint8 with the whole image centred in it."""
    height, width = image.shape[:2]
    scale = _CELL_PX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    cell = np.full((_CELL_PX, _CELL_PX, 3), _BACKGROUND, dtype=np.uint8)
    top, left = (_CELL_PX - size[1]) // 2, (_CELL_PX - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = resized
    return cell
