"""Builds a network of one of the `architectures`, with its head, its penalties and its starting weights.

All networks keep one contract, which drift detection, export and Grad-CAM build upon:

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

import numpy as np

from cv_platform.config import ModelConfig
from cv_platform.errors import TrainingError
from cv_platform.training.architectures import Architecture, find_architecture
from cv_platform.training.devices import gpus_have_bfloat16

if TYPE_CHECKING:
    import keras

logger = logging.getLogger(__name__)

INPUT_NAME = "image"
FEATURES_NAME = "features"
LOGITS_NAME = "logits"
OUTPUT_NAME = "probabilities"

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
    architecture = find_architecture(model.architecture)
    order = _channel_order(architecture, model) if model.weights else None
    keras.utils.set_random_seed(seed)
    with _dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32"):
        image: Any = keras.Input((*model.image_size, 3), dtype="uint8", name=INPUT_NAME)
        network = keras.Model(image, _head(architecture, image, model), name=_name(model.architecture))
    if weight_decay:
        _penalise_kernels(network, weight_decay)
    if model.weights:
        _start_from(network, Path(model.weights), bgr_layer=architecture.first_convolution if order == "bgr" else None)
    return network


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"]) -> Precision:
    """Returns what `auto` means here: bfloat16 where the GPUs, or else the CPU, multiply it natively, else float32."""
    if precision == "float32":
        return precision
    by_gpus = gpus_have_bfloat16()
    native = _has_bfloat16() if by_gpus is None else by_gpus
    if precision == "bfloat16" and not native:
        logger.warning(
            "train.precision is bfloat16, which this %s only emulates: expect it to be slower than float32.",
            "CPU" if by_gpus is None else "machine's GPU",
        )
    if precision == "auto":
        return "bfloat16" if native else "float32"
    return precision


def feature_map_layer(network: keras.Model) -> keras.Layer:
    """Returns the layer whose output is the last 4-D feature map."""
    return next(layer for layer in reversed(network.layers) if len(layer.output.shape) == 4)


def _name(architecture: str) -> str:
    """Returns what a network may be called: Keras takes no colon."""
    return architecture.replace(":", ".")


def _head(architecture: Architecture, image: keras.KerasTensor, model: ModelConfig) -> keras.KerasTensor:
    """Image to probabilities; what follows the feature map is float32 whatever the policy."""
    from keras import layers

    x = architecture.feature_map(image, model)
    x = layers.GlobalAveragePooling2D(name="pooling", dtype="float32")(x)
    if model.dropout:
        x = layers.Dropout(model.dropout, name="dropout", dtype="float32")(x)
    x = architecture.features(x, FEATURES_NAME)
    x = layers.Dense(len(model.classes), name=LOGITS_NAME, dtype="float32")(x)
    activation = "softmax" if model.classifier_type == "multi-class" else "sigmoid"
    return layers.Activation(activation, name=OUTPUT_NAME, dtype="float32")(x)


def _penalise_kernels(network: keras.Model, weight_decay: float) -> None:
    """Puts the L2 penalty on each kernel; biases and normalisation stay free (Loshchilov & Hutter discuss why)."""
    import keras

    for layer in network.layers:
        if hasattr(layer, "kernel_regularizer"):
            layer.kernel_regularizer = keras.regularizers.L2(weight_decay)
            layer.kernel.regularizer = layer.kernel_regularizer  # `keras.applications` has no argument for it.


def _start_from(network: keras.Model, weights: Path, *, bgr_layer: str | None) -> None:
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
    broken = [weight.path for weight in network.weights if not np.isfinite(weight.numpy()).all()]
    if broken:
        raise TrainingError(
            f"model.weights: expected numbers. Received: {weights}, which has NaN or infinity in {broken[0]} "
            f"({len(broken)} of {len(network.weights)} arrays). Take weights from before that training diverged."
        )
    if wrong:
        logger.info("%s has other classes: the layer %s starts from random weights.", weights, LOGITS_NAME)
    if bgr_layer:
        # This model reads RGB: turning the first kernel round costs nothing at run time.
        kernel: Any = network.get_layer(bgr_layer).kernel
        kernel.assign(kernel.numpy()[:, :, ::-1])


def _channel_order(architecture: Architecture, model: ModelConfig) -> Literal["rgb", "bgr"]:
    """Returns what the first convolution in `model.weights` reads: as declared, or as the file itself tells."""
    assert model.weights is not None
    weights, declared = Path(model.weights), model.weights_channel_order
    _require_file(weights)
    if architecture.first_convolution is None:
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
    with weights.open("rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() in architecture.bgr_md5s():
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
