"""Where a training computes: on the CPU, on a GPU, or on several that each take a part of every batch.

Several work by `tf.distribute.MirroredStrategy` (https://www.tensorflow.org/guide/distributed_training): each has the
network, and their gradients are added, so that a step is that of one device with the whole batch, but for the order of
additions. What Keras 3 cannot do there is refused before anything is trained, see `train.devices`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from cv_platform.config import TrainConfig
from cv_platform.errors import TrainingError

logger = logging.getLogger(__name__)

_AMPERE = (8, 0)
"""Compute capability of the first NVIDIA GPUs that multiply bfloat16 natively."""


def let_memory_grow() -> None:
    """Lets TensorFlow take a GPU's memory as it needs it, and not all at once: a service may share the GPU."""
    import tensorflow as tf

    try:
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
    except RuntimeError:
        logger.debug("TensorFlow runs already in this process: its devices stay as they are.")


def gpus_have_bfloat16() -> bool | None:
    """Returns whether all GPUs multiply bfloat16 natively; None: there is no GPU."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return None
    found = [tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) for gpu in gpus]
    return all(tuple(capability) >= _AMPERE for capability in found)


def devices_of(train: TrainConfig) -> tuple[str, ...]:
    """Returns the names of the devices that share each batch, none where one computes alone; see `let_memory_grow`."""
    import tensorflow as tf

    let_memory_grow()
    if train.devices == "one":
        return ()
    kinds = (tf.config.list_logical_devices(kind) for kind in ("GPU", "CPU"))
    names = tuple(device.name for device in next(filter(None, kinds), ()))
    return names if len(names) > 1 else ()


def require_equal_parts(names: Sequence[str], *, batch_size: int, valid_images: int) -> None:
    """Checks that each device gets as many images: Keras 3 adds up what they got.

    Raises:
        TrainingError: it would not.
    """
    if names and (batch_size % len(names) or valid_images < len(names)):
        raise TrainingError(
            f"Expected batches that the {len(names)} devices divide, and a validation image for each. Received: "
            f"batches of {batch_size}, {valid_images} validation images. Change train.batch_size, or take "
            "train.devices: one."
        )


def sharing(names: Sequence[str]) -> Callable[[], AbstractContextManager[Any]]:
    """Returns the context in which a network is built and compiled, so that its `fit` runs on all of these devices."""
    if not names:
        return nullcontext
    import tensorflow as tf

    # With TensorFlow's default, the collective reduction, a process that trains a second network fails (2.21: "Shape
    # mismatch in the collective instance").
    return tf.distribute.MirroredStrategy(list(names), cross_device_ops=tf.distribute.ReductionToOneDevice()).scope
