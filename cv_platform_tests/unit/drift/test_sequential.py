from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from cv_platform.drift.sequential import ORDER_ALPHA, EProcess, judge_stream, order_p_value, stream_scores
from cv_platform.errors import InvalidSampleError
from cv_platform_tests.support.drift_samples import draw_sample

ALPHA = 0.05
STREAMS = 60


def alarms(rng: np.random.Generator, *, shift: float = 0.0, scale: float = 1.0, discrete: bool = False) -> int:
    count = 0
    for stream in range(STREAMS):
        reference, current = rng.normal(size=(150, 4)), rng.normal(size=(200, 4)) * scale + shift
        if discrete:
            reference, current = np.round(reference), np.round(current)
        process = EProcess(reference, seed=stream)
        for row in current:
            process.update(row)
        count += process.has_alarm(ALPHA)
    return count


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "ties"])
def test_false_alarms_over_whole_streams_stay_within_alpha(discrete: bool) -> None:
    # The alarm is looked for after each of 200 images: a fixed-sample test would fire far more often.
    bound = stats.binom.ppf(0.999, STREAMS, ALPHA)
    assert alarms(np.random.default_rng(11), discrete=discrete) <= bound


@pytest.mark.parametrize(("shift", "scale"), [(0.7, 1.0), (0.0, 1.8)], ids=["mean", "spread"])
def test_detects_shifts(shift: float, scale: float) -> None:
    assert alarms(np.random.default_rng(12), shift=shift, scale=scale) >= 0.9 * STREAMS


def test_wealth_is_a_mean_of_one_while_nothing_changes() -> None:
    # An e-process has expectation at most 1 at any time; these bets are fair, so it is 1.
    rng = np.random.default_rng(13)
    wealth = []
    for stream in range(400):
        process = EProcess(rng.normal(size=(20, 1)), seed=stream)
        for row in rng.normal(size=(8, 1)):
            process.update(row)
        wealth.append(process.wealth)
    assert np.mean(wealth) == pytest.approx(1.0, abs=4 * np.std(wealth) / 20)


def test_the_alarm_stays_once_raised() -> None:
    process = EProcess(np.zeros((50, 1)), seed=0)
    for _ in range(60):
        process.update(np.array([1.0]))
    assert process.has_alarm(ALPHA)
    peak = process.largest
    for _ in range(100):
        process.update(np.array([-1.0]))
    assert process.largest >= peak
    assert process.has_alarm(ALPHA)
    assert process.rows == 160


def test_wealth_stays_finite_however_long_the_shift_lasts() -> None:
    process = EProcess(np.zeros((2000, 1)), seed=0)
    for _ in range(4000):
        process.update(np.array([1.0]))
    assert np.isfinite(process.largest)


def test_the_same_stream_and_seed_give_the_same_wealth() -> None:
    rng = np.random.default_rng(0)
    reference, current = draw_sample(rng, 60), draw_sample(rng, 40, shift=0.5)
    first, second = (judge_stream(reference, current, alpha=ALPHA, seed=3) for _ in range(2))
    assert first == second


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


def test_images_that_come_class_by_class_are_not_judged() -> None:
    rng = np.random.default_rng(23)
    reference, current = draw_sample(rng, 300), draw_sample(rng, 300)
    by_class = current.take(np.argsort(current.bbsd.argmax(axis=1), kind="stable"))

    shuffled, sorted_ = (judge_stream(reference, each, alpha=ALPHA, seed=0) for each in (current, by_class))

    assert sorted_.e_value >= 1 / ALPHA  # What the test says of the order is what it would have said of drift.
    assert sorted_.state == "not judged: requests come in blocks"
    assert shuffled.state == "no alarm"


def test_a_shift_in_a_random_order_alarms() -> None:
    rng = np.random.default_rng(24)
    verdict = judge_stream(draw_sample(rng, 300), draw_sample(rng, 150, shift=2.0), alpha=ALPHA, seed=0)
    assert verdict.state == "alarm"
    assert verdict.order_p_value > ORDER_ALPHA


def test_scores_are_the_properties_and_the_confidence() -> None:
    sample = draw_sample(np.random.default_rng(0), 5)
    scores = stream_scores(sample)
    assert scores.shape == (5, 8)
    assert scores[:, :7] == pytest.approx(sample.properties)
    assert scores[:, 7] == pytest.approx(sample.bbsd.max(axis=1))


@pytest.mark.parametrize("row", [np.array([1.0, np.nan]), np.array([1.0]), np.array([1.0, 2.0, 3.0])])
def test_refuses_scores_that_do_not_fit(row: np.ndarray) -> None:
    process = EProcess(np.zeros((5, 2)), seed=0)
    with pytest.raises(InvalidSampleError, match=r"shape \(rows, 2\)"):
        process.update(row)


def test_a_refused_row_leaves_no_trace() -> None:
    process = EProcess(np.zeros((5, 2)), seed=0)
    with pytest.raises(InvalidSampleError):
        process.update(np.array([1.0, np.inf]))
    assert (process.rows, process.wealth) == (0, 1.0)
