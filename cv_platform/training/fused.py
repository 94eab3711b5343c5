"""Augmentation by OpenCV: adjacent geometry becomes one interpolation, adjacent value changes one table.

The operations mean what imgaug's mean (`config.augmentation` says which there are), within what this changes: an image
is interpolated once for all adjacent geometry with one kind of border, so what one operation would push out of the
frame and the next one back is still there.

Draws are made for the whole batch at once, from one generator; pixels are touched image by image, by calls that release
the interpreter's lock. As in imgaug, a random order is drawn for a batch, everything else for an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np

from cv_platform.config.augmentation import Operation

BORDERS = {
    "constant": cv2.BORDER_CONSTANT,
    "edge": cv2.BORDER_REPLICATE,
    "symmetric": cv2.BORDER_REFLECT,
    "reflect": cv2.BORDER_REFLECT_101,
    "wrap": cv2.BORDER_WRAP,
}
INTERPOLATIONS = {0: cv2.INTER_NEAREST, 1: cv2.INTER_LINEAR, 3: cv2.INTER_CUBIC}
_NO_BORDER = ("constant", 1, 0.0)
_SPACES = {
    "YCrCb": (cv2.COLOR_RGB2YCrCb, cv2.COLOR_YCrCb2RGB, 0),
    "HSV": (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB, 2),
    "HLS": (cv2.COLOR_RGB2HLS, cv2.COLOR_HLS2RGB, 1),
    "Lab": (cv2.COLOR_RGB2LAB, cv2.COLOR_LAB2RGB, 0),
    "Luv": (cv2.COLOR_RGB2LUV, cv2.COLOR_LUV2RGB, 0),
    "YUV": (cv2.COLOR_RGB2YUV, cv2.COLOR_YUV2RGB, 0),
}
"""By imgaug's name: there, back, and which channel is the brightness."""
_VALUES = np.arange(256, dtype=np.uint8)


Pixels: TypeAlias = np.ndarray | Sequence[np.ndarray]
"""Images of a batch, `(N, H, W, 3)` uint8, in one array or each by itself."""
_ALIGNED_BYTES = 64
"""What TensorFlow asks of an array that it takes without a copy."""


def empty_images(shape: tuple[int, ...]) -> np.ndarray:
    """Returns uint8 pixels, not set, that TensorFlow takes without a copy."""
    count = math.prod(shape)
    raw = np.empty(count + _ALIGNED_BYTES, np.uint8)
    start = -raw.ctypes.data % _ALIGNED_BYTES
    return raw[start : start + count].reshape(shape)


class FusedEngine:
    """Applies operations to batches. Keeps no state: threads may share it."""

    def __init__(self, steps: Sequence[Operation]) -> None:
        self._steps = steps

    def __call__(self, images: Pixels, entropy: np.random.SeedSequence) -> np.ndarray:
        """Returns changed copies `(N, H, W, 3)` of uint8 images, RGB; `entropy` decides all draws."""
        batch = _Batch(images, np.random.default_rng(entropy))
        _apply_all(batch, self._steps, np.arange(len(images)))
        return batch.finish()


class _Batch:
    """Images with what is still to be done to their pixels: first geometry, then a table of values."""

    def __init__(self, images: Pixels, rng: np.random.Generator) -> None:
        count, (self.height, self.width) = len(images), images[0].shape[:2]
        self.rng = rng
        self._source = images
        self._images = empty_images((count, *images[0].shape))
        self._is_written = np.zeros(count, bool)
        self._flips = np.zeros((count, 2), bool)
        self._matrices = np.tile(np.eye(3), (count, 1, 1))
        self._is_bent = np.zeros(count, bool)
        self._border: tuple[str, int, float] = _NO_BORDER
        self._tables = np.tile(_VALUES[None, :, None], (count, 1, 1))
        self._has_table = np.zeros(count, bool)

    def flip(self, rows: np.ndarray, axis: int) -> None:
        """Mirrors images along x (0) or y (1)."""
        self._settle(rows[self._has_table[rows]])
        self._flips[rows, axis] ^= True
        self._matrices[rows, axis] *= -1

    def bend(self, rows: np.ndarray, matrices: np.ndarray, border: tuple[str, int, float]) -> None:
        """Moves pixels: `matrices` `(n, 3, 3)` take where they were to where they are, in pixels from the centre."""
        if border != self._border:
            self._settle(np.flatnonzero(self._is_bent))
            self._border = border
        self._settle(rows[self._has_table[rows]])
        self._matrices[rows] = matrices @ self._matrices[rows]
        self._is_bent[rows] = True

    def revalue(self, rows: np.ndarray, change: Callable[[np.ndarray], np.ndarray], *, channels: int = 1) -> None:
        """Gives values new ones: `change` takes and returns `(n, 256, C)` float32; what it returns is cut to 0–255."""
        if channels > self._tables.shape[2]:
            self._tables = np.repeat(self._tables, channels, axis=2)
        changed = change(self._tables[rows].astype(np.float32))
        # Towards zero, as imgaug does.
        self._tables[rows] = np.clip(changed, 0, 255).astype(np.uint8)
        self._has_table[rows] = True

    def repaint(self, rows: np.ndarray, paint: Callable[[int, np.ndarray, np.ndarray], np.ndarray]) -> None:
        """Gives images new pixels.

        `paint` takes the place in `rows`, an image, `(H, W, 3)` uint8, and another (or the same) that may take the
        result; it returns the result.
        """
        self._settle(rows)
        written = self._is_written[rows].tolist()
        for place, row in enumerate(rows.tolist()):
            target = self._images[row]
            painted = paint(place, target if written[place] else self._source[row], target)
            if painted is not target:
                target[:] = painted
        self._is_written[rows] = True

    def finish(self) -> np.ndarray:
        """Does what is still to be done and returns the images."""
        self._settle(np.arange(len(self._images)))
        for row in np.flatnonzero(~self._is_written).tolist():
            self._images[row] = self._source[row]
        return self._images

    def _settle(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        rows = rows[self._is_bent[rows] | self._has_table[rows] | self._flips[rows].any(axis=1)]
        mode, order, cval = self._border
        flags, border, size = INTERPOLATIONS[order], BORDERS[mode], (self.width, self.height)
        matrices = about_corner(self._matrices[rows], self.height, self.width)
        tables = np.ascontiguousarray(self._tables[rows])[:, :, None]
        bent, has_table, written = self._is_bent[rows], self._has_table[rows], self._is_written[rows]
        codes = np.select([self._flips[rows].all(axis=1), self._flips[rows, 0], self._flips[rows, 1]], [-1, 1, 0], 9)
        for place, row in enumerate(rows.tolist()):
            target = self._images[row]
            image = target if written[place] else self._source[row]
            if bent[place]:
                image = cv2.warpAffine(
                    image, matrices[place], size, dst=target, flags=flags, borderMode=border, borderValue=(cval,) * 3
                )
            elif codes[place] != 9:
                image = cv2.flip(image, int(codes[place]), dst=None if written[place] else target)
            if has_table[place]:
                image = cv2.LUT(image, tables[place], dst=target)
            if image is not target:
                target[:] = image
        self._is_written[rows] = True
        self._matrices[rows], self._is_bent[rows], self._flips[rows] = np.eye(3), False, False
        self._tables[rows], self._has_table[rows] = _VALUES[:, None], False


def _apply_all(batch: _Batch, operations: Sequence[Operation], rows: np.ndarray, *, is_mixed: bool = False) -> None:
    order = batch.rng.permutation(len(operations)) if is_mixed else range(len(operations))
    for index in order:
        _apply(batch, operations[index], rows)


def _apply(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    if len(rows):
        FUSED[operation.name](batch, operation, rows)


def _sequential(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    _apply_all(batch, operation.children["children"], rows, is_mixed=operation.arguments.get("random_order", False))


def _sometimes(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    is_chosen = _hit(batch, operation.arguments.get("p", 0.5), len(rows))
    _apply_all(batch, operation.children.get("then_list", ()), rows[is_chosen])
    _apply_all(batch, operation.children.get("else_list", ()), rows[~is_chosen])


def _one_of(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    chosen = batch.rng.integers(len(operation.children["children"]), size=len(rows))
    for index, child in enumerate(operation.children["children"]):
        _apply(batch, child, rows[chosen == index])


def _some_of(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    children, n = operation.children["children"], operation.arguments.get("n")
    count = len(children)
    if isinstance(n, tuple):
        wanted = batch.rng.integers(min(n[0], count), min(n[1], count), endpoint=True, size=len(rows))
    else:
        wanted = np.full(len(rows), count if n is None else min(n, count))
    rank = batch.rng.permuted(np.tile(np.arange(count), (len(rows), 1)), axis=1)
    order = batch.rng.permutation(count) if operation.arguments.get("random_order", False) else range(count)
    for index in order:
        _apply(batch, children[index], rows[rank[:, index] < wanted])


def _hit(batch: _Batch, share: float, count: int) -> np.ndarray:
    return batch.rng.random(count) < share


def _draw(batch: _Batch, value: Any, count: int, *, is_whole: bool = False) -> np.ndarray:
    """Returns `(count,)` float64: a number as it is, a range or a choice drawn for each."""
    if isinstance(value, tuple):
        if is_whole:
            return batch.rng.integers(value[0], value[1], endpoint=True, size=count).astype(float)
        return batch.rng.uniform(value[0], value[1], count)
    if isinstance(value, list):
        return np.asarray(value, float)[batch.rng.integers(len(value), size=count)]
    return np.full(count, float(value))


def _draw_axes(batch: _Batch, value: Any, count: int, *, otherwise: float, is_whole: bool = False) -> np.ndarray:
    """Returns `(2, count)`: for x and y, the same draw unless they were given apart."""
    if isinstance(value, dict):
        return np.stack([_draw(batch, value.get(axis, otherwise), count, is_whole=is_whole) for axis in ("x", "y")])
    return np.tile(_draw(batch, value, count, is_whole=is_whole), (2, 1))


def _flip_over(axis: int) -> Callable[[_Batch, Operation, np.ndarray], None]:
    def flip(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
        batch.flip(rows[_hit(batch, operation.arguments.get("p", 1.0), len(rows))], axis)

    return flip


def _affine(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    given, count = operation.arguments, len(rows)
    scale = _draw_axes(batch, given.get("scale", 1.0), count, otherwise=1.0)
    size = np.array([[batch.width], [batch.height]])
    shift = _draw_axes(batch, given.get("translate_percent", 0.0), count, otherwise=0.0) * size
    if "translate_px" in given:
        shift = _draw_axes(batch, given["translate_px"], count, otherwise=0.0, is_whole=True)
    rotate = np.deg2rad(_draw(batch, given.get("rotate", 0.0), count))
    shear = given.get("shear", 0.0)
    # imgaug: a number or a range shears along x alone.
    sheared = _draw_axes(batch, shear if isinstance(shear, dict) else {"x": shear}, count, otherwise=0.0)
    batch.bend(rows, affine_matrices(scale, shift, rotate, np.deg2rad(sheared)), _border(batch, given))


def affine_matrices(scale: np.ndarray, shift: np.ndarray, rotate: np.ndarray, shear: np.ndarray) -> np.ndarray:
    """Returns `(n, 3, 3)`: shear along y first, then scale, shear along x, rotation and shift, as imgaug's `Affine`."""
    matrices = np.tile(np.eye(3), (len(rotate), 1, 1))
    cos, sin, lean = np.cos(rotate), np.sin(rotate), np.tan(shear[0])
    matrices[:, 0, 0], matrices[:, 1, 0] = scale[0] * cos, scale[0] * sin
    matrices[:, 0, 1], matrices[:, 1, 1] = -scale[1] * (lean * cos + sin), -scale[1] * (lean * sin - cos)
    matrices[:, :2, 2] = shift.T
    if shear[1].any():
        before = np.tile(np.eye(3), (len(rotate), 1, 1))
        before[:, 1, 0] = np.tan(shear[1])
        matrices = matrices @ before
    return matrices


def about_corner(matrices: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns `(n, 2, 3)` float64: matrices about the centre, `(n, 3, 3)`, for coordinates from the first pixel's."""
    centre, moved = np.array([(width - 1) / 2, (height - 1) / 2]), matrices[:, :2].copy()
    moved[:, :, 2] += centre - moved[:, :, :2] @ centre
    return moved


def _as_affine(parameter: str, axis: str | None, *names: str) -> Callable[[_Batch, Operation, np.ndarray], None]:
    """Returns what imgaug makes of `Affine`: one of its parameters, along one axis, under a name of its own."""

    def apply(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
        given = dict(operation.arguments)
        for name in names:
            if name in given or len(names) == 1:
                value = given.pop(name, _DEFAULTS.get((operation.name, name)))
                target = f"{parameter}_{name}" if parameter == "translate" else parameter
                given[target] = {axis: value} if axis else value
        _affine(batch, Operation("Affine", given), rows)

    return apply


_DEFAULTS: Mapping[tuple[str, str], Any] = {
    ("Rotate", "rotate"): (-30, 30),
    ("ShearX", "shear"): (-30, 30),
    ("ShearY", "shear"): (-30, 30),
    ("ScaleX", "scale"): (0.5, 1.5),
    ("ScaleY", "scale"): (0.5, 1.5),
}


def _border(batch: _Batch, given: Mapping[str, Any], mode: str = "mode", cval: str = "cval") -> tuple[str, int, float]:
    """Returns the kind of border; its grey level is drawn for a batch, not for an image."""
    return given.get(mode, "constant"), given.get("order", 1), float(_draw(batch, given.get(cval, 0), 1)[0])


def _sides(sign: int) -> Callable[[_Batch, Operation, np.ndarray], None]:
    """Returns what moves the four sides out (1) or in (-1), and brings the image back to its size."""

    def apply(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
        given, count = operation.arguments, len(rows)
        drawn = given["px" if "px" in given else "percent"]
        if given.get("sample_independently", True):
            moved = np.stack([_draw(batch, drawn, count, is_whole="px" in given) for _ in range(4)])
        else:
            moved = np.tile(_draw(batch, drawn, count, is_whole="px" in given), (4, 1))
        size = np.array([batch.height, batch.width, batch.height, batch.width])[:, None]
        top, right, bottom, left = sign * np.round(moved if "px" in given else moved * size)
        # An image keeps a pixel at least, in its middle where more would be cut away.
        wide = np.maximum(1.0, batch.width + left + right)
        high = np.maximum(1.0, batch.height + top + bottom)
        matrices = np.tile(np.eye(3), (count, 1, 1))
        matrices[:, 0, 0], matrices[:, 1, 1] = batch.width / wide, batch.height / high
        matrices[:, 0, 2] = (left - right) / 2 * matrices[:, 0, 0]
        matrices[:, 1, 2] = (top - bottom) / 2 * matrices[:, 1, 1]
        batch.bend(rows, matrices, _border(batch, given, "pad_mode", "pad_cval"))

    return apply


def _for_channels(batch: _Batch, operation: Operation, name: str, default: Any, count: int) -> np.ndarray:
    """Returns `(n, 1, 1)` draws, or `(n, 1, 3)` where `per_channel` asks for others in each channel."""
    value, share = operation.arguments.get(name, default), float(operation.arguments.get("per_channel", False))
    drawn = _draw(batch, value, count)[:, None, None]
    if not share:
        return drawn
    apart = np.stack([_draw(batch, value, count) for _ in range(3)], axis=-1)[:, None]
    return np.where(_hit(batch, share, count)[:, None, None], apart, drawn)


def _revalued(
    name: str, default: Any, change: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Callable[[_Batch, Operation, np.ndarray], None]:
    """Returns what changes values by one number: `change` takes values as float32, and the numbers."""

    def apply(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
        numbers = _for_channels(batch, operation, name, default, len(rows)).astype(np.float32)
        batch.revalue(rows, lambda values: change(values, numbers), channels=numbers.shape[2])

    return apply


def _invert(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    share, count = operation.arguments.get("p", 1.0), len(rows)
    is_hit = _hit(batch, share, count)[:, None, None]
    if (by_channel := float(operation.arguments.get("per_channel", False))) > 0:
        apart = (batch.rng.random((count, 1, 3)) < share) & np.ones((count, 1, 3), bool)
        is_hit = np.where(_hit(batch, by_channel, count)[:, None, None], apart, is_hit)
    batch.revalue(rows, lambda values: np.where(is_hit, 255 - values, values), channels=is_hit.shape[2])


def _solarize(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    rows = rows[_hit(batch, operation.arguments.get("p", 1.0), len(rows))]
    limits = _draw(batch, operation.arguments.get("threshold", (64, 192)), len(rows))[:, None, None]
    if len(rows):
        batch.revalue(rows, lambda values: np.where(values >= limits, 255 - values, values))


def _posterize(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    bits = _draw(batch, operation.arguments.get("nb_bits", (1, 8)), len(rows), is_whole=True)[:, None, None]
    step = np.exp2(8 - bits)
    batch.revalue(rows, lambda values: np.floor(values / step) * step)


_LUMA = np.array([0.299, 0.587, 0.114])


def _grayscale(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    alpha = _draw(batch, operation.arguments.get("alpha", 1.0), len(rows))[:, None, None]
    mixes = (1 - alpha) * np.eye(3) + alpha * _LUMA
    batch.repaint(rows, lambda place, image, target: cv2.transform(image, mixes[place]))


def _brightness(name: str, default: Any, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Any:
    """Returns what changes the brightness channel of one of six colour spaces, which is drawn for each image."""

    def apply(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
        given, count = operation.arguments, len(rows)
        numbers = _draw(batch, given.get(name, default), count).astype(np.float32)
        spaces = [given["to_colorspace"]] if "to_colorspace" in given else list(_SPACES)
        chosen = [_SPACES[spaces[index]] for index in batch.rng.integers(len(spaces), size=count).tolist()]
        tables = np.clip(change(_VALUES.astype(np.float32)[None], numbers[:, None]), 0, 255).astype(np.uint8)
        _repaint_in(batch, rows, chosen, tables)

    return apply


def _repaint_in(batch: _Batch, rows: np.ndarray, spaces: Sequence[tuple[int, int, int]], changed: np.ndarray) -> None:
    """Gives a channel new values in another colour space: there, back and channel for each image, `(n, 256)` tables."""
    tables = np.tile(_VALUES[:, None, None], (len(rows), 1, 1, 3))
    tables[np.arange(len(rows)), :, 0, [channel for _, _, channel in spaces]] = changed

    def paint(place: int, image: np.ndarray, target: np.ndarray) -> np.ndarray:
        there, back, _ = spaces[place]
        converted = cv2.cvtColor(image, there)
        return cv2.cvtColor(cv2.LUT(converted, tables[place], dst=converted), back, dst=target)

    batch.repaint(rows, paint)


def _in_hsv(channel: int, rows: np.ndarray) -> Sequence[tuple[int, int, int]]:
    return [(cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB, channel)] * len(rows)


def _add_to_hue(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    turns = _draw(batch, operation.arguments.get("value", (-255, 255)), len(rows), is_whole=True) / 255 * 180
    tables = ((_VALUES[None].astype(np.int64) + turns.astype(np.int64)[:, None]) % 180).astype(np.uint8)
    _repaint_in(batch, rows, _in_hsv(0, rows), tables)


def _saturation(
    name: str, default: Any, change: Callable[[np.ndarray, np.ndarray], np.ndarray], *, is_whole: bool
) -> Callable[[_Batch, Operation, np.ndarray], None]:
    def apply(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
        numbers = _draw(batch, operation.arguments.get(name, default), len(rows), is_whole=is_whole)[:, None]
        tables = np.clip(change(_VALUES.astype(np.float64)[None], numbers), 0, 255).astype(np.uint8)
        _repaint_in(batch, rows, _in_hsv(1, rows), tables)

    return apply


def _noise(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    given, count = operation.arguments, len(rows)
    loc, scale = _draw(batch, given.get("loc", 0), count), _draw(batch, given.get("scale", (0, 15)), count)
    is_apart = _hit(batch, float(given.get("per_channel", False)), count)

    def paint(place: int, image: np.ndarray, target: np.ndarray) -> np.ndarray:
        shape = image.shape if is_apart[place] else (*image.shape[:2], 1)
        drawn = batch.rng.standard_normal(shape, dtype=np.float32)
        drawn *= np.float32(scale[place])
        drawn += np.float32(loc[place])
        noisy = np.rint(image + drawn)
        return np.clip(noisy, 0, 255, out=noisy)

    batch.repaint(rows, paint)


def _cutout(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    given, count = operation.arguments, len(rows)
    holes = _draw(batch, given.get("nb_iterations", 1), count, is_whole=True).astype(int)
    places = batch.rng.random((count, max(1, int(holes.max())), 2))
    sides = np.stack([_draw(batch, given.get("size", 0.2), count) for _ in range(2)], axis=1)
    if given.get("squared", True):
        sides = np.tile(sides[:, :1] * min(batch.height, batch.width), (1, 2))
    else:
        sides = sides * [batch.height, batch.width]
    fill = _draw(batch, given.get("cval", 128), count)

    def paint(place: int, image: np.ndarray, target: np.ndarray) -> np.ndarray:
        image = image.copy()
        for y, x in places[place, : holes[place]] * [batch.height, batch.width]:
            (high, wide) = sides[place] / 2
            rows_cut = slice(max(0, round(y - high)), max(0, round(y + high)))
            image[rows_cut, max(0, round(x - wide)) : max(0, round(x + wide))] = fill[place]
        return image

    batch.repaint(rows, paint)


def _blur(batch: _Batch, operation: Operation, rows: np.ndarray) -> None:
    sigmas = _draw(batch, operation.arguments.get("sigma", (0.0, 3.0)), len(rows))

    def paint(place: int, image: np.ndarray, target: np.ndarray) -> np.ndarray:
        sigma = float(sigmas[place])
        if sigma < 1e-3:
            return image
        # imgaug's kernels: they hold 95 to 99 % of the weight.
        wide = max(5, math.floor(sigma * (3.3 if sigma < 3 else 2.9 if sigma < 5 else 2.6)))
        return cv2.GaussianBlur(image, (wide | 1, wide | 1), sigma, borderType=cv2.BORDER_REFLECT_101)

    batch.repaint(rows, paint)


FUSED: Mapping[str, Callable[[_Batch, Operation, np.ndarray], None]] = {
    "Sequential": _sequential,
    "Sometimes": _sometimes,
    "OneOf": _one_of,
    "SomeOf": _some_of,
    "Identity": lambda batch, operation, rows: None,
    "Fliplr": _flip_over(0),
    "Flipud": _flip_over(1),
    "Affine": _affine,
    "Rotate": _as_affine("rotate", None, "rotate"),
    "ShearX": _as_affine("shear", "x", "shear"),
    "ShearY": _as_affine("shear", "y", "shear"),
    "ScaleX": _as_affine("scale", "x", "scale"),
    "ScaleY": _as_affine("scale", "y", "scale"),
    "TranslateX": _as_affine("translate", "x", "percent", "px"),
    "TranslateY": _as_affine("translate", "y", "percent", "px"),
    "Crop": _sides(-1),
    "Pad": _sides(1),
    "CropAndPad": _sides(1),
    "Multiply": _revalued("mul", (0.8, 1.2), lambda values, factor: values * factor),
    "Add": _revalued("value", (-20, 20), lambda values, summand: values + np.rint(summand)),
    "LinearContrast": _revalued("alpha", (0.6, 1.4), lambda values, slope: 127 + slope * (values - 127)),
    "GammaContrast": _revalued("gamma", (0.7, 1.7), lambda values, power: 255 * (values / 255) ** power),
    "Invert": _invert,
    "Solarize": _solarize,
    "Posterize": _posterize,
    "Grayscale": _grayscale,
    "AddToBrightness": _brightness("add", (-30, 30), lambda values, summand: values + np.trunc(summand)),
    "MultiplyBrightness": _brightness("mul", (0.7, 1.3), lambda values, factor: values * factor),
    "AddToHue": _add_to_hue,
    "AddToSaturation": _saturation("value", (-75, 75), lambda values, summand: values + summand, is_whole=True),
    "MultiplySaturation": _saturation("mul", (0.0, 3.0), lambda values, factor: values * factor, is_whole=False),
    "AdditiveGaussianNoise": _noise,
    "Cutout": _cutout,
    "GaussianBlur": _blur,
}
"""By imgaug's name. How to add one: a function here, and `is_fused` in `config.augmentation`; the tests compare it with
imgaug's."""
