"""The columns that reference parquet and request log have in common: one row per image that a model has seen.

Reference rows (`drift/`) and logged requests (`serving/`, `monitoring/`) are compared with each other, so their columns
are named and typed here, once. The names `model_name`, `uae_feats`, `bbsd_feats` and `prediction_json` are the
original's. How probabilities become predicted classes is here too: every reader of a row must come to the same answer.
"""

# pyarrow ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownParameterType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cv_platform.config import ClassifierType, Threshold
from cv_platform.properties import PROPERTY_NAMES

if TYPE_CHECKING:
    import pyarrow as pa

MODEL_NAME = "model_name"
MODEL_VERSION = "model_version"
PREDICTED_CLASS = "predicted_class"
LABEL = "label"
UAE_FEATS = "uae_feats"
BBSD_FEATS = "bbsd_feats"
FEATURES = "features"
PROPERTIES = "properties"

LABEL_SEPARATOR = "|"
"""Joins the class names of a multi-label `label` or `predicted_class`."""
UNKNOWN_LABELS = "unknown_labels"
"""Names the labels of which nobody knows whether an image has them: they are in no loss and in no metric."""
NONE_OF_THESE = ""
"""The stated class of an image that shows none of the model's classes; the same text as that of no labels."""

LABELLER = "labeller:"
"""What the source of a labeller's statement begins with. No client can say so: `POST /feedback` refuses a colon."""

VECTOR_COLUMNS: tuple[str, ...] = (UAE_FEATS, BBSD_FEATS, FEATURES, PROPERTIES)
"""The UAE embedding, the probabilities (BBSD), the penultimate layer, the pixel statistics."""


def reference_schema(*, uae_dims: int, classes: int, feature_dims: int, has_unknown_labels: bool = False) -> pa.Schema:
    """Returns the schema of `<model_name>_ref_data.parquet`; a row is one image of the reference split, by `path`.

    Vectors are fixed-size float32 lists: `uae_feats` (uae_dims), `bbsd_feats` (classes, the probabilities),
    `features` (feature_dims), `properties` (7, `PROPERTY_NAMES`). `label` is the class name; for multi-label the
    positive class names joined by `LABEL_SEPARATOR`. Where labels are unknown, `unknown_labels` names them likewise.
    """

    import pyarrow as pa  # Late: the service needs the names above, and no pyarrow.

    def vector(size: int) -> pa.DataType:
        return pa.list_(pa.float32(), size)

    return pa.schema(
        [
            ("path", pa.string()),
            ("sha256", pa.string()),
            (LABEL, pa.string()),
            *([(UNKNOWN_LABELS, pa.string())] if has_unknown_labels else []),
            (MODEL_NAME, pa.string()),
            (MODEL_VERSION, pa.string()),
            (PREDICTED_CLASS, pa.string()),
            (UAE_FEATS, vector(uae_dims)),
            (BBSD_FEATS, vector(classes)),
            (FEATURES, vector(feature_dims)),
            (PROPERTIES, vector(len(PROPERTY_NAMES))),
        ]
    )


def decide(probabilities: NDArray[Any], threshold: Threshold) -> NDArray[np.bool_]:
    """Returns which probabilities are predicted by a multi-label model: those from `threshold` on.

    Compared in float32, the type of the model's outputs: 0.7 in float32 is just below 0.7 in float64, so that a
    comparison in float64 would refuse a probability that equals the threshold.

    Args:
        probabilities: of any shape `(…, C)`; what is no float32 is rounded to it.
        threshold: 0–1.

    Returns:
        bool, of the same shape.
    """
    return np.asarray(probabilities, dtype=np.float32) >= np.asarray(threshold, dtype=np.float32)


def predicted_flags(
    probabilities: NDArray[Any], classifier_type: ClassifierType, threshold: Threshold = 0.5
) -> NDArray[np.bool_]:
    """Returns which classes are predicted for which image.

    Args:
        probabilities: `(N, C)`.
        classifier_type: multi-class predicts exactly one class per row, the most probable (the first of equals);
            multi-label all that `decide` takes.
        threshold: multi-label only.

    Returns:
        `(N, C)` bool.
    """
    if classifier_type == "multi-label":
        return decide(probabilities, threshold)
    flags = np.zeros(probabilities.shape, dtype=np.bool_)
    flags[np.arange(len(probabilities)), probabilities.argmax(axis=1)] = True
    return flags


def one_hot(targets: NDArray[Any], classes: int) -> NDArray[np.bool_]:
    """Returns `(N, C)` bool from `(N,)` class indices, or from `(N, C)` targets of 0, 1 and NaN.

    NaN, an unknown label, is False: see `known_decisions` before you compare.
    """
    if targets.ndim == 2:
        return targets > 0.5
    return np.asarray(targets)[:, None] == np.arange(classes)[None, :]


def known_labels(targets: NDArray[Any], classes: int) -> NDArray[np.bool_]:
    """Returns `(N, C)` bool: whether a label is known; of `(N,)` class indices all are, of `(N, C)` what is no NaN."""
    return ~np.isnan(targets) if targets.ndim == 2 else np.ones((len(targets), classes), dtype=np.bool_)


def known_decisions(decisions: NDArray[np.bool_], targets: NDArray[Any]) -> NDArray[np.bool_]:
    """Returns decisions, `(N, C)` bool, with those about unknown labels as in `one_hot`: they contradict nothing there.

    So an image is right where all decisions about its known labels are, and hits, misses and false alarms are those of
    known labels. Only true negatives have to be counted by `known_labels`.
    """
    return decisions & known_labels(targets, decisions.shape[1])


def label_text(labels: Iterable[str], unknown: Iterable[str] = ()) -> str:
    """Returns what is known of an image in words, such as `cat|dog (unknown: emu)`."""
    said, left_open = LABEL_SEPARATOR.join(labels) or "no label", LABEL_SEPARATOR.join(unknown)
    return f"{said} (unknown: {left_open})" if left_open else said


def label_texts(flags: NDArray[np.bool_], class_names: Sequence[str]) -> list[str]:
    """Names the positive classes of each row of `(N, C)` flags, joined by the separator; none is the empty string."""
    return [LABEL_SEPARATOR.join(class_names[int(i)] for i in np.flatnonzero(row)) for row in flags]
