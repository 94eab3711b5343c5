"""The promotion gate: whether a model may be exported and deployed, and why, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cv_platform.config import EvaluateConfig

_ROUNDING = 1e-9
"""0.98 − 0.97 is 0.010000000000000009 in floating point: a limit that is met exactly is met."""


@dataclass(frozen=True)
class GateVerdict:
    """Whether a model passes, with what failed (or, if nothing did, what was satisfied)."""

    passed: bool
    reasons: tuple[str, ...]


def judge_promotion(
    metrics: Mapping[str, float], config: EvaluateConfig, champion_accuracy: float | None
) -> GateVerdict:
    """Holds a model's metrics against the config and against the model in production. Limits are inclusive.

    Args:
        metrics: with `accuracy` and `macro_f1`; one that is missing could not be computed, and fails a limit above 0.
        config: `min_accuracy`, `min_macro_f1`, `max_regression`.
        champion_accuracy: of the production model, on the same kind of test split; None when nothing is in production.
    """
    failed: list[str] = []
    satisfied: list[str] = []
    for metric, field in (("accuracy", "min_accuracy"), ("macro_f1", "min_macro_f1")):
        limit = float(getattr(config, field))
        value = metrics.get(metric)
        words = metric.replace("_", " ")
        if value is None:
            known = failed if limit > 0 else satisfied
            known.append(f"{words} could not be computed; {field} is {limit:.4f}")
        elif value < limit - _ROUNDING:
            failed.append(f"{words} {value:.4f} is below {field} {limit:.4f} by {limit - value:.4f}")
        else:
            satisfied.append(f"{words} {value:.4f} reaches {field} {limit:.4f}")
    accuracy = metrics.get("accuracy")
    if champion_accuracy is None:
        satisfied.append("no version of this model is in production to compare with")
    elif accuracy is None:
        failed.append(f"accuracy could not be computed, the production model has {champion_accuracy:.4f}")
    else:
        lost = champion_accuracy - accuracy
        words = f"accuracy {accuracy:.4f} against {champion_accuracy:.4f} in production"
        change = f"loses {lost:.4f}" if lost > 0 else f"gains {-lost:.4f}"
        if lost > config.max_regression + _ROUNDING:
            failed.append(f"{words} {change}, more than max_regression {config.max_regression:.4f}")
        else:
            satisfied.append(f"{words} {change}; max_regression is {config.max_regression:.4f}")
    return GateVerdict(passed=not failed, reasons=tuple(failed or satisfied))
