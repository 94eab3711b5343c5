"""Learning rates over the steps of a training, and the optimizers that follow them.

Only schedules that Keras ships are used, so that a saved model needs no class of ours.
Upstream: https://keras.io/api/optimizers/learning_rate_schedules/cosine_decay/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cv_platform.config import TrainConfig

if TYPE_CHECKING:
    import keras

ONE_CYCLE_START_FRACTION = 1 / 25
"""one_cycle starts at this share of the peak (Smith & Topin 2018, "Super-Convergence")."""


def build_schedule(train: TrainConfig, *, total_steps: int) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Returns the learning rate as a function of the step, peaking at `train.init_lr`.

    constant: the same throughout. cosine: from the peak to 0 along half a cosine. one_cycle: linear warm-up from 1/25
    of the peak during `train.warmup_fraction` of the steps, then the cosine.
    """
    import keras

    if train.schedule == "constant":
        return train.init_lr
    warmup_steps = round(train.warmup_fraction * total_steps) if train.schedule == "one_cycle" else 0
    if warmup_steps == 0:
        return keras.optimizers.schedules.CosineDecay(train.init_lr, max(1, total_steps))
    return keras.optimizers.schedules.CosineDecay(
        train.init_lr * ONE_CYCLE_START_FRACTION,
        max(1, total_steps - warmup_steps),
        warmup_target=train.init_lr,
        warmup_steps=warmup_steps,
    )


def build_optimizer(train: TrainConfig, *, total_steps: int) -> keras.optimizers.Optimizer:
    """Returns Adam, or SGD with Nesterov momentum 0.9, following `build_schedule`."""
    import keras

    schedule: Any = build_schedule(train, total_steps=total_steps)
    if train.optimizer == "adam":
        return keras.optimizers.Adam(schedule)
    return keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True)
