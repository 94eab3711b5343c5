"""He et al. 2016, "Deep Residual Learning for Image Recognition", as in `keras.applications`: for photos.

https://keras.io/api/applications/resnet/
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


class ResNet50(Architecture):
    """The published weights read BGR, with the ImageNet means taken off; those of this platform read RGB."""

    first_convolution = "conv1_conv"

    @override
    def feature_map(self, image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
        import keras

        if min(model.image_size) <= 32:  # It divides sides by 32, rounding up: one cell would be left.
            raise TrainingError(
                "model.input_size: expected more than 32×32 for resnet50, better 224×224. "
                f"Received: {model.input_size.h}×{model.input_size.w}. "
                "Raise input_size, or take model.architecture: resnet9s."
            )
        means: Any = (-123.68, -116.779, -103.939)  # In RGB.
        x = keras.layers.Rescaling(1.0, offset=means, name="rescaling", dtype="float32")(image)
        applications: Any = keras.applications
        return applications.ResNet50(include_top=False, weights=None, input_tensor=x).output

    @override
    def bgr_md5s(self) -> Collection[str]:
        from keras.src.applications.resnet import WEIGHTS_HASHES

        return WEIGHTS_HASHES["resnet50"]
