"""Chooses the golden images, on which a bundle is compared with its source and tests itself wherever it is loaded."""

from __future__ import annotations

import numpy as np

_SEED = 0


def golden_rows(targets: np.ndarray, count: int) -> list[int]:
    """Returns the rows of `count` images (of all, where there are fewer), seeded, of as many classes as can be.

    The classes take turns until there are enough; an image of several classes stands for the one whose turn it is.
    Images of no class fill up what is left.

    Args:
        targets: `(N,)` class indices, or `(N, C)` of 0 and 1, as in `packing.PackedSplit`.
        count: at least 1.
    """
    generator = np.random.default_rng(_SEED)
    rows = generator.permutation(len(targets))
    shuffled = np.asarray(targets)[rows]
    members = shuffled.T > 0.5 if shuffled.ndim == 2 else np.unique(shuffled)[:, None] == shuffled
    queues = [iter(rows[is_member].tolist()) for is_member in generator.permutation(members)]
    chosen: set[int] = set()
    while queues and len(chosen) < count:
        for queue in tuple(queues):
            row = next((row for row in queue if row not in chosen), None)
            if row is None:
                queues.remove(queue)
            elif len(chosen) < count:
                chosen.add(row)
    others = [row for row in rows.tolist() if row not in chosen]
    return sorted([*chosen, *others[: count - len(chosen)]])
