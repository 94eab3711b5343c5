"""Loss and metrics of a training on several labels of which some are unknown (NaN): these have no part in either.

Every known label of a batch counts the same, whichever image it belongs to. Where all labels are known, Keras's own
loss and metrics train: these round differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import keras


def known_cross_entropy(label_smoothing: float) -> Callable[[Any, Any], Any]:
    """Returns the loss of `(N, C)` targets (0, 1, NaN) and `(N, C)` probabilities, `(N,)`.

    Its mean is the mean binary cross-entropy of the known labels; 0 where no label is known.
    """
    import keras

    ops: Any = keras.ops

    def cross_entropy(targets: Any, probabilities: Any) -> Any:
        truth, known = split_known(targets)
        smooth = truth * (1 - label_smoothing) + 0.5 * label_smoothing
        # Without NaN before the product: 0 times NaN is NaN, in the gradient, too.
        losses = ops.binary_crossentropy(smooth, probabilities) * known
        images = ops.cast(ops.shape(targets)[0], "float32")
        return ops.sum(losses, axis=-1) * images / ops.maximum(ops.sum(known), 1.0)

    return cross_entropy


def known_metrics(threshold: float) -> list[keras.metrics.Metric]:
    """Returns `accuracy`, the share of right decisions, and `cross_entropy`, of known labels."""
    import keras

    ops: Any = keras.ops

    class KnownMean(keras.metrics.Metric):
        def __init__(self, measure: Callable[[Any, Any], Any], name: str) -> None:
            super().__init__(name=name)
            self.measure = measure
            self.total: Any = self.add_variable((), "zeros", name="total")
            self.count: Any = self.add_variable((), "zeros", name="count")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            truth, known = split_known(y_true)
            self.total.assign_add(ops.sum(self.measure(truth, y_pred) * known))
            self.count.assign_add(ops.sum(known))

        def result(self) -> Any:
            return self.total / ops.maximum(self.count, 1.0)

    def is_right(truth: Any, probabilities: Any) -> Any:
        return ops.cast(ops.equal(truth > 0.5, probabilities > threshold), "float32")

    return [KnownMean(is_right, "accuracy"), KnownMean(ops.binary_crossentropy, "cross_entropy")]


def split_known(targets: Any) -> tuple[Any, Any]:
    """Returns `(N, C)` float32 targets with 0 in the place of NaN, and 1 where they are known, else 0."""
    import keras

    ops: Any = keras.ops
    known = ops.logical_not(ops.isnan(targets))
    return ops.where(known, targets, ops.zeros_like(targets)), ops.cast(known, "float32")
