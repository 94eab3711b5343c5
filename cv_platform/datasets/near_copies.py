"""Finds images that show the same picture though their bytes differ: saved again, cropped, mirrored, brightened.

Candidates are each image's nearest neighbours, by its coarse grey levels (as they are and mirrored) and, where they are
given, by the vectors of the pretrained encoder. What decides is the correlation of grey levels: that of one thumbnail
with the other, or with a part of it that is up to an eighth smaller, and the mirror images of both. Where that leaves
doubt, parts in between are tried as well. The measurements behind the numbers are in docs/explanation/near-copies.md.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_platform.compute.blas import one_blas_thread
from cv_platform.cores import available_cores
from cv_platform.images import resize

THUMBNAIL_PX = 32
OVERVIEW_PX = 6 * THUMBNAIL_PX
"""What the sides of an image have at least that a thumbnail is made of, if the image has it."""
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
_MEMBERS = 32
"""Images whose parts are made at a time: a megabyte, which stays in the cache."""
_TRAINING_ROUNDS = 10
"""Of the centres of the cells; more move them by little."""
_TENTH = 9
_COARSE_PX = 8
_PART_PX = 16
_LEAST_COARSE_SIMILARITY = 0.5
"""Candidates that differ more are not compared further."""
_DIMENSIONS = 64
_CROPS_PX = (1.0, 2.0, 4.0)
"""Of a thumbnail's sides, that are left out of it."""
_FINER_CROPS_PX = tuple(step / 2 for step in range(1, 10))
"""Where there is doubt: fine detail is blurred by half a pixel too many."""
_DOUBT = 3.0
"""Times the limit: pairs with a distance up to there are compared by the finer parts, too."""
_LIMIT_AFTER_DOUBT = 0.75
"""Of the limit: the best of many more parts is small for honest pairs, too."""

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
    """Returns `(32, 32)` uint8 grey levels of `(H, W, 3)` uint8 RGB, or of grey levels: what near-copies share."""
    small = resize(pixels, (THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY), dtype=np.uint8) if small.ndim == 3 else small


@one_blas_thread()
def find_near_copies(thumbnails: NDArray[np.uint8], vectors: NDArray[np.floating] | None = None) -> NearCopies:
    """Finds the pairs of images that show the same; those of one colour are in none.

    Args:
        thumbnails: `(N, 32, 32)` uint8, see `thumbnail`.
        vectors: `(N, features)` of the encoder; None: thumbnails alone propose the candidates.
    """
    pairs = _candidates(thumbnails, vectors)
    distances = _distances(thumbnails, pairs, _CROPS_PX)
    limit = min(MAX_DISTANCE, MAX_RELATIVE_DISTANCE * _median_of_tenth(pairs, distances))
    doubtful = np.flatnonzero((distances > limit) & (distances <= _DOUBT * limit))
    if len(doubtful):
        images, places = np.unique(pairs[doubtful], return_inverse=True)
        finer = _distances(thumbnails[images], places.reshape(-1, 2), _FINER_CROPS_PX)
        distances[doubtful] = np.where(finer <= _LIMIT_AFTER_DOUBT * limit, finer, distances[doubtful])
    found = distances <= limit
    return NearCopies(pairs[found], distances[found], limit)


def _candidates(thumbnails: NDArray[np.uint8], vectors: NDArray[np.floating] | None) -> NDArray[np.int64]:
    count = len(thumbnails)
    if count < 2:
        return np.empty((0, 2), np.int64)
    small = coarse(thumbnails)
    upright, mirrored = unit_rows(small), unit_rows(small[:, :, ::-1])
    found = _neighbours(upright, upright, mirrored)
    if vectors is not None:
        reduced = unit_rows(projected(vectors, _DIMENSIONS))
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
    """Returns what `exact_neighbours` does, of the targets in the nearest cells of an inverted file, in half precision.

    https://github.com/facebookresearch/faiss/wiki/Guidelines-to-choose-an-index
    """
    import faiss

    index = faiss.index_factory(targets.shape[1], f"IVF{int(4 * len(targets) ** 0.5)},SQfp16")
    clustering = faiss.extract_index_ivf(index).cp
    clustering.max_points_per_centroid, clustering.niter = _POINTS_PER_CELL, _TRAINING_ROUNDS
    index.train(targets)
    index.add(targets)
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", _PROBES)
    found = [index.search(rows, NEIGHBOURS + 1)[1] for rows in queries]
    # Cells that hold fewer give -1 for what is missing, which stands for the last image here: one more candidate.
    return [np.where(positions < 0, len(targets) - 1, positions) for positions in found]


def projected(vectors: NDArray[np.floating], dimensions: int, *, of_one_length: bool = False) -> Floats:
    """Returns `(N, ≤ dimensions)` float32: vectors along the directions in which they differ most, centred.

    Args:
        vectors: `(N, features)`; they may be many, and are held as float32 a part at a time.
        dimensions: how many directions.
        of_one_length: only the vectors' directions count.
    """

    def parts() -> Iterator[Floats]:
        for start in range(0, len(vectors), _ROWS):
            part = vectors[start : start + _ROWS].astype(np.float32)
            length = np.linalg.norm(part, axis=1, keepdims=True) if of_one_length else np.float32(1)
            yield part / np.maximum(length, 1e-6)

    total = np.zeros(vectors.shape[1])
    for part in parts():
        total += part.sum(axis=0)
    mean = (total / len(vectors)).astype(np.float32)
    if len(vectors) <= vectors.shape[1]:  # Of few, their products are the smaller matrix.
        centred = np.concatenate([part - mean for part in parts()])
        sizes, leading = _leading(centred @ centred.T, dimensions)
        return leading * np.sqrt(np.maximum(sizes, 0)).astype(np.float32)
    scatter = np.zeros((len(mean), len(mean)))
    for part in parts():
        scatter += (part - mean).T @ (part - mean)
    leading = _leading(scatter, dimensions)[1]
    return np.concatenate([(part - mean) @ leading for part in parts()])


def _leading(symmetric: NDArray[np.floating], count: int) -> tuple[Floats, Floats]:
    """Returns the `count` largest eigenvalues of a matrix, and their vectors in columns."""
    from scipy.linalg import eigh

    size = len(symmetric)
    found: Any = eigh(symmetric.astype(np.float64), subset_by_index=[max(0, size - count), size - 1])
    values, vectors = found
    return np.asarray(values, np.float32), np.asarray(vectors, np.float32)


def coarse(images: NDArray[np.uint8]) -> Floats:
    """Returns `(N, 8, 8)` float32 of `(N, 32, 32)` thumbnails: blurred, then averaged."""
    blurs = _blurs()
    parts = (images[at : at + _ROWS].astype(np.float32) for at in range(0, len(images), _ROWS))
    return np.concatenate([np.swapaxes(np.swapaxes(part @ blurs.T, 1, 2) @ blurs.T, 1, 2) for part in parts])


@functools.cache
def _blurs() -> Floats:
    """Returns `(8, 32)`: what makes of a row of pixels the means of its eighths, after a Gaussian blur."""
    sides = cv2.GaussianBlur(np.eye(THUMBNAIL_PX, dtype=np.float32), (1, 13), sigmaX=0.1, sigmaY=THUMBNAIL_PX / 16)
    return np.asarray(sides, np.float32).reshape(_COARSE_PX, -1, THUMBNAIL_PX).mean(axis=1)


def unit_rows(images: NDArray[np.uint8] | Floats) -> Floats:
    """Returns `(N, D)` float32 of length 1 and mean 0: a product is a correlation; zeros where all values are one."""
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _distances(thumbnails: NDArray[np.uint8], pairs: NDArray[np.int64], crops: tuple[float, ...]) -> Floats:
    """Returns `(P,)`: 1 − the best correlation of a part of either image, or its mirror image, with the other one."""
    if not len(pairs):
        return np.empty(0, np.float32)
    whole = np.empty((len(thumbnails), _PART_PX**2), np.uint8)
    for at in range(0, len(thumbnails), _ROWS):
        part = thumbnails[at : at + _ROWS].reshape(-1, _PART_PX, 2, _PART_PX, 2).mean(axis=(2, 4), dtype=np.float32)
        whole[at : at + _ROWS] = np.rint(part).reshape(len(part), -1)
    spread = [whole[at : at + _ROWS].std(axis=1) for at in range(0, len(whole), _ROWS)]
    length = np.concatenate(spread) * whole.shape[1] ** 0.5
    length[length == 0] = np.inf
    best = np.full(len(pairs), -1.0, np.float32)
    with ThreadPoolExecutor(available_cores()) as threads:
        for one, other in ((0, 1), (1, 0)):
            order = np.argsort(pairs[:, one], kind="stable")
            starts = np.flatnonzero(np.diff(pairs[order, one], prepend=-1))
            bounds = [*starts[::_MEMBERS], len(order)]

            def compare(rows: NDArray[np.int64], one: int = one, other: int = other) -> None:
                found = _best_of_parts(thumbnails, whole, length, pairs[rows][:, [one, other]], crops)
                best[rows] = np.maximum(best[rows], found)

            list(threads.map(compare, [order[start:end] for start, end in pairwise(bounds)]))
    return np.maximum(1.0 - best, 0.0)


def _best_of_parts(
    thumbnails: NDArray[np.uint8],
    whole: NDArray[np.uint8],
    length: NDArray[np.floating],
    pairs: NDArray[np.int64],
    crops: tuple[float, ...],
) -> Floats:
    """Returns `(P,)`: the best correlation of a part of the first with the second, or its mirror image.

    Args:
        thumbnails: of all images.
        whole: `(N, 256)` of all images.
        length: of the rows of `whole`.
        pairs: `(P, 2)`, ordered by the first.
        crops: of the parts.
    """
    members, starts = np.unique(pairs[:, 0], return_index=True)
    # The parts' mean is 0, so that the others' need not be.
    upright = whole[pairs[:, 1]].astype(np.float32) / length[pairs[:, 1], None].astype(np.float32)
    mirrored = upright.reshape(-1, _PART_PX, _PART_PX)[:, :, ::-1].reshape(upright.shape)
    best = np.empty(len(pairs), np.float32)
    for parts, start, end in zip(_parts(thumbnails[members], crops), starts, [*starts[1:], len(pairs)], strict=True):
        products = parts @ np.concatenate([upright[start:end], mirrored[start:end]]).T
        best[start:end] = products.max(axis=0).reshape(2, -1).max(axis=0)
    return best


def _parts(images: NDArray[np.uint8], crops: tuple[float, ...]) -> Floats:
    """Returns `(N, P, 256)` unit rows: of each image, and of its parts."""
    pixels = images.astype(np.float32)
    found = list[Floats]()
    for windows in _windows(crops):
        count = len(windows) // _PART_PX
        across = (pixels @ windows.T).swapaxes(1, 2)
        both = (across @ windows.T).reshape(len(images), count, _PART_PX, count, _PART_PX)
        found.append(both.transpose(0, 3, 1, 4, 2).reshape(len(images), count**2, -1))
    parts = np.concatenate(found, axis=1)
    return unit_rows(parts.reshape(-1, _PART_PX**2)).reshape(parts.shape)


@functools.cache
def _windows(crops: tuple[float, ...]) -> list[Floats]:
    """Returns for the whole, and for each crop, `(16 × places, 32)`: what averages the pixels of each cell of a part.

    A crop's parts are nine: at either end and in the middle, of height and of width.
    """
    return [
        _averages(0.0, 0.0),
        *(np.concatenate([_averages(crop, at) for at in (0, crop / 2, crop)]) for crop in crops),
    ]


def _averages(crop: float, start: float) -> Floats:
    """Returns `(16, 32)`: the share of each pixel in each cell of `[start, start + 32 − crop)`."""
    edges = start + np.linspace(0, THUMBNAIL_PX - crop, _PART_PX + 1)
    pixels = np.arange(THUMBNAIL_PX)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0.0) / (edges[1] - edges[0])).astype(np.float32)


def _median_of_tenth(pairs: NDArray[np.int64], distances: Floats) -> float:
    """Returns the median, over the images that have candidates, of the distance to the tenth, or else to the last."""
    if not len(pairs):
        return 0.0
    image, distance = np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([distances, distances])
    order = np.lexsort((distance, image))
    _, starts, counts = np.unique(image[order], return_index=True, return_counts=True)
    return float(np.median(distance[order][starts + np.minimum(counts - 1, _TENTH)]))
