"""The model card: what a model is for, what it was made of, how well it does and where not, on one page.

After Mitchell et al. (2019, https://arxiv.org/abs/1810.03993). Markdown for repositories, HTML for people; both lie in
the bundle, so that they go where the model goes. What nobody has written down is named as missing, not left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cv_platform.files import write_file
from cv_platform.pages import render
from cv_platform.records import Evaluation, TrainedModel, UnknownRate

MARKDOWN, HTML = "model_card.md", "model_card.html"
_SHOWN = ("accuracy", "exact_match", "top3_accuracy", "balanced_accuracy", "mean_average_precision", "macro_precision")
_SHOWN += ("macro_recall", "macro_f1", "auc_macro", "log_loss", "ece", "ece_uncalibrated")
_WEAKEST = 5


def write_model_card(
    folder: Path,
    trained: TrainedModel,
    evaluation: Evaluation,
    *,
    licence: str,
    unknown: Sequence[UnknownRate] = (),
) -> None:
    """Writes `model_card.md` and `model_card.html` into `folder`.

    Args:
        folder: receives them.
        trained: the model.
        evaluation: of the same model.
        licence: of the images, empty where it is not known.
        unknown: which share of images the served model calls unknown, by kind; empty where it calls none so.
    """
    config = trained.effective_config
    known = [row for row in evaluation.per_class if row.get("recall") is not None]
    facts = {
        "title": f"Model card: {trained.model}",
        "trained": trained,
        "evaluation": evaluation,
        "description": config.get("description", ""),
        "owners": config.get("owners", ()),
        "licence": licence,
        "unknown": unknown,
        "recipe": config.get("train", {}),
        "architecture": config.get("model", {}).get("architecture", "not known"),
        "metrics": [
            (name, evaluation.metrics[name], evaluation.intervals.get(name))
            for name in _SHOWN
            if name in evaluation.metrics
        ],
        "weakest": sorted(known, key=lambda row: row["recall"])[:_WEAKEST],
        "worse": [part for part in evaluation.slices if part.is_worse],
    }
    for name in (MARKDOWN, HTML):
        write_file(folder / name, render(f"evaluation/{name}", **facts))
