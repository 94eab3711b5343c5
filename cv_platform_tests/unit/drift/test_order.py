from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cv_platform.drift.order import ORDER_ALPHA, order_p_value


def test_the_p_value_of_an_order_is_the_share_of_orders_with_as_many_repeats() -> None:
    # By hand: of the 6!/(3!·3!) = 20 orders of 000111, two have 4 repeats (2 runs), and four more have 3 (3 runs).
    def p(*classes: int) -> float:
        return order_p_value(np.array(classes), seed=1)

    deviation = 4 * np.sqrt(0.3 * 0.7 / 999)
    assert p(0, 0, 0, 1, 1, 1) == pytest.approx(2 / 20, abs=deviation)
    assert p(0, 0, 1, 1, 1, 0) == pytest.approx(6 / 20, abs=deviation)
    assert p(0, 1, 0, 1, 0, 1) == 1.0
    assert p(2, 2, 2, 2) == p(7) == p() == 1.0


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.96, 0.02, 0.02), (0.1,) * 10], ids=["two", "rare", "ten"])
def test_a_random_order_is_taken_for_blocks_at_the_stated_level(shares: tuple[float, ...]) -> None:
    rng = np.random.default_rng(21)
    streams = 300
    blocks = sum(
        order_p_value(rng.choice(len(shares), size=120, p=shares), seed=seed) <= ORDER_ALPHA for seed in range(streams)
    )
    assert blocks <= stats.binom.ppf(0.999, streams, ORDER_ALPHA)


def blocky(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    return np.repeat(rng.integers(0, 10, size=rows), length)[:rows]


@pytest.mark.parametrize("length", [2, 3, 10, 200])
def test_detects_blocks_and_sorted_classes(length: int) -> None:
    rng = np.random.default_rng(22)
    found = [order_p_value(blocky(rng, 200, length), seed=seed) <= ORDER_ALPHA for seed in range(30)]
    if length == 200:  # A single class has one order only.
        assert not any(found)
    else:
        assert all(found)
    classes = np.sort(rng.integers(0, 10, size=200))
    assert order_p_value(classes, seed=0) <= ORDER_ALPHA
