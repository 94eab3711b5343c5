"""The original stack's network: convolution and max-pooling blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from cv_platform.training.architectures import Architecture, halvings

if TYPE_CHECKING:
    import keras

    from cv_platform.config import ModelConfig


class SmallCnn(Architecture):
    """Larger images get more blocks; none is pooled behind the last one, whose map is what a heat-map shows."""

    @override
    def feature_map(self, image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
        from keras import layers

        halved = halvings(model.image_size, most=5)
        x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling", dtype="float32")(image)
        for block in range(max(3, halved + 1)):
            filters = min(32 * 2**block, 128)
            x = layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"block{block}_conv")(x)
            if block < halved:
                x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
        return x

    @override
    def features(self, pooled: keras.KerasTensor, name: str) -> keras.KerasTensor:
        from keras import layers

        return layers.Dense(64, activation="relu", name=name, dtype="float32")(pooled)
