"""The architectures that can be trained, a module each: the part of a network before its head."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

    from cv_platform.config import ModelConfig

MIN_MAP_PX = 4
"""Sides are halved while the last feature map keeps 4×4 cells: a heat-map of fewer shows nothing."""


class Architecture(ABC):
    """An architecture that `model.architecture` can name.

    How to add one: a module `<name>.py` in this folder with one subclass. The module's name is the architecture's: the
    config and `build_model` find it there, and `test_every_network_keeps_the_contract` builds it.

    Attributes:
        first_convolution: name of the layer that reads the colours, where weights for BGR are published; else None.
    """

    first_convolution: str | None = None

    @abstractmethod
    def feature_map(self, image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
        """Returns the last 4-D feature map; what follows it is `network`'s part.

        Args:
            image: `(N, H, W, 3)` uint8, RGB: scaling belongs here, by a layer that loads in Keras's safe mode.
            model: its sizes.

        Raises:
            TrainingError: the input is too small.
        """

    def features(self, pooled: keras.KerasTensor, name: str) -> keras.KerasTensor:
        """Returns the penultimate vector, from the layer `name`; by default the pooled feature map itself."""
        from keras import layers

        return layers.Activation("linear", name=name, dtype="float32")(pooled)

    def stage_of(self, layer: str) -> int | None:
        """Returns the stage of a layer, from 0 at the image, by its name; None: it belongs to the head, or to none.

        `train.transfer` freezes stages, and slows the learning of the early ones.
        """
        return None

    def bgr_md5s(self) -> Collection[str]:
        """Returns the md5 of published weights files that read BGR."""
        return ()


def find_architecture(name: str) -> Architecture:
    """Returns the architecture that `model.architecture` names; the config has seen to it that its form is right.

    Raises:
        TrainingError: it is a function of the user's that cannot be imported.
    """
    if ":" in name:
        from cv_platform.training.architectures._users import UsersArchitecture

        return UsersArchitecture(name)
    if name[0].isupper():
        from cv_platform.training.architectures._keras_applications import KerasApplication

        return KerasApplication(name)
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = (kind for kind in Architecture.__subclasses__() if kind.__module__ == module.__name__)
    return found()


def halvings(image_size: tuple[int, int], *, most: int) -> int:
    """Returns how often a side can be halved with at least `MIN_MAP_PX` cells left on the shorter one."""
    side, count = min(image_size), 0
    while count < most and side // 2 >= MIN_MAP_PX:
        side, count = side // 2, count + 1
    return count
