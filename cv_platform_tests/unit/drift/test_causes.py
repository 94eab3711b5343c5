from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cv_platform.drift.causes import Labelled, estimate_mix, find_causes
from cv_platform.drift.sample import REPRESENTATIONS, DriftSample
from cv_platform.drift.verdict import judge
from cv_platform.records import DriftCauses
from cv_platform_tests.support.drift_samples import CLASSES, draw_classes

EQUAL = np.full(len(CLASSES), 1 / len(CLASSES))
MOSTLY_ANTS = np.array([0.6, 0.1, 0.1, 0.1, 0.1])


def labels(seed: int, rows: int, shares: NDArray[np.float64] = EQUAL) -> NDArray[np.intp]:
    return np.random.default_rng(seed).choice(len(CLASSES), size=rows, p=shares)


@pytest.fixture(scope="module")
def reference() -> Labelled:
    known = labels(1, 600)
    return Labelled(draw_classes(np.random.default_rng(2), known), np.eye(len(CLASSES), dtype=np.bool_)[known])


def causes(reference: Labelled, current: DriftSample) -> DriftCauses:
    effort: dict[str, Any] = {"permutations": 99, "max_reference_rows": 600, "seed": 0}
    assert judge(reference.sample, current, alpha=0.05, **effort).drifted
    return find_causes(reference, current, class_names=CLASSES, **effort)


def test_another_mix_of_classes_is_told_with_the_shares_that_it_has(reference: Labelled) -> None:
    current = draw_classes(np.random.default_rng(3), labels(4, 400, MOSTLY_ANTS))
    found = causes(reference, current)
    assert found.cause == "class mix"
    ants = found.class_mix[0]
    assert ants.low < 0.6 < ants.high
    assert ants.reference_share == pytest.approx(0.2, abs=0.05)
    assert found.moved[0].class_name == "ant"


def test_other_images_of_the_same_classes_are_told_whatever_their_mix(reference: Labelled) -> None:
    rng = np.random.default_rng(5)
    assert causes(reference, draw_classes(rng, labels(6, 300), shift=0.5)).cause == "images"
    assert causes(reference, draw_classes(rng, labels(7, 300, MOSTLY_ANTS), shift=0.5)).cause == "images"


def test_images_like_none_of_the_reference_are_told_from_a_change_of_all(reference: Labelled) -> None:
    usual = draw_classes(np.random.default_rng(8), labels(9, 200))
    strange = draw_classes(np.random.default_rng(10), labels(11, 50), shift=12.0)
    mixed = DriftSample(*(np.concatenate([getattr(usual, name), getattr(strange, name)]) for name in REPRESENTATIONS))
    found = causes(reference, mixed)
    assert found.cause == "unknown images"
    assert 0.19 <= found.unknown_share <= 0.25
    assert causes(reference, strange.take(np.arange(40))).cause == "not told apart"


def test_classes_that_the_reference_hardly_has_are_not_told_apart(reference: Labelled) -> None:
    few = np.flatnonzero(reference.targets[:, 0])[:20]
    rare = np.concatenate([few, np.flatnonzero(~reference.targets[:, 0])])
    lacking = Labelled(reference.sample.take(rare), reference.targets[rare])
    only_ants = draw_classes(np.random.default_rng(12), np.zeros(100, dtype=np.intp))
    assert causes(lacking, only_ants).cause == "not told apart"


def test_an_unchanged_mix_is_estimated_as_the_reference_has_it(reference: Labelled) -> None:
    mix = estimate_mix(reference.sample, reference.sample, seed=0)
    assert mix.shares == pytest.approx(reference.sample.bbsd.mean(axis=0), abs=0.02)
    assert (mix.low <= mix.shares).all()
    assert (mix.shares <= mix.high).all()
