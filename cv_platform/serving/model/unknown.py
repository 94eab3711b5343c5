"""Tells whether an image shows what the model has learned, from the features that it has computed anyway.

Two numbers: the energy of the logits (Liu et al. 2020, https://arxiv.org/abs/2010.03759; of several labels the joint
energy, Wang et al. 2021, https://arxiv.org/abs/2111.12797), which is high where nothing speaks for any class, and the
angle between the features and the nearest class's prototype, which is wide for other things: their features are short,
so that they are near to all prototypes, and point elsewhere. So are those of images without any of several labels:
there the distance counts instead. Each has a limit; images which the model knows exceed one of them at a stated rate.
`deployment.unknown` fits the rule; a bundle carries it.
"""

# NumPy types einsum in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cv_platform.errors import CorruptBundleError

UNKNOWN = "unknown.npz"
"""In a bundle: the rule, where one could be fitted."""


@dataclass(frozen=True)
class UnknownRule:
    """Energy and angle, and their limits.

    Attributes:
        kernel: `(F, C)` float32, of the output layer.
        bias: `(C,)`.
        prototypes: `(P, F)`, the classes' mean features, divided by `scale`; of several labels, the last one may be
            that of images without any.
        scale: `(F,)`, the features' standard deviation within the classes; above 0.
        middle: `(2,)`, of energy and angle: their medians on known images.
        limit: `(2,)`, above `middle`: known images exceed one of them at `rate`.
        rate: share of known images, at most, that count as unknown.
        is_joint: `()` bool: the logits are of several labels, each by itself.
        is_angular: `()` bool: false with several labels and in rules of earlier releases, which go by the distance.
    """

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]
    prototypes: NDArray[np.float32]
    scale: NDArray[np.float32]
    middle: NDArray[np.float32]
    limit: NDArray[np.float32]
    rate: NDArray[np.float32]
    is_joint: NDArray[np.bool_] = field(default_factory=lambda: np.array(False))
    is_angular: NDArray[np.bool_] = field(default_factory=lambda: np.array(False))

    def score(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns `(N,)` float32 of `(N, F)` features: 0 is as known as images mostly are, above 1 is unknown."""
        head = (self.kernel, self.bias, self.prototypes, self.scale)
        measured = measure_unknown(features, *head, is_joint=bool(self.is_joint), is_angular=bool(self.is_angular))
        return ((measured - self.middle) / (self.limit - self.middle)).max(axis=1).astype(np.float32)

    def save(self, path: Path) -> None:
        """Writes it, as `load_rule` reads it."""
        np.savez(path, **{part.name: getattr(self, part.name) for part in fields(self)})


def measure_unknown(
    features: NDArray[np.float32],
    kernel: NDArray[np.float32],
    bias: NDArray[np.float32],
    prototypes: NDArray[np.float32],
    scale: NDArray[np.float32],
    *,
    is_joint: bool,
    is_angular: bool,
) -> NDArray[np.float32]:
    """Returns `(N, 2)`: energy of the logits, and the angle to the nearest prototype as 1 less its cosine."""
    # Not by BLAS: for one image its threads would cost more than the sums.
    logits = np.einsum("nf,fc->nc", features, kernel) + bias
    if is_joint:
        energy = -np.logaddexp(0, logits).sum(axis=1)
    else:
        highest = logits.max(axis=1)
        energy = -(highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1)))
    scaled = features / scale
    products = np.einsum("nf,pf->np", scaled, prototypes)
    ours, theirs = (scaled**2).sum(axis=1)[:, None], (prototypes**2).sum(axis=1)
    if is_angular:
        apart = 1 - (products / np.sqrt(np.maximum(ours * theirs, 1e-12))).max(axis=1)
    else:
        apart = np.sqrt(np.maximum((ours - 2 * products + theirs).min(axis=1), 0))
    return np.stack([energy, apart], axis=1).astype(np.float32)


def load_rule(path: Path, *, feature_dims: int, classes: int) -> UnknownRule | None:
    """Reads a bundle's rule; None where it has none, as those of earlier releases.

    Raises:
        CorruptBundleError: it is no rule for this model.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            # Rules of earlier releases are of one class for each image, go by the distance, and do not say so.
            may_lack = {"is_joint", "is_angular"}
            names = [part.name for part in fields(UnknownRule) if part.name in archive or part.name not in may_lack]
            rule = UnknownRule(**{name: archive[name] for name in names})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
        raise CorruptBundleError(f"{path}: expected a rule for unknown images. Received: {err}. Export again.") from err
    received = (rule.kernel.shape, rule.prototypes.shape, rule.limit.shape)
    prototypes = classes + 1 if rule.is_joint and len(rule.prototypes) > classes else classes
    if received != ((feature_dims, classes), (prototypes, feature_dims), (2,)):
        raise CorruptBundleError(
            f"{path}: expected a rule for {feature_dims} features and {classes} classes. Received: {received}. "
            "Export again."
        )
    return rule
