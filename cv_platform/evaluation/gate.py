"""The promotion gate: whether a model may be exported and deployed, and why, in words.

A model passes by absolute limits, and by a comparison with the version in production on the same images, pair by pair:
what both get right or wrong says nothing about which is better. An image is right as a whole, with labels as sets.
What cannot be compared does not pass; `cv-platform promote` overrules that, and is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cv_platform.config import EvaluateConfig
from cv_platform.records import ClassLoss, Comparison

_ROUNDING = 1e-9
"""0.98 − 0.97 is 0.010000000000000009 in floating point: a limit that is met exactly is met."""
_RESAMPLES = 20_000
_POWER = 0.8


@dataclass(frozen=True)
class Champion:
    """The version in production, and what it decides about the challenger's test images.

    Attributes:
        version: of the model in production.
        decisions: `(N, C)` bool, which classes it predicts, in the challenger's order of classes; None where it could
            not be asked.
        seen: `(N,)` bool: images that it was trained on; None where its bundle does not say.
        problem: why it could not be asked, and what to do; empty where it could.
    """

    version: str
    decisions: np.ndarray | None = None
    seen: np.ndarray | None = None
    problem: str = ""


@dataclass(frozen=True)
class GateVerdict:
    """Whether a model passes, with what failed (or, if nothing did, what was satisfied)."""

    passed: bool
    reasons: tuple[str, ...]
    comparison: Comparison | None = None


def judge_promotion(
    metrics: Mapping[str, float],
    config: EvaluateConfig,
    champion: Champion | None = None,
    *,
    truth: np.ndarray | None = None,
    decisions: np.ndarray | None = None,
    class_names: Sequence[str] = (),
) -> GateVerdict:
    """Holds a model's metrics against the config and against the model in production. Limits are inclusive.

    Args:
        metrics: with `accuracy`, `macro_f1`, `ece` and `cpu_ms`; one that is missing could not be computed, and fails
            a limit that the config sets.
        config: `min_accuracy`, `min_macro_f1`, `max_ece`, `max_cpu_ms`, and how it is compared: `max_regression` and
            what follows it.
        champion: None when nothing is in production.
        truth: `(N, C)` bool, with a champion: the labels of the test images.
        decisions: `(N, C)` bool, with a champion: what the challenger decides; of both about known labels only, see
            `predictions.known_decisions`.
        class_names: of the columns.
    """
    failed: list[str] = []
    satisfied: list[str] = []
    _judge_limits(metrics, config, failed, satisfied)
    comparison = None
    if champion is None:
        satisfied.append("no version of this model is in production to compare with")
    elif champion.decisions is None or truth is None or decisions is None:
        failed.append(f"{champion.version} in production cannot be compared with: {champion.problem}")
    elif champion.seen is not None and champion.seen.all():
        failed.append(
            f"{champion.version} in production was trained on all {len(truth)} test images, so that nothing compares "
            "the two fairly: add new images to the test split"
        )
    else:
        new = np.ones(len(truth), dtype=bool) if champion.seen is None else ~champion.seen
        comparison = compare(truth[new], decisions[new], champion.decisions[new], config, class_names, champion.version)
        known = satisfied if comparison.passed else failed
        known.append(
            _in_words(comparison, config, left_out=None if champion.seen is None else int(champion.seen.sum()))
        )
        failed.extend(_class_in_words(loss, config) for loss in comparison.lost_classes)
    return GateVerdict(passed=not failed, reasons=tuple(failed or satisfied), comparison=comparison)


def _judge_limits(
    metrics: Mapping[str, float], config: EvaluateConfig, failed: list[str], satisfied: list[str]
) -> None:
    """Adds what the limits say that need no other model."""
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
    for metric, field, words, limit in (
        ("ece", "max_ece", "the expected calibration error", config.max_ece if config.max_ece < 1 else None),
        ("cpu_ms", "max_cpu_ms", "the CPU time of one image in milliseconds", config.max_cpu_ms),
    ):
        value = metrics.get(metric)
        if limit is None:
            continue
        if value is None:
            failed.append(f"{words} could not be measured; {field} is {limit:g}")
        elif not value <= limit + _ROUNDING:  # A NaN fails, too.
            failed.append(f"{words}, {value:.4g}, is above {field} {limit:g}")
        else:
            # Without the value: a time is another in each run, and what is said here is the verdict's content.
            satisfied.append(f"{words} is within {field} {limit:g}")


def compare(
    truth: np.ndarray,
    challenger: np.ndarray,
    champion: np.ndarray,
    config: EvaluateConfig,
    class_names: Sequence[str],
    version: str,
) -> Comparison:
    """Compares two models' decisions about the same images, all `(N, C)` bool.

    An equal challenger is called worse at a rate of at most `alpha`: half of it is the accuracy's, half is shared by
    the classes' recalls (Holm 1979). Both tests are McNemar's, exact and one-sided: of the images that one of the two
    gets right, too many are the champion's. https://doi.org/10.1007/BF02295996

    The interval is of a bootstrap over images. Half an image is added to each way to agree or not (Agresti and Min
    2005, https://doi.org/10.1002/sim.1781): two models that agree on twenty images are not known to agree on all.
    """
    right, right_before = (challenger == truth).all(axis=1), (champion == truth).all(axis=1)
    gained, lost = int((right & ~right_before).sum()), int((~right & right_before).sum())
    count = len(truth)
    difference = (gained - lost) / count
    low, high = _interval(gained, lost, count, config.alpha)
    p_value = _mcnemar(gained, lost)
    has_lost = -difference > config.max_regression + _ROUNDING and p_value <= config.alpha / 2
    is_undecided = not has_lost and low < -config.max_regression
    noise = ((gained + lost + 1) / (count + 2) / count) ** 0.5
    # It has to be significant, and to look larger than what may be lost.
    power = float(stats.norm.ppf(_POWER))
    detectable = max((stats.norm.isf(config.alpha / 2) + power) * noise, config.max_regression + power * noise)
    return Comparison(
        version=version,
        images=count,
        only_challenger_right=gained,
        only_champion_right=lost,
        accuracy=float(right.mean()),
        champion_accuracy=float(right_before.mean()),
        low=low,
        high=high,
        p_value=p_value,
        detectable_loss=float(detectable),
        outcome="worse" if has_lost else "undecided" if is_undecided else "not worse",
        passed=not has_lost and not (is_undecided and _waits(config, -difference)),
        lost_classes=_lost_classes(truth, challenger, champion, config, class_names),
    )


def _waits(config: EvaluateConfig, loss: float) -> bool:
    """Returns whether an undecided model is refused; `loss` is the share of right images that it has lost."""
    return config.undecided == "refuse" or (config.undecided == "estimate" and loss > config.max_regression + _ROUNDING)


def _mcnemar(gained: int, lost: int) -> float:
    """Returns how probable so many losses are among the images on which two equal models differ."""
    return float(stats.binom.sf(lost - 1, gained + lost, 0.5))


def _interval(gained: int, lost: int, count: int, alpha: float) -> tuple[float, float]:
    shares = np.array([gained + 0.5, lost + 0.5, count - gained - lost + 1.0]) / (count + 2)
    drawn = np.random.default_rng(0).multinomial(count, shares, size=_RESAMPLES)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / count, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


def _lost_classes(
    truth: np.ndarray,
    challenger: np.ndarray,
    champion: np.ndarray,
    config: EvaluateConfig,
    class_names: Sequence[str],
) -> tuple[ClassLoss, ...]:
    """Returns the classes whose recall has fallen by more than its budget, and by more than chance."""
    rows: list[tuple[float, int, float, float, int]] = []
    for index in np.flatnonzero(truth.any(axis=0)):
        of_class = truth[:, index]
        found, found_before = challenger[of_class, index], champion[of_class, index]
        p_value = _mcnemar(int((found & ~found_before).sum()), int((~found & found_before).sum()))
        rows.append((p_value, int(index), float(found.mean()), float(found_before.mean()), int(of_class.sum())))
    losses = []
    for rank, (p_value, index, recall, before, count) in enumerate(sorted(rows)):
        if p_value * (len(rows) - rank) > config.alpha / 2:
            break
        if before - recall > config.max_recall_regression + _ROUNDING:
            losses.append(
                ClassLoss(name=class_names[index], recall=recall, champion_recall=before, images=count, p_value=p_value)
            )
    return tuple(losses)


def _in_words(comparison: Comparison, config: EvaluateConfig, *, left_out: int | None) -> str:
    lost = comparison.champion_accuracy - comparison.accuracy
    words = (
        f"accuracy {comparison.accuracy:.4f} against {comparison.champion_accuracy:.4f} of {comparison.version} in "
        f"production on the same {comparison.images} test images {'loses' if lost > 0 else 'gains'} {abs(lost):.4f} "
        f"({1 - config.alpha:.0%} interval {comparison.low:+.4f} to {comparison.high:+.4f}; "
        f"{comparison.only_champion_right} images only the one in production gets right, "
        f"{comparison.only_challenger_right} only the new one, exact McNemar p {comparison.p_value:.2g})"
    )
    if comparison.outcome == "worse":
        words += f", more than max_regression {config.max_regression:.4f}"
    elif comparison.outcome == "undecided":
        words += (
            f"; too few images to rule out a loss above max_regression {config.max_regression:.4f}: a loss of "
            f"{comparison.detectable_loss:.4f} would show four times out of five, and evaluate.undecided says "
            f"{config.undecided}"
        )
        words += (
            ""
            if comparison.passed or config.undecided == "refuse"
            else (": what they show is above it. More test images would tell")
        )
    else:
        words += f"; max_regression is {config.max_regression:.4f}"
    if left_out is None:
        words += "; which images that version was trained on is not known, as an earlier release published it"
    elif left_out:
        words += f"; {left_out} test images that it was trained on are left out"
    return words


def _class_in_words(loss: ClassLoss, config: EvaluateConfig) -> str:
    return (
        f"recall of {loss.name} falls from {loss.champion_recall:.4f} to {loss.recall:.4f} on its {loss.images} test "
        f"images, by more than max_recall_regression {config.max_recall_regression:.4f} (exact McNemar p "
        f"{loss.p_value:.2g}, one of all classes)"
    )
