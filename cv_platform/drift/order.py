"""Whether requests come in blocks of a class: the tests of a verdict take them as independent.

Sources:
    Wald & Wolfowitz 1940, "On a test whether two samples are from the same population", Annals of Mathematical
    Statistics 11(2): the runs test. Barton & David 1957, "Multiple runs", Biometrika 44(1/2): of several classes.
    Phipson & Smyth 2010, "Permutation P-values Should Never Be Zero", SAGMB 9(1): a permutation test's exact level.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ORDER_ALPHA = 0.01
"""Share of windows in a random order that are taken for windows in blocks."""
_ORDER_PERMUTATIONS = 999


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
