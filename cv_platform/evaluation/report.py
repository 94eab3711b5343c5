"""The page of an evaluation: one file with the pictures inside, which needs no network and no script.

And the guard of those who need an evaluation that passed.
"""

from __future__ import annotations

import base64

from cv_platform.audit import AuditEntry
from cv_platform.errors import VerdictError
from cv_platform.pages import render
from cv_platform.records import Evaluation, ModelIdentity, Provenance, Task


def render_report(evaluation: Evaluation, provenance: Provenance, task: Task) -> str:
    """Returns the page, with the PNG files of the plots in it."""
    labels = task.classifier_type
    return render(
        "evaluation/report.html",
        title=f"Evaluation of {evaluation.model.model_name}",
        facts=[
            ("version", evaluation.model.version),
            ("dataset", f"{provenance} ({provenance.dvc_md5})"),
            ("test images", f"{evaluation.metrics['images']:.0f}"),
            ("size", evaluation.size),
            ("one image", evaluation.latency),
            ("labels", labels if labels == "multi-class" else f"multi-label, {_thresholds(evaluation, task)}"),
        ],
        evaluation=evaluation,
        plots={name: base64.b64encode(path.read_bytes()).decode() for name, path in evaluation.plots.items()},
    )


def _thresholds(evaluation: Evaluation, task: Task) -> str:
    threshold = evaluation.threshold
    if not isinstance(threshold, tuple):
        return f"threshold {threshold:g}"
    each = [f"{name} {value:.3f}" for name, value in zip(task.class_names, threshold, strict=True)]
    return f"thresholds {', '.join(each)}"


def require_promotion(evaluation: Evaluation, model: ModelIdentity, override: AuditEntry | None) -> None:
    """Refuses to go on without a passed evaluation of this very model version, or an override; in later runs too.

    Raises:
        VerdictError: the latest evaluation is of another version, or it failed.
    """
    if evaluation.model != model:
        raise VerdictError(
            f"Expected an evaluation of {model}. Received: one of {evaluation.model}. "
            "Materialise evaluation, then this asset."
        )
    if not evaluation.passed and override is None:
        raise VerdictError(
            f"Expected a model that passes its promotion gate. Received: {model}: "
            f"{'; '.join(evaluation.reasons)}. Train a better model, change the limits in `evaluate`, or "
            f'overrule them: cv-platform promote {model.version} --because "…".'
        )
