"""A small residual network for small images: better than `small_cnn` for its cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from cv_platform.training.architectures import Architecture, halvings

if TYPE_CHECKING:
    import keras

    from cv_platform.config import ModelConfig


class ResNet9s(Architecture):
    """Stem 24, stages 32/64/128, residual pairs at 64 and 128; 472k parameters for 10 classes.

    After D. Page's ResNet-9 ("How to train your ResNet"), narrower, and with strides in the place of max-pooling.
    """

    @override
    def feature_map(self, image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
        from keras import layers

        halved = halvings(model.image_size, most=5)
        stride_of = {"stem": 2 if halved >= 4 else 1}
        # Small inputs lose their strides from the front: early resolution carries the strokes of 16-pixel images.
        for order, stage in enumerate(("stage3", "stage2", "stage1")):
            stride_of[stage] = 2 if halved > order else 1

        x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling", dtype="float32")(image)
        x = _convolve(x, 24, "stem", stride_of["stem"])
        if halved >= 5:
            x = layers.MaxPooling2D(2, name="stem_pool")(x)
        x = _convolve(x, 32, "stage1", stride_of["stage1"])
        x = _convolve(x, 64, "stage2", stride_of["stage2"])
        x = _residual_pair(x, 64, "stage2_residual")
        x = _convolve(x, 128, "stage3", stride_of["stage3"])
        return _residual_pair(x, 128, "stage3_residual")


def _convolve(x: Any, filters: int, name: str, stride: int = 1) -> Any:
    from keras import layers

    kernel: dict[str, Any] = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal"}
    x = layers.Conv2D(filters, 3, strides=stride, name=f"{name}_conv", **kernel)(x)
    # Keras's momentum of 0.99 needs hundreds of steps; small datasets have a dozen steps an epoch.
    x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)
    return layers.Activation("relu", name=f"{name}_relu")(x)


def _residual_pair(x: Any, filters: int, name: str) -> Any:
    from keras import layers

    y = _convolve(_convolve(x, filters, f"{name}_a"), filters, f"{name}_b")
    return layers.Add(name=f"{name}_add")([x, y])
