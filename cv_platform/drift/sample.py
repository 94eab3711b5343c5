"""One sample of images as the detectors see it: four aligned float32 matrices, checked once at the door.

Everything downstream may rely on: two dimensions, the same number of rows, at least one column, finite values. A fifth
matrix, the pretrained encoder's vectors, is there where somebody asked for it, and has gaps where an image is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cv_platform.errors import InvalidSampleError
from cv_platform.properties import PROPERTY_NAMES

Float32Matrix = NDArray[np.float32]
REPRESENTATIONS: tuple[str, ...] = ("bbsd", "features", "uae", "properties")


@dataclass(frozen=True, eq=False)
class DriftSample:
    """N images in four representations; row i of each belongs to the same image.

    Attributes:
        bbsd: `(N, C)` float32, the model's probabilities, 0–1 (black-box shift detection, Lipton et al. 2018).
        features: `(N, F)` float32, the penultimate layer.
        uae: `(N, D)` float32, the untrained encoder's embedding.
        properties: `(N, 7)` float32, pixel statistics in the order of `PROPERTY_NAMES`.
        encoded: `(N, E)` float32, the pretrained encoder's vectors; NaN in the rows whose image is not there or was not
            looked at. None: nobody asked for them.

    Raises:
        InvalidSampleError: a matrix has another rank, no column, another number of rows, a value that is not finite
            (see `from_rows` to leave such rows out), a probability outside 0–1 or not seven properties.
    """

    bbsd: Float32Matrix
    features: Float32Matrix
    uae: Float32Matrix
    properties: Float32Matrix
    encoded: Float32Matrix | None = None

    def __post_init__(self) -> None:
        problems: list[str] = []
        arrays = {name: _as_float32(name, getattr(self, name), problems) for name in REPRESENTATIONS}
        if not problems:
            if len({len(array) for array in arrays.values()}) > 1:
                problems.append("rows differ: " + ", ".join(f"{name} {len(array)}" for name, array in arrays.items()))
            for name, array in arrays.items():
                broken = np.flatnonzero(~np.isfinite(array).all(axis=1))
                if broken.size:
                    rows = ", ".join(map(str, broken[:5].tolist()))
                    problems.append(f"{name}: {broken.size} rows are not finite float32 (first: {rows})")
            if arrays["properties"].shape[1] != len(PROPERTY_NAMES):
                problems.append(f"properties: {arrays['properties'].shape[1]} columns instead of {len(PROPERTY_NAMES)}")
            if self.encoded is not None and (self.encoded.ndim != 2 or len(self.encoded) != len(arrays["bbsd"])):
                problems.append(f"encoded: shape {self.encoded.shape}")
            probabilities = arrays["bbsd"]
            if ((probabilities < -1e-3) | (probabilities > 1 + 1e-3)).any():  # Not true of NaN, reported above.
                problems.append("bbsd: values outside 0–1, which are no probabilities")
        if problems:
            raise InvalidSampleError(
                f"Expected four finite float32 matrices with the same number of rows. Received: {'; '.join(problems)}."
            )
        for name, array in arrays.items():
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.bbsd)

    @classmethod
    def from_rows(cls, arrays: Mapping[str, Float32Matrix]) -> tuple[DriftSample, NDArray[np.bool_]]:
        """Makes a sample of the rows that are finite everywhere.

        Args:
            arrays: a matrix for each name of `REPRESENTATIONS`, aligned.

        Returns:
            The sample, and `(N,)` bool: which of the given rows are in it. The caller reports the others: an image
            whose outputs are not numbers is a defect of the model, which no drift test can weigh.

        Raises:
            InvalidSampleError: see `DriftSample`.
        """
        problems: list[str] = []
        checked = {name: _as_float32(name, arrays[name], problems) for name in REPRESENTATIONS}
        if problems or len({len(array) for array in checked.values()}) > 1:
            return cls(**checked), np.empty(0, dtype=np.bool_)  # Raises, and says why.
        finite = np.stack([np.isfinite(array).all(axis=1) for array in checked.values()]).all(axis=0)
        return cls(**{name: array[finite] for name, array in checked.items()}), finite

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> DriftSample:
        """Returns the sample of these rows (indices or a mask)."""
        encoded = None if self.encoded is None else self.encoded[rows]
        return DriftSample(self.bbsd[rows], self.features[rows], self.uae[rows], self.properties[rows], encoded)

    def with_encoded(self, vectors: NDArray[Any]) -> DriftSample:
        """Returns the sample with the encoder's vectors, `(N, E)`, NaN in rows without one."""
        return replace(self, encoded=np.asarray(vectors, dtype=np.float32))

    @property
    def encoded_rows(self) -> Float32Matrix:
        """The encoder's vectors of the rows that have one, `(M, E)`; without any, none of width 1."""
        if self.encoded is None:
            return np.empty((0, 1), dtype=np.float32)
        return self.encoded[np.isfinite(self.encoded).all(axis=1)]

    def describe(self) -> dict[str, int]:
        """Returns the number of columns of each representation."""
        return {name: int(getattr(self, name).shape[1]) for name in REPRESENTATIONS}


def require_comparable(reference: DriftSample, current: DriftSample, *, min_rows: int = 2) -> None:
    """Checks that two samples can be compared.

    Raises:
        InvalidSampleError: their columns differ (another model's rows), or one has fewer than `min_rows` rows.
    """
    problems = [
        f"{name}: {left} columns in the reference, {right} in the current sample"
        for (name, left), right in zip(reference.describe().items(), current.describe().values(), strict=True)
        if left != right
    ]
    problems += [
        f"{len(sample)} {name} rows"
        for name, sample in (("reference", reference), ("current", current))
        if len(sample) < min_rows
    ]
    if problems:
        raise InvalidSampleError(
            f"Expected two samples of one model with at least {min_rows} rows each. Received: {'; '.join(problems)}. "
            "Compare rows of one model version, and wait for more requests if there are too few."
        )


def _as_float32(name: str, values: Float32Matrix, problems: list[str]) -> Float32Matrix:
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] == 0 or array.dtype.kind not in "fiu":
        problems.append(f"{name}: {array.dtype} of shape {array.shape}")
        return np.empty((0, 1), dtype=np.float32)
    with np.errstate(over="ignore"):  # Too large for float32 becomes infinite, and is then reported as such.
        return np.ascontiguousarray(array, dtype=np.float32)
