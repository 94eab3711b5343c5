"""Models that name an image's brightest channel: what they answer is known without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cv_platform_tests.support.tiny_training import CLASSES

MODEL = "tiny_model"


def save_model(path: Path, side: int, blind_to: str | None = None, class_names: Sequence[str] = CLASSES) -> Path:
    """Saves a model that names an image's brightest channel, and never names `blind_to`; returns its folder."""
    import keras

    inputs = keras.Input((side, side, 3), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    conv: Any = keras.layers.Conv2D(3, 1, activation="relu")
    x = keras.layers.GlobalAveragePooling2D()(conv(x))
    features: Any = keras.layers.Dense(3, name="features")
    head: Any = keras.layers.Dense(len(class_names), activation="softmax", name="probabilities")
    model = keras.Model(inputs, head(features(x)))
    kernel = np.zeros((3, len(class_names)), np.float32)
    bias = np.zeros(len(class_names), np.float32)
    for index, name in enumerate(class_names):
        kernel[{"red": 0, "green": 1, "blue": 2}.get(name, 0), index] = 20.0
        bias[index] = -100.0 if name == blind_to else 0.0
    conv.set_weights([np.eye(3, dtype=np.float32)[None, None], np.zeros(3, np.float32)])
    features.set_weights([np.eye(3, dtype=np.float32), np.zeros(3, np.float32)])
    head.set_weights([kernel, bias])
    path.mkdir(parents=True)
    model.save(path / f"{MODEL}.keras")
    return path


def save_encoder(path: Path, side: int = 8) -> Path:
    """Saves an encoder with four dimensions."""
    import keras

    inputs = keras.Input((side, side, 3), dtype="uint8", name="image")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(inputs))
    keras.Model(inputs, keras.layers.Dense(4)(x)).save(path)
    return path
