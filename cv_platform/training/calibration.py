"""The temperature of a trained network: confidences that mean what they say, without another prediction.

Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2 (https://arxiv.org/abs/1706.04599): the logits
are divided by one number T, fitted on images that the weights were not fitted on. The last dense layer makes the
logits, so dividing its kernel and bias by T is the same. That is where the temperature goes: whoever reads the saved
network, to evaluate, compare, export or explain, sees the same probabilities, and nothing has to remember T. The most
probable class stays; so do the labels from a threshold of 0.5 on, while another threshold meets honest probabilities.

Targets are smoothed by the prior of one more image of either kind (Platt 1999, "Probabilistic Outputs for Support
Vector Machines", section 2.2): where every image is classified right, the likelihood alone would drive T to 0.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cv_platform.config import ClassifierType
from cv_platform.datasets.shards.reading import Images
from cv_platform.predictions import known_labels
from cv_platform.training.network import LOGITS_NAME
from cv_platform.training.unknown_labels import split_known

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
_BATCH_SIZE = 256


def calibrate(network: keras.Model, images: Images, targets: np.ndarray, classifier_type: ClassifierType) -> float:
    """Divides the logits of `network` by the temperature that fits `images`, for good, and returns the temperature.

    Call it once for a network: a second call would find a temperature near 1.

    Args:
        network: see `network`; its last dense layer is changed.
        images: `(N, H, W, 3)` uint8 that the weights were not fitted on; may be memory-mapped.
        targets: `(N,)` class indices, or `(N, C)` 0/1, NaN where unknown.
        classifier_type: multi-label has one temperature over all outputs, by the known labels.
    """
    logits = predict_logits(network, images)
    temperature = fit_temperature(logits, targets, classifier_type)
    scale_logits(network, temperature)
    logger.info(
        "temperature %.4f: cross-entropy on %d valid images %.4f, before %.4f",
        temperature,
        len(images),
        negative_log_likelihood(logits / temperature, targets, classifier_type),
        negative_log_likelihood(logits, targets, classifier_type),
    )
    return temperature


def calibrated_cross_entropy(classifier_type: ClassifierType) -> keras.metrics.Metric:
    """Returns the metric `calibrated_cross_entropy`: the mean negative log-likelihood at the best of some temperatures.

    By it epochs can be compared: what label smoothing or a bold fit adds to the likelihood, `calibrate` takes away
    from the model that is kept, so that it must not decide which one that is.

    Args:
        classifier_type: the network returns probabilities of a softmax (multi-class) or of sigmoids (multi-label).
    """
    import keras

    ops: Any = keras.ops
    temperatures = np.geomspace(0.25, 4.0, 17, dtype=np.float32)

    class CalibratedCrossEntropy(keras.metrics.Metric):
        def __init__(self) -> None:
            super().__init__(name="calibrated_cross_entropy")
            self.sums: Any = self.add_variable((len(temperatures),), "zeros", name="sums")
            self.count: Any = self.add_variable((), "zeros", name="count")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            truth, found = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
            found = ops.clip(found, 1e-7, 1 - 1e-7)
            logits = ops.log(found) if classifier_type == "multi-class" else ops.log(found) - ops.log(1 - found)
            scaled, count = logits[None] / temperatures[:, None, None], ops.cast(ops.shape(truth)[0], "float32")
            if classifier_type == "multi-class":
                losses = -ops.sum(truth[None] * ops.log_softmax(scaled, axis=-1), axis=-1)
            else:
                truth, known = split_known(truth)
                losses = ops.mean((ops.softplus(scaled) - truth[None] * scaled) * known[None], axis=-1)
                count = ops.sum(ops.mean(known, axis=-1))
            self.sums.assign_add(ops.sum(losses, axis=1))
            self.count.assign_add(count)

        def result(self) -> Any:
            return ops.min(self.sums) / ops.maximum(self.count, 1.0)

    return CalibratedCrossEntropy()


def fit_temperature(logits: NDArray[Any], targets: NDArray[Any], classifier_type: ClassifierType) -> float:
    """Returns the temperature in [0.05, 20] that minimises the negative log-likelihood of `targets`.

    It is 1 where no temperature lowers that of the targets as they are, without their smoothing.

    Args:
        logits: `(N, C)`.
        targets: `(N,)` class indices, or `(N, C)` 0/1, NaN where unknown.
        classifier_type: softmax (multi-class) or sigmoids with one temperature (multi-label).
    """
    from scipy.optimize import minimize_scalar  # Late: the code location needs none of it.

    logits, targets = _known(logits.astype(np.float64), targets)
    if not logits.size:
        return 1.0
    smoothed = _smoothed(targets, logits.shape[1], classifier_type)
    # In log T, which treats halving and doubling alike; the likelihood is convex in 1/T, so there is one minimum.
    found: Any = minimize_scalar(
        lambda log_t: _cross_entropy(logits / np.exp(log_t), smoothed, classifier_type),
        bounds=(np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    temperature = float(np.exp(found.x))
    before = negative_log_likelihood(logits, targets, classifier_type)
    return temperature if negative_log_likelihood(logits / temperature, targets, classifier_type) < before else 1.0


def negative_log_likelihood(logits: NDArray[Any], targets: NDArray[Any], classifier_type: ClassifierType) -> float:
    """Returns the mean negative log-likelihood in nats: per image (multi-class), per known label (multi-label)."""
    logits, targets = _known(logits.astype(np.float64), targets)
    return _cross_entropy(logits, _indicators(targets, logits.shape[1], classifier_type), classifier_type)


def predict_logits(network: keras.Model, images: Images) -> NDArray[np.float64]:
    """Returns the `(N, C)` logits of `images`, in their order."""
    import keras

    reader = keras.Model(network.input, network.get_layer(LOGITS_NAME).output)
    batches = [
        np.asarray(reader.predict_on_batch(np.asarray(images[start : start + _BATCH_SIZE])))
        for start in range(0, len(images), _BATCH_SIZE)
    ]
    return np.concatenate(batches).astype(np.float64)


def scale_logits(network: keras.Model, temperature: float) -> None:
    """Divides the network's logits by `temperature`, in its weights."""
    layer: Any = network.get_layer(LOGITS_NAME)
    # Divided in float64 and rounded once.
    layer.set_weights([(np.asarray(w, dtype=np.float64) / temperature).astype(w.dtype) for w in layer.get_weights()])


def _known(logits: NDArray[Any], targets: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns logits and targets of the known labels, as `(labels, 1)` where others are unknown: one T is for all."""
    known = known_labels(targets, logits.shape[1])
    return (logits, targets) if known.all() else (logits[known][:, None], targets[known][:, None])


def _cross_entropy(logits: NDArray[Any], targets: NDArray[Any], classifier_type: ClassifierType) -> float:
    if classifier_type == "multi-class":
        from scipy.special import log_softmax

        return float(-(targets * log_softmax(logits, axis=1)).sum(axis=1).mean())
    # −log σ(z) = log(1 + e^−z), in a form that no logit overflows.
    return float((targets * np.logaddexp(0, -logits) + (1 - targets) * np.logaddexp(0, logits)).mean())


def _indicators(targets: NDArray[Any], classes: int, classifier_type: ClassifierType) -> NDArray[np.float64]:
    if classifier_type == "multi-label":
        return (np.asarray(targets) > 0.5).astype(np.float64)
    return np.eye(classes)[np.asarray(targets, dtype=np.int64)]


def _smoothed(targets: NDArray[Any], classes: int, classifier_type: ClassifierType) -> NDArray[np.float64]:
    """Returns the targets with (n+1)/(n+2) in the place of 1; what that leaves goes to the other classes."""
    truth = _indicators(targets, classes, classifier_type)
    if classifier_type == "multi-label":
        positives = truth.sum()
        negatives = truth.size - positives
        return np.where(truth > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    left = 1 / (len(truth) + 2)
    return np.where(truth > 0, 1 - left, left / max(classes - 1, 1))
