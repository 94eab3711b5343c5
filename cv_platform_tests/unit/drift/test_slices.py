from __future__ import annotations

import numpy as np
from scipy import stats

from cv_platform.drift.slices import MOST_SLICES, Slices, moved_slices, named_slices
from cv_platform_tests.support.drift_samples import draw_sample


def test_only_frequent_values_that_are_a_part_of_the_window_are_slices() -> None:
    tags = ["line-1"] * 50 + ["line-2"] * 20 + ["rare"] * 19 + [None] * 11
    found = named_slices({"client": ["0a1b2c3d"] * 100, "tag": tags})
    assert set(found) == {("tag", "line-1"), ("tag", "line-2")}
    assert np.flatnonzero(found["tag", "line-2"]).tolist() == list(range(50, 70))
    many = named_slices({"client": [None] * 600, "tag": [f"t{at % 30}" for at in range(600)]})
    assert len(many) == MOST_SLICES


def test_the_slice_that_moved_is_named_first_and_the_others_have_not() -> None:
    rng = np.random.default_rng(3)
    reference, window = draw_sample(rng, 300), draw_sample(rng, 200)
    moved = draw_sample(rng, 40, shift=2.5)
    for name in ("bbsd", "features", "uae", "properties"):
        getattr(window, name)[80:120] = getattr(moved, name)
    slices: Slices = {("tag", f"line-{at}"): np.arange(200) // 40 == at for at in range(5)}
    first, *others = moved_slices(reference, window, slices, alpha=0.05)
    assert (first.value, first.rows, first.has_moved) == ("line-2", 40, True)
    assert first.adjusted_p_value < 1e-4
    assert not any(one.has_moved for one in others)


def test_false_alarms_over_all_slices_together_stay_within_alpha() -> None:
    alarms = 0
    slices: Slices = {("tag", str(at)): np.arange(150) % 6 == at for at in range(6)}
    for trial in range(25):
        rng = np.random.default_rng((11, trial))
        found = moved_slices(draw_sample(rng, 150), draw_sample(rng, 150), slices, alpha=0.05)
        alarms += found[0].has_moved
    assert alarms <= stats.binom.ppf(0.999, 25, 0.05)
