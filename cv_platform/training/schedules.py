"""Learning rates over the steps of a training, and the optimizers that follow them.

Only schedules that Keras ships are used, so that a saved model needs no class of ours.
Upstream: https://keras.io/api/optimizers/learning_rate_schedules/cosine_decay/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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


def build_optimizer(
    train: TrainConfig, *, total_steps: int, rates: Mapping[str, float] | None = None
) -> keras.optimizers.Optimizer:
    """Returns Adam, AdamW, or SGD with Nesterov momentum 0.9, following `build_schedule`.

    Args:
        train: the recipe.
        total_steps: of the schedule.
        rates: factor of the learning rate, by the path of a variable; 1 for those that it lacks.
    """
    import keras

    schedule: Any = build_schedule(train, total_steps=total_steps)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "adam": (keras.optimizers.Adam, {}),
        "adamw": (keras.optimizers.AdamW, {"weight_decay": train.weight_decay}),
        "sgd": (keras.optimizers.SGD, {"momentum": 0.9, "nesterov": True}),
    }
    kind, options = kinds[train.optimizer]
    if train.ema_decay:
        options |= {"use_ema": True, "ema_momentum": train.ema_decay}

    # Keras has one rate for all variables.
    class Layerwise(kind):
        def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
            # TensorFlow's own variable; of several devices, the copy of one.
            path = re.sub(r"(/replica_\d+)?(:\d+)?$", "", variable.name)
            rate = (rates or {}).get(path, 1.0)
            super().update_step(gradient, variable, learning_rate * rate)

    optimizer = (Layerwise if rates else kind)(schedule, **options)
    if train.optimizer == "adamw":
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer
