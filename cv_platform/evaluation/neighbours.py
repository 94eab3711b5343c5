"""Which training images look most like a test image: what a model may have confused it with, or learned it from.

By the vectors of the pretrained encoder (`datasets.embeddings`), which know nothing of the model that is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cv_platform.datasets.embeddings import read_embeddings
from cv_platform.datasets.packing import PackedSplit
from cv_platform.records import Embeddings

_ROWS = 10_000


@dataclass(frozen=True)
class Neighbours:
    """The training images, and the vectors by which they are compared.

    Attributes:
        train: the split.
        embeddings: of all images of the dataset version.
        manifest: its name.
    """

    train: PackedSplit
    embeddings: Embeddings
    manifest: str

    def nearest(self, paths: Sequence[str]) -> list[int | None]:
        """Returns the row of the most alike training image for each image; None where one has no vector.

        Raises:
            DatasetError: the embeddings are of another version, or gone.
        """
        asked = _directions(read_embeddings(self.embeddings, self.manifest, paths))
        known = read_embeddings(self.embeddings, self.manifest, self.train.paths)
        best, rows = np.full(len(paths), -np.inf), np.full(len(paths), -1)
        for start in range(0, len(known), _ROWS):
            alike = np.nan_to_num(asked @ _directions(known[start : start + _ROWS]).T, nan=-np.inf)
            at = alike.argmax(axis=1)
            found = alike[np.arange(len(paths)), at]
            rows = np.where(found > best, start + at, rows)
            best = np.maximum(best, found)
        return [int(row) if row >= 0 else None for row in rows]


def _directions(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
