"""How often the promotion gate is wrong, by simulation: pairs of models whose true accuracies are known.

A pair answers the images of a test split. On a share of them the two disagree, and each is right on its part of these;
for equal models the parts are equal, for a worse challenger they differ by what it loses. The rates stand beside what
`evaluate.alpha` and `Comparison.detectable_loss` state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import Options
from cv_platform.config import EvaluateConfig
from cv_platform.evaluation.gate import compare
from cv_platform.predictions import one_hot
from cv_platform.records import Comparison

PAIRS = 200
CLASSES = 10
ACCURACY, DISAGREEMENT = 0.93, 0.06
_SURE = 0.01
"""A rate holds unless so few of all simulations would look as bad with it."""


@dataclass(frozen=True)
class World:
    """Test images per pair, and the accuracy that the challenger truly loses."""

    images: int
    loss: float


def run(options: Options) -> Report:
    """Simulates equal and worse challengers, small and large test splits."""
    clock = Stopwatch()
    default, lenient = EvaluateConfig(), EvaluateConfig(undecided="promote")
    strict = EvaluateConfig(undecided="refuse")
    checks, notes = [], []
    for images in (200, 1000, 5000):
        equal = _pairs(World(images, 0.0), lenient, options.seed)
        checks.append(_at_most("equal models that are called worse", images, equal, default.alpha, is_refusal=True))
        typical = float(np.median([found.detectable_loss for found in equal]))
        worse = _pairs(World(images, typical), lenient, options.seed)
        refused = sum(not found.passed for found in worse)
        checks.append(
            Check(
                what=f"{images} images: refusals of a model that loses what the gate says it can show, {typical:.3f}",
                expected="≥ 0.80 by design, ≥ 0.70 of 200",
                received=f"{refused / PAIRS:.3f}",
                held=refused / PAIRS >= 0.7,
            )
        )
        lost = _pairs(World(images, strict.max_regression), strict, options.seed)
        what = f"false promotions of a model that loses {strict.max_regression}, undecided: refuse"
        checks.append(_at_most(what, images, lost, strict.alpha, is_refusal=False))
        for config in (lenient, default, strict):
            passed = [
                sum(found.passed for found in _pairs(World(images, loss), config, options.seed)) / PAIRS
                for loss in (0.0, 0.01, 0.02, 0.03)
            ]
            shares = ", ".join(f"{share:.3f}" for share in passed)
            notes.append(
                f"{images} images, undecided: {config.undecided}: promoted of models that lose 0, 1, 2, 3 %: {shares}"
            )
    return Report(
        name="gate",
        title=f"Promotion gate: {PAIRS} simulated pairs each, accuracy {ACCURACY}, {DISAGREEMENT:.0%} disagreement",
        unit="pair",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(("numpy", "scipy")),
        settings={"pairs": PAIRS, "classes": CLASSES, "alpha": default.alpha, "max_regression": default.max_regression},
        observations={},
        ratios=[],
        checks=checks,
        notes=notes,
    )


def _at_most(what: str, images: int, found: list[Comparison], rate: float, *, is_refusal: bool) -> Check:
    wrong = sum(comparison.passed != is_refusal for comparison in found)
    most = int(stats.binom.isf(_SURE, PAIRS, rate))
    return Check(
        what=f"{images} images: {what}",
        expected=f"rate ≤ {rate}, so ≤ {most} of {PAIRS}",
        received=f"{wrong} of {PAIRS}",
        held=wrong <= most,
    )


def _pairs(world: World, config: EvaluateConfig, seed: int) -> list[Comparison]:
    rng = np.random.default_rng([seed, world.images])
    return [_pair(world, config, rng) for _ in range(PAIRS)]


def _pair(world: World, config: EvaluateConfig, rng: np.random.Generator) -> Comparison:
    labels = rng.integers(0, CLASSES, world.images)
    # Of what they disagree on, each is right on its part; both wrong is what is left of the errors.
    disagreement = max(DISAGREEMENT, world.loss)
    gained, lost = (disagreement - world.loss) / 2, (disagreement + world.loss) / 2
    shares = [gained, lost, ACCURACY - lost, 1 - ACCURACY - gained]
    kind = rng.choice(4, size=world.images, p=shares)
    answer = partial(_decisions, labels, rng)
    return compare(
        one_hot(labels, CLASSES),
        answer(np.isin(kind, (0, 2))),
        answer(np.isin(kind, (1, 2))),
        config,
        [str(name) for name in range(CLASSES)],
        "20260101T000000Z-00000001",
    )


def _decisions(labels: np.ndarray, rng: np.random.Generator, is_right: np.ndarray) -> np.ndarray:
    others = (labels + rng.integers(1, CLASSES, len(labels))) % CLASSES
    return one_hot(np.where(is_right, labels, others), CLASSES)
