"""Learning rates, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from cv_platform.config import TrainConfig
from cv_platform.training.schedules import build_optimizer, build_schedule


def rates(train: TrainConfig, *, total_steps: int) -> Callable[[int], float]:
    schedule: Any = build_schedule(train, total_steps=total_steps)
    return lambda step: float(schedule(step))


def test_constant_is_a_number() -> None:
    assert build_schedule(TrainConfig(schedule="constant", init_lr=0.02), total_steps=100) == 0.02


def test_cosine_falls_from_the_peak_through_half_to_zero() -> None:
    schedule = rates(TrainConfig(schedule="cosine", init_lr=0.4), total_steps=100)

    assert [schedule(step) for step in (0, 50, 100)] == pytest.approx([0.4, 0.2, 0.0], abs=1e-6)
    assert schedule(25) == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)) / 2, abs=1e-6)


def test_one_cycle_warms_up_from_a_25th_and_then_falls_to_zero() -> None:
    schedule = rates(TrainConfig(schedule="one_cycle", init_lr=0.5, warmup_fraction=0.2), total_steps=100)

    assert [schedule(step) for step in (0, 10, 20, 60, 100)] == pytest.approx([0.02, 0.26, 0.5, 0.25, 0.0], abs=1e-6)


def test_one_cycle_without_warm_up_is_a_cosine() -> None:
    schedule = rates(TrainConfig(schedule="one_cycle", init_lr=0.5, warmup_fraction=0.0), total_steps=10)

    assert [schedule(step) for step in (0, 5, 10)] == pytest.approx([0.5, 0.25, 0.0], abs=1e-6)


def test_sgd_has_nesterov_momentum() -> None:
    optimizer = build_optimizer(TrainConfig(optimizer="sgd", schedule="constant", init_lr=0.1), total_steps=1)

    assert (type(optimizer).__name__, optimizer.momentum, optimizer.nesterov) == ("SGD", 0.9, True)
    assert type(build_optimizer(TrainConfig(optimizer="adam"), total_steps=1)).__name__ == "Adam"
