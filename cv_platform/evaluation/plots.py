"""The pictures of an evaluation, as PNG files. Figures are made without pyplot, whose state all threads share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cv_platform.evaluation.metrics import ReliabilityBin
from cv_platform.pages.fonts import matplotlib_families

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_NUMBERED = 25
"""Up to this many classes, cells carry their counts and axes every name."""
_MAX_LETTERS = 24
_BLUE, _RED = "#2f6db3", "#b3322f"


class Interval(NamedTuple):
    """A measured share, its confidence interval, and what it was expected to be; all 0–1."""

    name: str
    value: float
    low: float
    high: float
    expected: float | None


def save_confusion_matrix(
    path: Path, matrix: np.ndarray, class_names: Sequence[str], *, what: str = "images of the test split"
) -> None:
    """Draws `(C, C)` counts, coloured by their share of the true class (row)."""
    classes = len(class_names)
    side = min(max(4.0, 0.45 * classes + 2.0), 14.0)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    if classes <= _MAX_NUMBERED:
        names = [_short(name) for name in class_names]
        axes.set_xticks(range(classes), labels=names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), labels=names, parse_math=False)
        for row in range(classes):
            for column in range(classes):
                if matrix[row, column]:
                    colour = "white" if shares[row, column] > 0.5 else "black"
                    axes.text(column, row, str(matrix[row, column]), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"Confusion matrix ({what})", parse_math=False)
    _save(figure, path)


def save_per_class(path: Path, rows: Sequence[Mapping[str, float | None]], class_names: Sequence[str]) -> None:
    """Draws precision, recall and F1 of each class; what is undefined has no bar."""
    figure = _figure(8.0, min(max(3.0, 0.45 * len(rows) + 1.5), 40.0))
    axes = figure.subplots()
    places = np.arange(len(rows))
    for offset, key, colour in ((-0.25, "precision", "#7aa6d6"), (0.0, "recall", "#c9a24b"), (0.25, "f1", _BLUE)):
        axes.barh(places + offset, [row[key] or 0.0 for row in rows], height=0.24, color=colour, label=key)
    axes.set_yticks(places, labels=[_short(name) for name in class_names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.legend(loc="lower right")
    axes.set_title("Precision, recall and F1 per class (test split)")
    _save(figure, path)


def save_intervals(path: Path, rows: Sequence[Interval], title: str) -> None:
    """Draws shares with their confidence intervals, one below the other, and a mark at what was expected of each."""
    figure = _figure(8.0, min(max(2.5, 0.5 * len(rows) + 1.5), 20.0))
    axes = figure.subplots()
    places = np.arange(len(rows))
    for place, row in zip(places, rows, strict=True):
        axes.plot([row.low, row.high], [place, place], color=_BLUE, linewidth=2)
        axes.plot([row.value], [place], "o", color=_BLUE)
        if row.expected is not None:
            axes.plot([row.expected], [place], "|", color=_RED, markersize=18, markeredgewidth=2)
    axes.set_yticks(places, labels=[row.name for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title, parse_math=False)
    _save(figure, path)


def save_reliability(
    path: Path, table: Sequence[ReliabilityBin], error: float | None, before: Sequence[ReliabilityBin] = ()
) -> None:
    """Draws accuracy against confidence, and how many predictions each bin has; `before` is without the temperature."""
    figure = _figure(5.5, 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = table[0].upper - table[0].lower
    used = [row for row in table if row.accuracy is not None]
    upper.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    upper.bar(
        [row.lower for row in used],
        [row.accuracy or 0.0 for row in used],
        width,
        align="edge",
        color=_BLUE,
        edgecolor="white",
    )
    upper.plot([row.confidence for row in used], [row.accuracy for row in used], "o", color=_RED, markersize=4)
    if known := [row for row in before if row.accuracy is not None]:
        points = [row.confidence for row in known], [row.accuracy for row in known]
        upper.plot(*points, "x-", color="grey", linewidth=1, label="before calibration")
        upper.legend(loc="upper left")
    upper.set_ylim(0, 1)
    upper.set_ylabel("accuracy")
    upper.set_title("Reliability" + ("" if error is None else f": expected calibration error {error:.3f}"))
    lower.bar(
        [row.lower for row in table],
        [row.count for row in table],
        width,
        align="edge",
        color="#9aa6b5",
        edgecolor="white",
    )
    lower.set_xlim(0, 1)
    lower.set_ylabel("predictions")
    lower.set_xlabel("confidence")
    _save(figure, path)


def save_worst_errors(path: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Draws a sheet of `(H, W or more, 3)` uint8 RGB images, each with its caption; without images it says so."""
    aspect = max((image.shape[0] / image.shape[1] for image in images), default=1.0)
    columns = min(max(len(images), 1), 4 if aspect > 0.4 else 3)
    rows = max(-(-len(images) // columns), 1)
    width = 9.6 / 4 if aspect > 0.4 else 9.6 / 3
    figure = _figure(width * columns, (width * aspect + 0.7) * rows)
    cells = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, image, words in zip(cells, images, captions, strict=False):
        cell.imshow(image, interpolation="nearest")
        cell.set_title(words, fontsize=8, parse_math=False)
    if not images:
        cells[0].text(0.5, 0.5, "no mistakes", ha="center", va="center")
    _save(figure, path)


def caption(true: str, predicted: str, confidence: float) -> str:
    """Returns the caption of one mistake."""
    return f"true: {_short(true) or 'none'}\npredicted: {_short(predicted) or 'none'}\nconfidence {confidence:.3f}"


def _short(name: str) -> str:
    return name if len(name) <= _MAX_LETTERS else name[: _MAX_LETTERS - 1] + "…"


def _figure(width_inches: float, height_inches: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width_inches, height_inches), layout="constrained")


def _save(figure: Figure, path: Path) -> None:
    from matplotlib.text import Text

    with warnings.catch_warnings():
        # `fonts_for` says what no font of this machine has: boxes are drawn, which is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.draw_without_rendering()  # Only now do all labels have their texts.
        texts = [text for text in figure.findobj(Text) if isinstance(text, Text)]
        families = matplotlib_families(text.get_text() for text in texts)
        for text in texts:
            text.set_fontfamily(families)
        figure.savefig(path, format="png", dpi=110)
