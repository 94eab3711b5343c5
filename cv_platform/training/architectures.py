"""The networks that can be trained: `small_cnn`, `resnet9s` and `resnet50`.

All of them keep one contract, which drift detection, export and Grad-CAM build upon:

* input `image`: `(H, W, 3)` uint8, RGB; scaling is inside the model, by layers that load in Keras's safe mode (no
  Lambda);
* the last 4-D feature map feeds only global average pooling, dense layers, relu/linear, dropout and softmax/sigmoid, so
  that the gradient of a class at the map has a closed form (Selvaraju et al. 2017, "Grad-CAM", section 3);
* layer `features`: the penultimate vector; layer `probabilities`: the output, float32, softmax or sigmoid.

Recipes of training are in `trainer`, augmentation is not part of the model. Upstream:
https://keras.io/api/models/model/ and https://keras.io/api/applications/resnet/.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cv_platform.config import ModelConfig
from cv_platform.errors import TrainingError

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

INPUT_NAME = "image"
FEATURES_NAME = "features"
LOGITS_NAME = "logits"
OUTPUT_NAME = "probabilities"
MIN_MAP_PX = 4
"""Sides are halved while the last feature map keeps 4×4 cells: a heat-map of fewer shows nothing."""

Precision = Literal["float32", "bfloat16"]


def build_model(
    model: ModelConfig, *, weight_decay: float = 0.0, seed: int = 0, precision: Precision = "float32"
) -> keras.Model:
    """Builds the untrained network of `model` (or one that starts from `model.weights`).

    Sets Keras's global seeds to `seed`, so that the same arguments give the same weights.

    Args:
        model: architecture, input size, classes, dropout and starting weights.
        weight_decay: factor of the L2 penalty on convolution and dense kernels, as a part of the loss.
        seed: of the initial weights.
        precision: of the products inside; weights, head and output are float32 either way.

    Returns:
        An uncompiled model: `(N, H, W, 3)` uint8 to `(N, C)` float32 probabilities.

    Raises:
        TrainingError: the input is too small for the architecture, or the starting weights do not fit.
    """
    import keras

    # First: it may refuse, and a large network takes seconds to build.
    order = _channel_order(model) if model.weights else None
    keras.utils.set_random_seed(seed)
    with _dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32"):
        image: Any = keras.Input((*model.image_size, 3), dtype="uint8", name=INPUT_NAME)
        feature_map = _BACKBONES[model.architecture](image, model)
        network = keras.Model(image, _head(feature_map, model), name=model.architecture)
    if weight_decay:
        _penalise_kernels(network, weight_decay)
    if model.weights:
        _start_from(network, Path(model.weights), is_bgr=order == "bgr")
    return network


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"]) -> Precision:
    """Returns what `auto` means here: bfloat16 where the CPU multiplies it natively, else float32."""
    native = _has_bfloat16()
    if precision == "bfloat16" and not native:
        logger.warning(
            "train.precision is bfloat16, which this CPU only emulates: expect it to be slower than float32."
        )
    if precision == "auto":
        return "bfloat16" if native else "float32"
    return precision


def feature_map_layer(network: keras.Model) -> keras.Layer:
    """Returns the layer whose output is the last 4-D feature map."""
    return next(layer for layer in reversed(network.layers) if len(layer.output.shape) == 4)


def _small_cnn(image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
    """The original stack's network: convolution and max-pooling blocks."""
    from keras import layers

    halvings = _halvings(model.image_size, most=5)
    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling", dtype="float32")(image)
    # Larger images get more blocks; none is pooled behind the last one, whose map is what a heat-map shows.
    for block in range(max(3, halvings + 1)):
        filters = min(32 * 2**block, 128)
        x = layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"block{block}_conv")(x)
        if block < halvings:
            x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
    return x


def _resnet9s(image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
    """Stem 24, stages 32/64/128, residual pairs at 64 and 128; 472k parameters for 10 classes.

    After D. Page's ResNet-9 ("How to train your ResNet"), narrower, and with strides in the place of max-pooling.
    """
    from keras import layers

    def convolve(x: Any, filters: int, name: str, stride: int = 1) -> Any:
        x = layers.Conv2D(
            filters,
            3,
            strides=stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            name=f"{name}_conv",
        )(x)
        # Keras's momentum of 0.99 needs hundreds of steps; small datasets have a dozen steps an epoch.
        x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)
        return layers.Activation("relu", name=f"{name}_relu")(x)

    def residual_pair(x: Any, filters: int, name: str) -> Any:
        y = convolve(convolve(x, filters, f"{name}_a"), filters, f"{name}_b")
        return layers.Add(name=f"{name}_add")([x, y])

    halvings = _halvings(model.image_size, most=5)
    stride_of = {"stem": 2 if halvings >= 4 else 1}
    # Small inputs lose their strides from the front: early resolution carries the strokes of 16-pixel images.
    for order, stage in enumerate(("stage3", "stage2", "stage1")):
        stride_of[stage] = 2 if halvings > order else 1

    x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling", dtype="float32")(image)
    x = convolve(x, 24, "stem", stride_of["stem"])
    if halvings >= 5:
        x = layers.MaxPooling2D(2, name="stem_pool")(x)
    x = convolve(x, 32, "stage1", stride_of["stage1"])
    x = convolve(x, 64, "stage2", stride_of["stage2"])
    x = residual_pair(x, 64, "stage2_residual")
    x = convolve(x, 128, "stage3", stride_of["stage3"])
    return residual_pair(x, 128, "stage3_residual")


def _resnet50(image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
    """He et al. 2016 as in `keras.applications`."""
    import keras

    if min(model.image_size) <= 32:  # It divides sides by 32, rounding up: one cell would be left.
        raise TrainingError(
            "model.input_size: expected more than 32×32 for resnet50, better 224×224. "
            f"Received: {model.input_size.h}×{model.input_size.w}. "
            "Raise input_size, or take model.architecture: resnet9s."
        )
    # The published weights expect the ImageNet means taken off, in BGR; the means are given here in RGB.
    means: Any = (-123.68, -116.779, -103.939)
    x = keras.layers.Rescaling(1.0, offset=means, name="rescaling", dtype="float32")(image)
    applications: Any = keras.applications
    return applications.ResNet50(include_top=False, weights=None, input_tensor=x).output


_BACKBONES = {"small_cnn": _small_cnn, "resnet9s": _resnet9s, "resnet50": _resnet50}


def _head(feature_map: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
    """Feature map to probabilities, in float32 whatever the policy."""
    from keras import layers

    x = layers.GlobalAveragePooling2D(name="pooling", dtype="float32")(feature_map)
    if model.dropout:
        x = layers.Dropout(model.dropout, name="dropout", dtype="float32")(x)
    if model.architecture == "small_cnn":
        x = layers.Dense(64, activation="relu", name=FEATURES_NAME, dtype="float32")(x)
    else:
        x = layers.Activation("linear", name=FEATURES_NAME, dtype="float32")(x)
    x = layers.Dense(len(model.classes), name=LOGITS_NAME, dtype="float32")(x)
    activation = "softmax" if model.classifier_type == "multi-class" else "sigmoid"
    return layers.Activation(activation, name=OUTPUT_NAME, dtype="float32")(x)


def _halvings(image_size: tuple[int, int], *, most: int) -> int:
    """How often a side can be halved with at least `MIN_MAP_PX` cells left on the shorter one."""
    side, count = min(image_size), 0
    while count < most and side // 2 >= MIN_MAP_PX:
        side, count = side // 2, count + 1
    return count


def _penalise_kernels(network: keras.Model, weight_decay: float) -> None:
    """Puts the L2 penalty on each kernel; biases and normalisation stay free (Loshchilov & Hutter discuss why)."""
    import keras

    for layer in network.layers:
        if hasattr(layer, "kernel_regularizer"):
            layer.kernel_regularizer = keras.regularizers.L2(weight_decay)
            layer.kernel.regularizer = layer.kernel_regularizer  # `keras.applications` has no argument for it.


def _start_from(network: keras.Model, weights: Path, *, is_bgr: bool) -> None:
    """Loads `weights`; another set of classes is fine (its last layer stays random), another backbone is not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if weights.name.endswith(".h5") and not weights.name.endswith(".weights.h5"):
                # Keras's older format counts layers: what is published has no head.
                _backbone(network).load_weights(weights)
            else:
                network.load_weights(weights, skip_mismatch=True)
        except (ValueError, OSError, KeyError, zipfile.BadZipFile) as err:
            raise TrainingError(
                f"model.weights: expected weights of {network.name} (as .h5: without the top layer, …_notop.h5). "
                f"Received: {weights}: {err}"
            ) from err
    wrong = [str(w.message).splitlines()[0] for w in caught if "could not be loaded" in str(w.message)]
    strange = [line for line in wrong if f"name={LOGITS_NAME}" not in line]
    if strange:
        raise TrainingError(
            f"model.weights: expected weights of the same {network.name}. Received: {weights}, which does not fit: "
            f"{strange[0]} ({len(strange)} layers). Choose the architecture and input size that it was trained with."
        )
    if wrong:
        logger.info("%s has other classes: the layer %s starts from random weights.", weights, LOGITS_NAME)
    if is_bgr:
        # This model reads RGB: turning the first kernel round costs nothing at run time.
        kernel: Any = network.get_layer("conv1_conv").kernel
        kernel.assign(kernel.numpy()[:, :, ::-1])


def _channel_order(model: ModelConfig) -> Literal["rgb", "bgr"]:
    """Returns what the first convolution in `model.weights` reads: as declared, or as the file itself tells."""
    assert model.weights is not None
    weights, declared = Path(model.weights), model.weights_channel_order
    _require_file(weights)
    if model.architecture != "resnet50":
        if declared == "bgr":
            raise TrainingError(
                f"model.weights_channel_order: expected rgb, as all weights of {model.architecture} are this "
                "platform's. Received: bgr. Remove it; bgr is for resnet50 weights of keras.applications."
            )
        return "rgb"
    if declared != "auto":
        return declared
    if _is_own(weights):
        return "rgb"
    from keras.src.applications.resnet import WEIGHTS_HASHES

    with weights.open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() in WEIGHTS_HASHES["resnet50"]:
            return "bgr"
    raise TrainingError(
        "model.weights_channel_order: expected rgb or bgr, as nothing in the file says which of them its first "
        f"convolution reads. Received: auto, for {weights}. Choose bgr for weights that come from keras.applications "
        "(they read BGR, whatever they were saved as), rgb for weights of this platform's own."
    )


def _is_own(weights: Path) -> bool:
    """Whether the file is a model that this platform has saved: by the names of its layers."""
    if not zipfile.is_zipfile(weights):
        return False
    try:
        with zipfile.ZipFile(weights) as archive:
            layers = json.loads(archive.read("config.json"))["config"]["layers"]
        names = {layer["name"] for layer in layers}
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return False
    return {INPUT_NAME, "rescaling", FEATURES_NAME, LOGITS_NAME, OUTPUT_NAME} <= names


def _backbone(network: keras.Model) -> keras.Model:
    import keras

    return keras.Model(network.input, feature_map_layer(network).output)


def _require_file(weights: Path) -> None:
    if not weights.is_file():
        raise TrainingError(
            f"model.weights: expected a local weights file. Received: {weights}, which does not exist. "
            "Nothing is downloaded: put the file there, or remove model.weights to start from random weights."
        )


@contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Makes `name` the global policy meanwhile: `keras.applications` takes no policy of its own."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        flags = cpuinfo.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False  # Not Linux: no such file, and no such instructions that TensorFlow would use.
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
