"""What one image costs a model, in CPU time, which other work on the machine changes less than time by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Answer = Callable[[np.ndarray], np.ndarray]
"""From images `(N, H, W, 3)` uint8 to probabilities `(N, C)`."""
_ROUNDS, _CALLS = 5, 8


def milliseconds(answers: Sequence[Answer], images: np.ndarray) -> list[float]:
    """Returns the CPU milliseconds of one image for each, the median of rounds in which they take turns.

    A turn begins with a call that is not counted: it finds the caches full of what others have left.
    """
    for answer in answers:
        answer(images[:1])
    rounds: list[list[float]] = [[] for _ in answers]
    for index in range(_ROUNDS):
        turns = list(zip(rounds, answers, strict=True))
        for seconds, answer in reversed(turns) if index % 2 else turns:
            answer(images[:1])
            begun = time.process_time()
            for call in range(_CALLS):
                answer(images[call % len(images)][np.newaxis])
            seconds.append((time.process_time() - begun) / _CALLS)
    return [1000 * float(np.median(seconds)) for seconds in rounds]


def compiled(model: Any) -> Answer:
    """Returns a Keras model as a function without Keras's cost of a call."""
    import tensorflow as tf

    run: Any = tf.function(lambda images: model(images, training=False), reduce_retracing=True)
    return lambda images: np.asarray(run(tf.convert_to_tensor(images)))
