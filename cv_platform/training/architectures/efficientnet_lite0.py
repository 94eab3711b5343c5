"""EfficientNet-Lite0 with what it has learned from ImageNet: the network for photographs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from cv_platform.encoders.efficientnet_lite import keras_feature_map, stage_of
from cv_platform.encoders.encoder import PRETRAINED, pretrained_weights
from cv_platform.encoders.torch_file import read_state_dict
from cv_platform.errors import EncoderError, TrainingError
from cv_platform.training.architectures import Architecture

if TYPE_CHECKING:
    import keras

    from cv_platform.config import ModelConfig

_REPEATS = PRETRAINED["lite0"].repeats


class EfficientNetLite0(Architecture):
    """The network of the encoder `lite0`, 3.4 million parameters, without its batch normalisation."""

    @override
    def feature_map(self, image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
        if min(model.image_size) < 32:  # It divides sides by 32, rounding up.
            raise TrainingError(
                "model.input_size: expected at least 32×32 for efficientnet_lite0, better 128×128 to 224×224. "
                f"Received: {model.input_size.h}×{model.input_size.w}. "
                "Raise input_size, or take model.architecture: resnet9s."
            )
        try:
            return keras_feature_map(image, read_state_dict(pretrained_weights("lite0")), _REPEATS)
        except EncoderError as err:
            raise TrainingError(f"model.architecture: efficientnet_lite0: {err}") from err

    @override
    def stage_of(self, layer: str) -> int | None:
        return stage_of(layer, _REPEATS)
