"""Finds parts of the test split on which a model does worse than on the rest: by pixels, by size, by manifest column.

Whoever looks at fifty parts finds some that are bad by chance, so the p-values are corrected for how many were looked
at (Holm 1979). A numeric column gives its quarters, any other one its values.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy import stats

from cv_platform.evaluation.intervals import wilson
from cv_platform.properties import PROPERTY_NAMES
from cv_platform.records import Slice

_FEWEST = 10
"""Images from which a part is judged."""
_MOST_VALUES = 20
_QUARTERS = 4
_ALPHA = 0.05
_NOT_SLICED = {
    *("path", "sha256", "split", "labels", "unknown_labels", "status", "reason", "is_readable", "problem"),
    *("largest_sample", *PROPERTY_NAMES),
}
"""Most files have no largest sample. The manifest has the properties of an overview, and here are those of what the
model sees."""
_KINDS = ("channels", "bit_depth", "orientation")
"""Columns whose numbers are names: a part is one of them."""


def slice_columns(properties: np.ndarray, manifest: pd.DataFrame) -> pd.DataFrame:
    """Returns what the test images are sliced by: their properties, and the manifest's columns but for its keys.

    Args:
        properties: `(N, 7)` float32 of `batch_properties`.
        manifest: a row per image, in the same order.
    """
    shown = pd.DataFrame(properties, columns=pd.Index(PROPERTY_NAMES))
    known = manifest.drop(columns=[name for name in manifest if name in _NOT_SLICED]).reset_index(drop=True)
    known = known.assign(**{name: known[name].astype(str) for name in _KINDS if name in known})
    if {"width_px", "height_px"} <= set(known):
        known = known.assign(
            pixels=known["width_px"] * known["height_px"], aspect=known["width_px"] / known["height_px"]
        )
    return pd.concat([shown, known], axis=1)


def judge_slices(columns: pd.DataFrame, correct: np.ndarray) -> tuple[Slice, ...]:
    """Returns every part that has enough images, the one that is worst beyond chance first.

    `p_value` is Fisher's exact one, that the part is no worse than the rest, corrected for the number of parts.

    Args:
        columns: a row per image, see `slice_columns`.
        correct: `(N,)` bool.
    """
    found = []
    for column, value, mask in _parts(columns):
        inside, right = int(mask.sum()), int(correct[mask].sum())
        if inside < _FEWEST or len(correct) - inside < _FEWEST:
            continue
        # Of all right answers, so few or fewer fall into this part.
        chance = float(stats.hypergeom.cdf(right, len(correct), int(correct.sum()), inside))
        found.append((chance, column, value, inside, right))
    found.sort()
    slices, floor = [], 0.0
    for rank, (chance, column, value, inside, right) in enumerate(found):
        floor = max(floor, min(1.0, chance * (len(found) - rank)))
        interval = wilson(right, inside)
        assert interval is not None  # There are images.
        slices.append(
            Slice(
                column=column,
                value=value,
                images=inside,
                accuracy=right / inside,
                low=interval[0],
                high=interval[1],
                p_value=floor,
                is_worse=floor <= _ALPHA,
            )
        )
    return tuple(slices)


def _parts(columns: pd.DataFrame) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields column, value and `(N,)` bool of each part; nothing of a column that is one value throughout."""
    for name in columns:
        values = columns[name]
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
            edges = np.unique(np.nanquantile(values.to_numpy(float), np.linspace(0, 1, _QUARTERS + 1)))
            if len(edges) < 3:
                continue
            place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
            for index in range(len(edges) - 1):
                yield str(name), f"{edges[index]:.4g} to {edges[index + 1]:.4g}", np.asarray(place == index)
            continue
        texts = values.astype(object).where(values.notna(), "none").astype(str)
        counts = texts.value_counts()
        if 1 < len(counts) <= _MOST_VALUES:
            for value in counts.index:
                yield str(name), str(value), (texts == value).to_numpy()
