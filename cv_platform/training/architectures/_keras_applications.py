"""Any network of `keras.applications` by its name there, from random weights or a local file: nothing is downloaded.

https://keras.io/api/applications/
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from cv_platform.errors import TrainingError
from cv_platform.training.architectures import Architecture

if TYPE_CHECKING:
    import keras

    from cv_platform.config import ModelConfig

_IMAGENET_MEAN_RGB = (123.68, 116.779, 103.939)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_SCALES_ITSELF = ("efficientnet", "efficientnet_v2", "mobilenet_v3")
_FIRST_CONVOLUTIONS = {"resnet": "conv1_conv", "vgg16": "block1_conv1", "vgg19": "block1_conv1"}
"""By module: of those whose published weights read BGR."""


class KerasApplication(Architecture):
    """One of them, with the scaling that its published weights expect."""

    def __init__(self, name: str) -> None:
        import keras

        self.name = name
        applications: Any = keras.applications
        self._build: Any = getattr(applications, name)
        self._family: str = self._build.__module__.rpartition(".")[2]
        self.first_convolution = _FIRST_CONVOLUTIONS.get(self._family)

    @override
    def feature_map(self, image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
        try:
            return self._build(include_top=False, weights=None, input_tensor=self._scaled(image)).output
        except ValueError as err:
            raise TrainingError(
                f"model.input_size: expected one that {self.name} takes. Received: {model.input_size.h}×"
                f"{model.input_size.w}: {err}. Raise input_size, or take model.architecture: resnet9s."
            ) from err

    @override
    def bgr_md5s(self) -> Collection[str]:
        if self._family != "resnet":
            return ()
        from keras.src.applications.resnet import WEIGHTS_HASHES

        return WEIGHTS_HASHES[self.name.lower()]

    def _scaled(self, image: keras.KerasTensor) -> Any:
        import keras

        scale: Any = 1 / 127.5
        offset: Any = -1.0
        if self._family in _SCALES_ITSELF:
            scale, offset = 1.0, 0.0
        elif self._family in _FIRST_CONVOLUTIONS:
            scale, offset = 1.0, tuple(-mean for mean in _IMAGENET_MEAN_RGB)
        elif self._family == "densenet":
            scale = tuple(1 / 255 / std for std in _IMAGENET_STD)
            offset = tuple(-mean / 255 / std for mean, std in zip(_IMAGENET_MEAN_RGB, _IMAGENET_STD, strict=True))
        # Not `rescaling`, which some of these networks call a layer of their own.
        return keras.layers.Rescaling(scale, offset=offset, name="image_scaling", dtype="float32")(image)
