"""The verdict on a challenger: worked by hand, its false returns under continual looking, how few requests it needs."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import numpy as np
import pytest

from cv_platform.config import CanaryConfig
from cv_platform.probation import ArmTally, Probation, ShadowTally, Tally
from cv_platform.serving.model.evidence import log_capital, verdict


def probation(**terms: float) -> Probation:
    return Probation(
        probation_id="0123456789abcdef",
        model_name="tiny",
        version="v",
        since_utc=datetime(2026, 1, 1, tzinfo=UTC),
        **CanaryConfig.model_validate({"fraction": 0.1, **terms}).model_dump(),
    )


def test_capital_is_the_mean_over_stakes():
    stakes = np.geomspace(0.01, 0.99, 16)
    # Two wins of 10 and a loss of 1.25: stakes are shares of 1 / 1.25.
    expected = np.mean((1 + stakes / 1.25 * 10) ** 2 * (1 - stakes))
    assert log_capital([(10.0, 2), (-1.25, 1)]) == pytest.approx(math.log(expected), rel=1e-9)
    assert log_capital([(10.0, 0), (-1.25, 0)]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_a_challenger_that_always_fails_goes_back_after_a_few_requests(fraction: float):
    terms = probation(fraction=fraction)

    def after(failures: int) -> str | None:
        return verdict(terms, Tally(challenger=ArmTally(asked=failures, failed=failures)))

    needed = next(n for n in range(1, 100) if after(n))
    assert needed <= (5 if fraction < 0.5 else 15)
    assert after(1) is None
    assert after(needed) == "It fails more often than the champion"


def test_it_is_not_sent_back_for_what_the_champion_does_as_well():
    seen = ArmTally(asked=900, failed=45, unknown=90, timed=850, slow=85)
    its = ArmTally(asked=100, failed=5, unknown=18, timed=95, slow=9)
    assert verdict(probation(), Tally(champion=seen, challenger=its)) is None
    unknown = its.model_copy(update={"unknown": 60})
    assert "knows less" in (verdict(probation(), Tally(champion=seen, challenger=unknown)) or "")
    slow = its.model_copy(update={"slow": 80})
    assert "is slower than 2 times" in (verdict(probation(), Tally(champion=seen, challenger=slow)) or "")


def test_a_shadow_is_judged_by_pairs():
    alike = ShadowTally(asked=500, agreed=450, unknown_both=50, unknown_challenger=20, unknown_champion=15)
    assert verdict(probation(), Tally(champion=ArmTally(asked=500), shadow=alike)) is None
    worse = alike.model_copy(update={"unknown_challenger": 150})
    assert "knows less" in (verdict(probation(), Tally(shadow=worse)) or "")
    assert "fails" in (verdict(probation(), Tally(shadow=ShadowTally(asked=20, failed=20))) or "")


def test_looking_again_and_again_returns_no_more_good_challengers_than_alpha():
    """Null traffic at the very limits: fails alike, twice as many unknown, as slow as is allowed."""
    alpha, runs, looks = 0.1, 150, 20
    generator, terms = np.random.default_rng(7), probation(alpha=alpha, fraction=0.2)
    returned = 0
    for _ in range(runs):
        tally = Tally()
        for _ in range(looks):
            drawn = int(generator.binomial(20, terms.fraction))
            rates = {"failed": 0.05, "unknown": 0.1, "slow": 0.1}
            arms = [
                ArmTally(asked=n, timed=n, **{name: int(generator.binomial(n, rate)) for name, rate in each.items()})
                for n, each in ((20 - drawn, rates), (drawn, {**rates, "unknown": 0.2}))
            ]
            tally = tally + Tally(champion=arms[0], challenger=arms[1])
            if verdict(terms, tally):
                returned += 1
                break
    # Three standard deviations of a binomial around alpha.
    assert returned <= runs * alpha + 3 * math.sqrt(runs * alpha * (1 - alpha))
