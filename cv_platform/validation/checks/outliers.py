"""Finds images that are far from every class: other things, screenshots, scans of forms.

The direction of each image's vector of the pretrained encoder (flat pictures have short ones, wherever they point) is
compared with its nearest class, by the Mahalanobis distance with the covariance that all classes share (Lee et al.
2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks", section 2.1). What
is farthest of each class is left out when classes and covariance are estimated again, so that some dozens of strangers
do not make a place for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from typing_extensions import override

from cv_platform.compute.blas import one_blas_thread
from cv_platform.datasets.contact_sheet import SheetRow, draw_sheet
from cv_platform.datasets.near_copies import projected
from cv_platform.validation.checks import Check, Finding, Subject, share

MIN_IMAGES = 50
"""Of fewer, nobody can say what is usual among them."""
MAX_DEVIATION = 4.0
"""Robust standard deviations of the logarithm of the distance, above its median, from which an image is an outlier.
Measured: 20 digits among 5,700 images of CIFAR-10 have 4 to 6, among 5,600 of groceries 6 to 8, and no other has 4."""
MAX_DEVIATION_AMONG_FEW = 5.0
"""Of fewer than `FEW_IMAGES`, which are compared in fewer dimensions: among 200 to 630 drawings, all of them of their
classes, the largest had 3.8 to 4.6."""
FEW_IMAGES = 2_000
_DIMENSIONS = 128
_IMAGES_PER_DIMENSION = 20
_ROUNDS = 3
_LEFT_OUT = 0.05
_LEAST_OF_A_CLASS = 2
_SHRINKAGE = 0.1
_SHOWN = 40


class Outliers(Check):
    """The share of images that look like none of the classes."""

    name, limit = "outliers", "max_outlier_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        if len(subject.manifest) < MIN_IMAGES:
            return Finding(f"Not judged: fewer than {MIN_IMAGES} images.")
        deviations = outlier_deviations(subject.vectors, subject.manifest["labels"].tolist())
        order = np.argsort(-deviations, kind="stable")
        limit = MAX_DEVIATION if len(deviations) >= FEW_IMAGES else MAX_DEVIATION_AMONG_FEW
        far = order[: int((deviations > limit).sum())]
        paths = subject.manifest["path"].to_numpy()
        if len(far):
            rows = [SheetRow(f"{deviations[at]:.1f}", "", [subject.root / paths[at]]) for at in far[:_SHOWN]]
            sheet = draw_sheet(rows, columns=1, what="images", sample_bits=subject.sample_bits)
            (subject.directory / f"{self.name}.png").write_bytes(sheet)
        return Finding(
            f"{len(far)} of {len(paths)} images are far from every class ({share(len(far), len(paths)):.2%}): more "
            f"than {limit:g} standard deviations farther than is usual.",
            share(len(far), len(paths)),
            [f"{paths[at]} ({deviations[at]:.1f})" for at in far],
        )


@one_blas_thread()
def outlier_deviations(vectors: NDArray[np.floating], labels: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Returns `(N,)`: how much farther each image is from the nearest class than the median image.

    The unit is a robust standard deviation of the distances' logarithms.

    Args:
        vectors: `(N, features)` of the encoder, finite.
        labels: class names of each image; each set of labels that two images have is a class here. Unknown labels make
            no other set: an image is compared with all classes, whichever it helps to describe.
    """
    dimensions = min(_DIMENSIONS, len(vectors) // _IMAGES_PER_DIMENSION + 1)
    reduced = projected(vectors, dimensions, of_one_length=True)
    classes = pd.Series(pd.factorize(pd.Series(["|".join(sorted(names)) for names in labels]))[0])
    sizes = classes.map(classes.value_counts()).to_numpy()
    is_counted = sizes >= min(_LEAST_OF_A_CLASS, sizes.max())
    is_usual, distances = is_counted, np.empty(len(reduced))
    for _ in range(_ROUNDS):
        distances = _distances(reduced, classes.to_numpy(), is_usual)
        ranks = pd.Series(distances).groupby(classes.to_numpy()).rank(method="first").to_numpy()
        is_usual = is_counted & (ranks <= sizes - np.floor(_LEFT_OUT * sizes))
    logarithms = np.log(np.maximum(distances, 1e-12))
    middle = np.median(logarithms)
    spread = 1.4826 * np.median(np.abs(logarithms - middle))  # The standard deviation, were they normal.
    return (logarithms - middle) / max(float(spread), 1e-9)


def _distances(
    vectors: NDArray[np.float32], classes: NDArray[np.int64], is_usual: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Returns `(N,)`: the Mahalanobis distance of each image to the nearest class, as the usual ones describe them."""
    counted = [is_usual & (classes == at) for at in range(int(classes.max()) + 1)]
    means = [vectors[rows].mean(axis=0) for rows in counted if rows.any()]
    within = np.concatenate([vectors[rows] - vectors[rows].mean(axis=0) for rows in counted if rows.any()])
    covariance = within.T.astype(np.float64) @ within / max(1, len(within) - len(means))
    size = np.trace(covariance) / len(covariance)
    shrunk = (1 - _SHRINKAGE) * covariance + (_SHRINKAGE * size + 1e-12) * np.eye(len(covariance))
    whitening = np.linalg.cholesky(np.linalg.inv(shrunk))
    images, prototypes = vectors @ whitening, np.stack(means) @ whitening
    squares = np.square(images).sum(axis=1)[:, None] - 2 * images @ prototypes.T + np.square(prototypes).sum(axis=1)
    return np.sqrt(np.maximum(squares.min(axis=1), 0.0))
