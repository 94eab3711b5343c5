"""What a network that has learned from other images needs: a head to begin with, and rates by the depth of a layer.

The head is the linear classifier that regularised logistic regression finds on the features, a convex problem of
seconds: fine-tuning then begins with gradients that mean something, and the best of both is kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cv_platform.compute.blas import one_blas_thread
from cv_platform.config import ClassifierType, ExperimentConfig, TransferConfig
from cv_platform.datasets.packing import PackedSplit
from cv_platform.datasets.shards.reading import Images
from cv_platform.predictions import known_labels
from cv_platform.training.architectures import find_architecture
from cv_platform.training.batches import as_probabilities
from cv_platform.training.imbalance import ClassBalance
from cv_platform.training.network import FEATURES_NAME, LOGITS_NAME

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

HEAD_IMAGES = 20_000
"""Of more, a seeded choice: a linear head gains little, and needs their features in memory."""
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
"""Half the factor of the squared weights of features with deviation 1, which is added to the mean cross-entropy."""
_BATCH_SIZE = 64


@dataclass(frozen=True)
class Head:
    """A linear classifier of features.

    Attributes:
        kernel: `(features, C)` float32.
        bias: `(C,)` float32.
        loss: mean cross-entropy on the images that it was fitted to.
        accuracy: on these.
        penalty: of `PENALTIES`, the one that `valid` chose.
    """

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]
    loss: float
    accuracy: float
    penalty: float


def start_head(
    network: keras.Model,
    train: PackedSplit,
    valid: PackedSplit,
    config: ExperimentConfig,
    balance: ClassBalance,
) -> Head:
    """Gives `network` the head that suits its features, and returns it.

    Args:
        network: see `network`.
        train: of more than `HEAD_IMAGES`, a seeded choice.
        valid: chooses the penalty, by its cross-entropy.
        config: softmax (multi-class), or a sigmoid for each class (multi-label); the seed of the choice.
        balance: see `imbalance`.
    """
    classes = network.output_shape[-1]
    chosen = np.arange(len(train.images))
    if len(chosen) > HEAD_IMAGES:
        chosen = np.sort(np.random.default_rng(config.train.seed).choice(chosen, HEAD_IMAGES, replace=False))
    head = fit_head(
        _features(network, train.images, chosen),
        as_probabilities(np.asarray(train.targets[chosen]), classes),
        _features(network, valid.images, np.arange(len(valid.images))),
        as_probabilities(np.asarray(valid.targets), classes),
        config.model.classifier_type,
        balance,
    )
    network.get_layer(LOGITS_NAME).set_weights([head.kernel, head.bias])
    logger.info("fitted a head to the features of %d images; penalty %g", len(chosen), head.penalty)
    return head


@one_blas_thread()
def fit_head(
    features: NDArray[np.float32],
    targets: NDArray[np.float32],
    valid_features: NDArray[np.float32],
    valid_targets: NDArray[np.float32],
    classifier_type: ClassifierType,
    balance: ClassBalance | None = None,
) -> Head:
    """Returns the penalised logistic regression of `targets`, whose penalty has the least cross-entropy on valid.

    Args:
        features: `(N, D)`.
        targets: `(N, C)` 0/1, NaN where unknown.
        valid_features: `(M, D)`.
        valid_targets: `(M, C)`, likewise.
        classifier_type: softmax (multi-class), or a sigmoid for each class (multi-label).
        balance: of the classes; None: images count equally.
    """
    from scipy.optimize import minimize

    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-3
    scaled, valid_scaled = (features - mean) / deviation, (valid_features - mean) / deviation
    shape = (features.shape[1] + 1, targets.shape[1])
    balance = balance or ClassBalance(np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32))
    # What a sampler draws more often counts more here.
    class_weights = balance.weights if balance.draws is None else balance.draws.astype(np.float32)
    row_weights, valid_row_weights = (
        (labels * class_weights).sum(axis=1, keepdims=True) if classifier_type == "multi-class" else np.float32(1.0)
        for labels in (targets, valid_targets)
    )
    parameters, best, least = np.zeros(shape), (np.zeros(shape), PENALTIES[0]), np.inf

    def objective(flat: NDArray[np.float64], penalty: float) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(shape)
        loss, residual = _loss(scaled, targets, weights, classifier_type, balance.log_prior, row_weights)
        # In the features' own dtype: a product with float64 would copy the features at every step.
        kernel = scaled.T @ residual.astype(scaled.dtype) + penalty * weights[:-1]
        gradient = np.vstack([kernel, residual.sum(axis=0, keepdims=True)])
        return loss + penalty / 2 * float((weights[:-1] ** 2).sum()), gradient.ravel()

    for penalty in PENALTIES:
        found: Any = minimize(
            objective, parameters.ravel(), (penalty,), jac=True, method="L-BFGS-B", options={"maxiter": 100}
        )
        parameters = found.x.reshape(shape)
        loss, _ = _loss(valid_scaled, valid_targets, parameters, classifier_type, balance.log_prior, valid_row_weights)
        if loss >= least:
            break
        best, least = (parameters, penalty), loss
    weights, penalty = best
    loss, _ = _loss(scaled, targets, weights, classifier_type, balance.log_prior, row_weights)
    return Head(
        kernel=(weights[:-1] / deviation[:, None]).astype(np.float32),
        bias=(weights[-1] - (mean / deviation) @ weights[:-1]).astype(np.float32),
        loss=loss,
        accuracy=_accuracy(scaled @ weights[:-1] + weights[-1], targets, classifier_type),
        penalty=penalty,
    )


def layer_rates(network: keras.Model, architecture: str, transfer: TransferConfig) -> dict[str, float]:
    """Freezes the stages below `transfer.freeze_until`, and returns the factors of the others' rates.

    Returns:
        By path of a variable: `rate_decay` to the power of its stages to the last one.
    """
    import keras

    stage_of = find_architecture(architecture).stage_of
    stages = {layer.name: stage for layer in network.layers if (stage := stage_of(layer.name)) is not None}
    rates: dict[str, float] = {}
    for layer in network.layers:
        if layer.name not in stages or not layer.weights:
            continue
        stage = stages[layer.name]
        if stage < transfer.freeze_until:
            layer.trainable = False
        else:
            if transfer.freeze_wide_kernels and isinstance(layer, keras.layers.DepthwiseConv2D):
                layer.kernel.trainable = max(layer.kernel_size) <= 3
            rate = transfer.rate_decay ** (max(stages.values()) - stage)
            rates |= {variable.path: rate for variable in layer.trainable_variables}
    return rates


def _features(network: keras.Model, images: Images, chosen: NDArray[np.intp]) -> NDArray[np.float32]:
    import keras

    reader = keras.Model(network.input, network.get_layer(FEATURES_NAME).output)
    batches = [chosen[start : start + _BATCH_SIZE] for start in range(0, len(chosen), _BATCH_SIZE)]
    return np.concatenate([np.asarray(reader.predict_on_batch(np.asarray(images[batch]))) for batch in batches])


def _loss(
    scaled: NDArray[Any],
    targets: NDArray[Any],
    weights: NDArray[np.float64],
    classifier_type: ClassifierType,
    log_prior: NDArray[np.float32],
    row_weights: NDArray[np.float32] | np.float32,
) -> tuple[float, NDArray[np.float64]]:
    """Returns the mean cross-entropy (multi-label: of known labels), and its derivative by the `(N, C)` logits."""
    from scipy.special import expit, log_softmax

    logits = scaled @ weights[:-1].astype(scaled.dtype) + weights[-1]
    if classifier_type == "multi-class":
        logs = log_softmax(logits + log_prior, axis=1)
        residual = (np.exp(logs) - targets) * row_weights / len(targets)
        return float(-(targets * logs * row_weights).sum() / len(targets)), residual
    losses = targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)
    known = known_labels(targets, targets.shape[1])
    residual = (expit(logits) - targets) / int(known.sum())
    return float(losses[known].mean()), np.where(known, residual, 0.0)


def _accuracy(logits: NDArray[Any], targets: NDArray[Any], classifier_type: ClassifierType) -> float:
    if classifier_type == "multi-class":
        return float((logits.argmax(axis=1) == targets.argmax(axis=1)).mean())
    return float(((logits > 0) == (targets > 0.5))[known_labels(targets, targets.shape[1])].mean())
