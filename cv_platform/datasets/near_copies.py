"""Finds images that show the same picture though their bytes differ: saved again, cropped, mirrored, brightened.

Candidates are each image's nearest neighbours, by its coarse grey levels (as they are and mirrored) and, where they are
given, by the vectors of the pretrained encoder. What decides is the correlation of grey levels: that of one thumbnail
with the other, or with a part of it that is up to an eighth smaller, and the mirror images of both. The measurements
behind the numbers are in docs/explanation/near-copies.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_platform.compute.blas import one_blas_thread
from cv_platform.images import resize

THUMBNAIL_PX = 32
MAX_DISTANCE = 0.02
"""1 − the correlation of two near-copies' grey levels."""
MAX_RELATIVE_DISTANCE = 0.06
"""Of the median distance to the tenth candidate: where all images are alike, as small digits are, more is asked."""
NEIGHBOURS = 5
"""Candidates of an image from each of the searches."""
EXACT_IMAGES = 50_000
"""Of more, the neighbours are looked for in the nearest cells of an index, not among all."""
_ROWS = 4096
"""That are held as float32 at a time."""
_POINTS_PER_CELL = 64
"""That the centres of the cells are made of."""
_PROBES = 32
"""Cells that are looked into: 98 % of the nearest neighbours were in them, and every near-copy."""
_TENTH = 9
_COARSE_PX = 8
_PART_PX = 16
_LEAST_COARSE_SIMILARITY = 0.5
"""Candidates that differ more are not compared further."""
_DIMENSIONS = 64
_CROPS_PX = (1, 2, 4)
"""Of a thumbnail's sides, that are left out of it."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class NearCopies:
    """Pairs of images that show the same.

    Attributes:
        pairs: `(P, 2)` int64, positions of the images, the smaller first; each pair once.
        distances: `(P,)` float32, 1 − correlation, 0 for the same grey levels.
        limit: the largest distance of a pair: `MAX_DISTANCE`, or less where all images are alike.
    """

    pairs: NDArray[np.int64]
    distances: Floats
    limit: float

    def sets(self, count: int) -> NDArray[np.int64]:
        """Returns `(count,)`: which set each image belongs to; near-copies of near-copies are in one."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        edges = coo_array((np.ones(len(self.pairs), np.int8), self.pairs.T), shape=(count, count))
        return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns `(32, 32)` uint8 grey levels of `(H, W, 3)` uint8 RGB: what near-copies have in common."""
    small = resize(pixels, (THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), dtype=np.uint8)


@one_blas_thread()
def find_near_copies(thumbnails: NDArray[np.uint8], vectors: NDArray[np.floating] | None = None) -> NearCopies:
    """Finds the pairs of images that show the same; those of one colour are in none.

    Args:
        thumbnails: `(N, 32, 32)` uint8, see `thumbnail`.
        vectors: `(N, features)` of the encoder; None: thumbnails alone propose the candidates.
    """
    pairs = _candidates(thumbnails, vectors)
    distances = _distances(thumbnails, pairs)
    limit = min(MAX_DISTANCE, MAX_RELATIVE_DISTANCE * _median_of_tenth(pairs, distances))
    found = distances <= limit
    return NearCopies(pairs[found], distances[found], limit)


def _candidates(thumbnails: NDArray[np.uint8], vectors: NDArray[np.floating] | None) -> NDArray[np.int64]:
    count = len(thumbnails)
    if count < 2:
        return np.empty((0, 2), np.int64)
    small = np.stack([coarse(image) for image in thumbnails])
    upright, mirrored = unit_rows(small), unit_rows(small[:, :, ::-1])
    found = _neighbours(upright, upright, mirrored)
    if vectors is not None:
        reduced = _reduced(vectors)
        found += _neighbours(reduced, reduced)
    nearest = np.concatenate(found, axis=1)
    own = np.arange(count)[:, None]
    # A number for each pair: those of a million images are many, and to sort rows would take several times the memory.
    numbers = np.unique(np.minimum(own, nearest) * count + np.maximum(own, nearest))
    pairs = np.stack(np.divmod(numbers, count), axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    is_near = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), _ROWS):
        part = slice(start, start + _ROWS)
        right = upright[pairs[part, 1]]
        for left in (upright, mirrored):
            similarity = np.einsum("ij,ij->i", left[pairs[part, 0]], right)
            is_near[part] |= similarity >= _LEAST_COARSE_SIMILARITY
    return pairs[is_near]


def _neighbours(targets: Floats, *queries: Floats) -> list[NDArray[np.int64]]:
    """Returns for each of the queries `(N, K)` positions in `targets`; one may be the query itself."""
    return (exact_neighbours if len(targets) <= EXACT_IMAGES else indexed_neighbours)(targets, *queries)


def exact_neighbours(targets: Floats, *queries: Floats) -> list[NDArray[np.int64]]:
    """Returns for each of the queries, `(N, D)`, the positions `(N, ≤ 6)` of the nearest of all targets, `(M, D)`."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(targets)), algorithm="brute").fit(targets)
    return [np.asarray(search.kneighbors(rows, return_distance=False), dtype=np.int64) for rows in queries]


def indexed_neighbours(targets: Floats, *queries: Floats) -> list[NDArray[np.int64]]:
    """Returns what `exact_neighbours` does, of the targets in the nearest cells of an inverted file.

    https://github.com/facebookresearch/faiss/wiki/Guidelines-to-choose-an-index
    """
    import faiss

    index = faiss.index_factory(targets.shape[1], f"IVF{int(4 * len(targets) ** 0.5)},Flat")
    faiss.extract_index_ivf(index).cp.max_points_per_centroid = _POINTS_PER_CELL
    index.train(targets)
    index.add(targets)
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", _PROBES)
    found = [index.search(rows, NEIGHBOURS + 1)[1] for rows in queries]
    # Cells that hold fewer give -1 for what is missing, which stands for the last image here: one more candidate.
    return [np.where(positions < 0, len(targets) - 1, positions) for positions in found]


def _reduced(vectors: NDArray[np.floating]) -> Floats:
    """Returns `(N, ≤ 64)` float32 unit vectors: the directions in which the images differ most."""
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    scatter = np.zeros((len(mean), len(mean)))
    for start in range(0, len(vectors), _ROWS):
        part = vectors[start : start + _ROWS].astype(np.float32) - mean
        scatter += part.T @ part
    leading = np.linalg.eigh(scatter)[1][:, -_DIMENSIONS:].astype(np.float32)
    parts = [(vectors[at : at + _ROWS].astype(np.float32) - mean) @ leading for at in range(0, len(vectors), _ROWS)]
    return unit_rows(np.concatenate(parts))


def coarse(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns `(8, 8)` uint8 of a thumbnail."""
    blurred = cv2.GaussianBlur(image, (0, 0), THUMBNAIL_PX / 16)
    return np.asarray(cv2.resize(blurred, (_COARSE_PX, _COARSE_PX), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def unit_rows(images: NDArray[np.uint8] | Floats) -> Floats:
    """Returns `(N, D)` float32 of length 1 and mean 0: a product is a correlation; zeros where all values are one."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _distances(thumbnails: NDArray[np.uint8], pairs: NDArray[np.int64]) -> Floats:
    """Returns `(P,)`: 1 − the best correlation of a part of either image, or its mirror image, with the other one."""
    if not len(pairs):
        return np.empty(0, np.float32)
    whole = np.stack([_part(image, 0, 0, 0) for image in thumbnails]).reshape(len(thumbnails), -1)
    spread = [whole[at : at + _ROWS].std(axis=1) for at in range(0, len(whole), _ROWS)]
    length = np.concatenate(spread) * whole.shape[1] ** 0.5
    length[length == 0] = np.inf
    best = np.full(len(pairs), -1.0, np.float32)
    for one, other in ((0, 1), (1, 0)):
        order = np.argsort(pairs[:, one], kind="stable")
        members, starts = np.unique(pairs[order, one], return_index=True)
        for member, rows in zip(members, np.split(order, starts[1:]), strict=True):
            others = pairs[rows, other]
            # The parts' mean is 0, so that the others' need not be.
            correlations = (
                _parts(thumbnails[member]) @ whole[others].astype(np.float32).T / length[others].astype(np.float32)
            )
            best[rows] = np.maximum(best[rows], correlations.max(axis=0))
    return np.maximum(1.0 - best, 0.0)


def _parts(image: NDArray[np.uint8]) -> Floats:
    """Returns `(P, 256)` unit rows: of the image, of its parts, and of the mirror images of these."""
    parts = [_part(image, 0, 0, 0)]
    for crop in _CROPS_PX:
        offsets = sorted({0, crop // 2, crop})
        parts += [_part(image, crop, top, left) for top in offsets for left in offsets]
    stack = np.stack(parts)
    return unit_rows(np.concatenate([stack, stack[:, :, ::-1]]))


def _part(image: NDArray[np.uint8], crop: int, top: int, left: int) -> NDArray[np.uint8]:
    side = THUMBNAIL_PX - crop
    part = image[top : top + side, left : left + side]
    return np.asarray(cv2.resize(part, (_PART_PX, _PART_PX), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _median_of_tenth(pairs: NDArray[np.int64], distances: Floats) -> float:
    """Returns the median, over the images that have candidates, of the distance to the tenth, or else to the last."""
    if not len(pairs):
        return 0.0
    image, distance = np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([distances, distances])
    order = np.lexsort((distance, image))
    _, starts, counts = np.unique(image[order], return_index=True, return_counts=True)
    return float(np.median(distance[order][starts + np.minimum(counts - 1, _TENTH)]))
