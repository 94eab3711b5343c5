"""Which part of a window has moved: the requests of one API key, tag or network, each compared with the reference.

It explains a verdict, and never makes one. The parts that have most requests are looked at, a bounded number however
many names clients think of, and the p-values are corrected for how many that were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.family import DETECTORS, KsDetector
from cv_platform.drift.sample import DriftSample
from cv_platform.drift.two_sample import holm
from cv_platform.records import MovedSlice, SliceColumn

SLICE_COLUMNS: tuple[SliceColumn, ...] = ("client", "tag", "network")
FEWEST_ROWS = 20
MOST_SLICES = 10
"""Of one column."""
Slices = dict[tuple[SliceColumn, str], NDArray[np.bool_]]
"""Which rows have a value of a column."""


def frequent(counts: Counter[str], total: int) -> list[str]:
    """Returns the values that enough of `total` rows have, the most frequent first; one that all have is no part."""
    return [value for value, count in counts.most_common() if FEWEST_ROWS <= count < total][:MOST_SLICES]


def named_slices(columns: Mapping[SliceColumn, Sequence[str | None]]) -> Slices:
    """Returns which rows each frequent API key, tag and network has, from the values of the rows."""
    found: Slices = {}
    for column, values in columns.items():
        for value in frequent(Counter(one for one in values if one), len(values)):
            found[column, value] = np.array([one == value for one in values], dtype=np.bool_)
    return found


def moved_slices(
    reference: DriftSample,
    current: DriftSample,
    slices: Mapping[tuple[SliceColumn, str], NDArray[np.bool_]],
    *,
    alpha: float,
) -> tuple[MovedSlice, ...]:
    """Compares the rows of each slice with the reference; the clearest first.

    Args:
        reference: what the window is compared with.
        current: the window's rows.
        slices: of `named_slices`, with two rows at least each.
        alpha: the largest rate of a slice that is said to have moved, over all of them.
    """
    # Without permutations their p-values can be as small as many slices need, and they take milliseconds.
    tests = [detector for detector in DETECTORS if isinstance(detector, KsDetector)]
    found: dict[tuple[SliceColumn, str], tuple[float, str, float]] = {}
    for name, rows in slices.items():
        tested = {test.title: test.compare(reference, current.take(rows)) for test in tests}
        title, clearest = min(tested.items(), key=lambda item: item[1].p_value)
        found[name] = (min(1.0, clearest.p_value * len(tests)), title, float(clearest.distances.max()))
    names = list(found)
    corrected = holm({str(at): found[name][0] for at, name in enumerate(names)})
    adjusted = {name: corrected[str(at)] for at, name in enumerate(names)}
    moved = [
        MovedSlice(
            column=column,
            value=value,
            rows=int(slices[column, value].sum()),
            test=title,
            ks_distance=distance,
            adjusted_p_value=adjusted[column, value],
            has_moved=adjusted[column, value] <= alpha,
        )
        for (column, value), (_, title, distance) in found.items()
    ]
    return tuple(sorted(moved, key=lambda one: (one.adjusted_p_value, -one.ks_distance, one.column, one.value)))
