"""An anytime-valid test on a stream: it may be looked at after every image and stopped at any time.

Between scheduled reports, each logged image gives a few scores (its pixel statistics, the model's confidence). While
nothing has changed, each score ranks uniformly among the reference and the stream so far: the conformal p-values are
independent and uniform, whatever the distribution (Vovk 2021). A gambler bets against that; its wealth is an e-process,
and by Ville's inequality reaches 1/alpha with probability at most alpha, over the whole infinite stream.

All of that rests on an exchangeable order: images that come class by class are in turn unlike those before them, which
is a departure that the gambler bets on, whatever they are as a whole. So the order is tested first, by the repeats of
the predicted class, and a stream in blocks is not judged. That test sees blocks of classes alone, no other dependence
between successive images, and a class that comes up in the midst of a stream looks like a block to it.

Sources:
    Podkopaev & Ramdas 2023, "Sequential Predictive Two-Sample and Independence Testing", arXiv 2305.00143: testing by
    betting with the Online Newton Step.
    Vovk 2021, "Testing randomness online", Statistical Science 36(4): conformal test martingales.
    Vovk & Wang 2021, "E-values", Annals of Statistics 49(3): the mean of e-processes is an e-process.
    Wald & Wolfowitz 1940, "On a test whether two samples are from the same population", Annals of Mathematical
    Statistics 11(2): the runs test. Barton & David 1957, "Multiple runs", Biometrika 44(1/2): of several classes.
    Phipson & Smyth 2010, "Permutation P-values Should Never Be Zero", SAGMB 9(1): a permutation test's exact level.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy as np
from numpy.typing import NDArray

from cv_platform.drift.sample import DriftSample
from cv_platform.errors import InvalidSampleError
from cv_platform.records import StreamState, StreamVerdict

Scores = NDArray[np.float64]
_NEWTON_STEP = 2.0 / (2.0 - np.log(3.0))
"""Step of the Online Newton Step for bets in [−1/2, 1/2] (Cutkosky & Orabona 2018, arXiv 1802.06293)."""
_LARGEST_BET = 0.5
ORDER_ALPHA = 0.01
"""Share of exchangeable streams that are taken for streams in blocks."""
_ORDER_PERMUTATIONS = 999


def stream_scores(sample: DriftSample) -> Scores:
    """Returns `(N, 8)` float64: the seven properties and the largest probability of each image.

    Fixed functions of single images: a score that were fitted on the reference would make its ranks special.
    """
    confidence = sample.bbsd.max(axis=1, keepdims=True)
    return np.concatenate([sample.properties, confidence], axis=1).astype(np.float64)


class EProcess:
    """A gambler's wealth against "the stream comes from the distribution of the reference".

    Per score it bets on two departures: that the ranks lean to one side, and that they crowd at both ends (or in the
    middle). The wealth is the mean over all bets.

    Args:
        reference: `(n, k)` finite scores of held-out rows.
        seed: of the randomisation that makes ranks with ties uniform.

    Raises:
        InvalidSampleError: `reference` is no finite `(n, k)` matrix.
    """

    def __init__(self, reference: Scores, *, seed: int) -> None:
        self._scores = _checked(reference).shape[1]
        self._seen: list[list[float]] = [sorted(column.tolist()) for column in reference.T]
        self._rng = np.random.default_rng(seed)
        self._log_wealth = np.zeros(2 * self._scores)
        self._bets = np.zeros(2 * self._scores)
        self._curvature = np.ones(2 * self._scores)
        self.rows = 0
        """Images seen."""
        self.largest = 1.0
        """The largest wealth so far: this, not the present wealth, is compared with 1/alpha."""

    @property
    def wealth(self) -> float:
        """The present wealth: 1 at the start, at most 1 on average at any later time while nothing has changed."""
        top = float(self._log_wealth.max())
        # A wealth above e^700 has long raised every alarm; the cap only keeps it a finite number.
        return float(np.exp(min(top, 700.0)) * np.exp(self._log_wealth - top).mean())

    def update(self, scores: Scores) -> float:
        """Takes the next image's `(k,)` scores, and returns the wealth.

        Raises:
            InvalidSampleError: the scores are not k finite numbers.
        """
        row = _checked(scores.reshape(1, -1), columns=self._scores)[0]
        ranks = np.array([self._rank(seen, value) for seen, value in zip(self._seen, row.tolist(), strict=True)])
        lean = 2.0 * ranks - 1.0
        crowd = 6.0 * (ranks - 0.5) ** 2 - 0.5
        payoff = np.concatenate([lean, crowd])  # Mean 0 under the null, between −1 and 1.
        growth = 1.0 + self._bets * payoff
        self._log_wealth += np.log(growth)
        gradient = -payoff / growth
        self._curvature += gradient**2
        self._bets = np.clip(self._bets - _NEWTON_STEP * gradient / self._curvature, -_LARGEST_BET, _LARGEST_BET)
        self.rows += 1
        wealth = self.wealth
        self.largest = max(self.largest, wealth)
        return wealth

    def has_alarm(self, alpha: float) -> bool:
        """Says whether the wealth has ever reached 1/alpha."""
        return self.largest >= 1.0 / alpha

    def _rank(self, seen: list[float], value: float) -> float:
        """Returns the randomised rank of `value` among what was seen, in [0, 1], and remembers it."""
        below, not_above = bisect_left(seen, value), bisect_right(seen, value)
        rank = (below + self._rng.random() * (not_above - below + 1)) / (len(seen) + 1)
        insort(seen, value)
        return rank


def judge_stream(reference: DriftSample, current: DriftSample, *, alpha: float, seed: int) -> StreamVerdict:
    """Feeds the rows of `current`, in their order in time, to a fresh `EProcess`, and tests that order.

    Args:
        reference: held-out rows of the model that made `current`.
        current: the stream; the most probable class counts as the predicted one, for several labels too.
        alpha: of the sequential test.
        seed: of the ranks with ties, and of the permutations.
    """
    process = EProcess(stream_scores(reference), seed=seed)
    for row in stream_scores(current):
        process.update(row)
    p_value = order_p_value(current.bbsd.argmax(axis=1), seed=seed)
    state: StreamState = "alarm" if process.has_alarm(alpha) else "no alarm"
    if p_value <= ORDER_ALPHA:
        state = "not judged: requests come in blocks"
    return StreamVerdict(state=state, e_value=process.largest, alpha=alpha, order_p_value=p_value)


def order_p_value(classes: NDArray[np.intp], *, seed: int) -> float:
    """Tests whether the same class follows upon itself more often than in a random order.

    The runs test of Wald and Wolfowitz for several classes, one-sided, as a permutation test: the statistic is the
    number of neighbours of one class (the length of the stream less its number of runs), its null distribution that of
    the same classes shuffled. Exact at every level, for any number and any shares of classes; a stream of a single
    class has the p-value 1.

    Args:
        classes: `(N,)` integers, in order of time.
        seed: of the permutations.

    Returns:
        The p-value: a multiple of 1/1000.
    """

    def repeats(streams: NDArray[np.intp]) -> NDArray[np.intp]:
        return np.count_nonzero(streams[..., 1:] == streams[..., :-1], axis=-1)

    rng = np.random.default_rng(seed)
    observed = repeats(classes)
    # One at a time: all at once would be a thousand copies of a long stream.
    as_many = sum(int(repeats(rng.permutation(classes)) >= observed) for _ in range(_ORDER_PERMUTATIONS))
    return (1 + as_many) / (1 + _ORDER_PERMUTATIONS)


def _checked(scores: Scores, *, columns: int | None = None) -> Scores:
    shape_fits = scores.ndim == 2 and scores.shape[1] > 0 and columns in (None, scores.shape[1])
    if not shape_fits or not np.isfinite(scores).all():
        raise InvalidSampleError(
            f"Expected finite scores of shape (rows, {columns or 'k'}). Received: shape {scores.shape}"
            f"{', with values that are not finite' if shape_fits else ''}. Leave such rows out and report them."
        )
    return scores
