"""What `train.imbalance` does where some classes have far more images than others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cv_platform.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class ClassBalance:
    """How a training makes up for the classes' shares.

    Attributes:
        weights: `(C,)` float32: factor of the loss of an image, by its class; their mean over the images is 1.
        log_prior: `(C,)` float32, added to the logits while training.
        draws: `(C,)` float64: how often an image is drawn, by its class, relative to others; None: each once an epoch.
    """

    weights: NDArray[np.float32]
    log_prior: NDArray[np.float32]
    draws: NDArray[np.float64] | None = None

    @property
    def changes_loss(self) -> bool:
        """Whether the loss is another one than the cross-entropy."""
        return bool((self.weights != 1).any() or self.log_prior.any())


def balance_of(train: TrainConfig, targets: np.ndarray, classes: int) -> ClassBalance:
    """Returns what `train.imbalance` means for these images.

    weights: an image counts by the inverse of its class's share. sampler: images of each class are drawn equally often,
    with replacement. logit_adjustment: the logarithm of the class's share is added to its logit in training, and left
    out afterwards (Menon et al. 2021, "Long-tail learning via logit adjustment", section 5.2). Classes without an image
    stay as they are.

    Args:
        train: the recipe.
        targets: `(N,)` integer class indices; of `(N, C)` 0/1, `train.imbalance` must be none.
        classes: number of classes C.
    """
    neutral = ClassBalance(np.ones(classes, np.float32), np.zeros(classes, np.float32))
    if train.imbalance == "none":
        return neutral
    counts = np.bincount(np.asarray(targets), minlength=classes)
    shares = np.where(counts > 0, counts / counts.sum(), 1.0)
    inverse = 1 / shares / np.count_nonzero(counts)
    if train.imbalance == "weights":
        return ClassBalance(np.where(counts > 0, inverse, 1.0).astype(np.float32), neutral.log_prior)
    if train.imbalance == "sampler":
        return ClassBalance(neutral.weights, neutral.log_prior, draws=inverse)
    return ClassBalance(neutral.weights, np.log(shares).astype(np.float32))


def balanced_cross_entropy(balance: ClassBalance, label_smoothing: float) -> Callable[[Any, Any], Any]:
    """Returns the loss of `(N, C)` targets and `(N, C)` probabilities, `(N,)`."""
    import keras

    ops: Any = keras.ops

    def cross_entropy(targets: Any, probabilities: Any) -> Any:
        smooth = targets * (1 - label_smoothing) + label_smoothing / len(balance.weights)
        logits = ops.log(ops.clip(probabilities, 1e-7, 1.0)) + balance.log_prior
        return -ops.sum(smooth * ops.log_softmax(logits), axis=-1) * ops.sum(targets * balance.weights, axis=-1)

    return cross_entropy
