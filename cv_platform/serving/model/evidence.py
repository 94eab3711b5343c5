"""Whether a challenger on probation is worse than the champion, by few requests, looked at again and again.

Three questions, each by a test martingale that bets on it (Waudby-Smith and Ramdas 2024, "Estimating means of bounded
random variables by betting", https://arxiv.org/abs/2010.09686): does it fail more often, is it slower than
`max_slowdown` times the champion, are more than `max_unknown_ratio` times as many images unknown to it. With r the
ratio that is allowed and f the share of requests that are drawn for the challenger, a request of the challenger that
shows the event pays 1/f, one of the champion costs r/(1 - f): as the draw does not look at the image, this is no gain
on average for a challenger within the limit. Capital that has grown 3/alpha-fold is the verdict (Ville's inequality;
three questions), however often one looks. A shadow sees the champion's very images, so that pairs pay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from cv_platform.probation import Probation, Tally

_QUESTIONS = 3
_STAKES = np.geomspace(0.01, 0.99, 16)
"""Shares of the largest stake that cannot lose everything; their mean is the capital."""


_Bet = list[tuple[float, int]]
"""Gain for a stake of 1, and how often it came."""


def verdict(probation: Probation, tally: Tally) -> str | None:
    """Returns why the challenger is to be sent back, in a sentence; None while nothing speaks against it.

    Args:
        probation: with its limits.
        tally: of all workers.
    """
    needed = math.log(_QUESTIONS / probation.alpha)
    champion, challenger, shadow = tally.champion, tally.challenger, tally.shadow
    pairs = _pairs(probation, tally)
    asked: dict[str, tuple[_Bet, _Bet]] = {
        "fails more often than the champion": (
            _drawn(probation.fraction, challenger.failed, champion.failed, 1.0),
            [(1.0, shadow.failed), (-1.0, champion.failed if shadow.asked else 0)],
        ),
        f"is slower than {probation.max_slowdown:g} times the champion": (
            _drawn(probation.fraction, challenger.slow, champion.slow, 1.0),
            [],
        ),
        f"knows less: more than {probation.max_unknown_ratio:g} times as many images are unknown to it": (
            _drawn(probation.fraction, challenger.unknown, champion.unknown, probation.max_unknown_ratio),
            pairs,
        ),
    }
    for what, bets in asked.items():
        # Two bets on the same requests: their mean is fair whatever they share.
        played = [log_capital(bet) for bet in bets if any(count for _, count in bet)]
        if played and float(np.logaddexp.reduce(played)) - math.log(len(played)) >= needed:
            return f"It {what}"
    return None


def log_capital(bet: Iterable[tuple[float, int]]) -> float:
    """Returns the logarithm of what 1 has become, as the mean over stakes.

    Args:
        bet: gain for a stake of 1, and how often it came; at least one gain below 0, whether it came or not.
    """
    outcomes = list(bet)
    largest = 1.0 / -min(gain for gain, _ in outcomes)
    logs = sum((count * np.log1p(_STAKES * largest * gain) for gain, count in outcomes), np.zeros(len(_STAKES)))
    return float(np.logaddexp.reduce(logs)) - math.log(len(_STAKES))


def _drawn(fraction: float, of_challenger: int, of_champion: int, ratio: float) -> _Bet:
    if not fraction:
        return []
    return [(1 / fraction, of_challenger), (-ratio / (1 - fraction), of_champion)]


def _pairs(probation: Probation, tally: Tally) -> _Bet:
    ratio, shadow = probation.max_unknown_ratio, tally.shadow
    return [
        (1.0, shadow.unknown_challenger),
        (1.0 - ratio, shadow.unknown_both),
        (-ratio, shadow.unknown_champion),
    ]
