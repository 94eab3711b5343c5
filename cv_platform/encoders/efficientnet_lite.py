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
            kernel, norm = tensors[f"{layer.name}.weight"], _norm(tensors, layer.norm)
            scale = norm.gamma / np.sqrt(norm.variance + _EPSILON)
            weight = constant(f"{layer.name}.weight", kernel * scale[:, None, None, None])
            bias = constant(f"{layer.name}.bias", norm.beta - norm.mean * scale)
            flow = node(
                "Conv",
                [flow, weight, bias],
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


def keras_model(tensors: Tensors, repeats: tuple[int, ...], image_size: tuple[int, int]) -> Any:
    """Returns a Keras model: `(N, height, width, 3)` RGB 0–255 to `(N, 1280)` float32, layers named as the tensors.

    Raises:
        EncoderError: a tensor is missing, or has another shape.
    """
    from keras import Model, layers

    image = layers.Input((*image_size, 3), name="images")
    flow = layers.Rescaling(1 / SCALE, offset=-MEAN / SCALE, name="scaled")(image)
    shortcut = flow
    weights: list[tuple[Any, list[NDArray[Any]]]] = []
    with _missing_tensors():
        for layer in _layers(repeats):
            shortcut = flow if layer.begins_block else shortcut
            kernel, norm = tensors[f"{layer.name}.weight"], _norm(tensors, layer.norm)
            options = {"strides": layer.stride, "padding": "same", "use_bias": False, "name": layer.name.lstrip("_")}
            if layer.is_depthwise:
                convolution = layers.DepthwiseConv2D(kernel.shape[2:], **options)
                weights.append((convolution, [kernel.transpose(2, 3, 0, 1)]))
            else:
                convolution = layers.Conv2D(len(kernel), kernel.shape[2:], **options)
                weights.append((convolution, [kernel.transpose(2, 3, 1, 0)]))
            normalisation = layers.BatchNormalization(epsilon=_EPSILON, name=layer.norm.lstrip("_"))
            weights.append((normalisation, [norm.gamma, norm.beta, norm.mean, norm.variance]))
            flow = normalisation(convolution(flow))
            if layer.is_activated:
                flow = layers.ReLU(6.0, name=f"{options['name']}.relu6")(flow)
            if layer.ends_residual:
                flow = layers.Add(name=f"{options['name']}.sum")([flow, shortcut])
        model = Model(image, layers.GlobalAveragePooling2D(name="features")(flow), name="efficientnet_lite")
        for layer, values in weights:
            layer.set_weights(values)
    return model


@contextmanager
def _missing_tensors() -> Generator[None]:
    try:
        yield
    except (KeyError, ValueError, IndexError) as err:
        raise EncoderError(f"Expected the weights of this EfficientNet-Lite. Received: others ({err}).") from err


@dataclass(frozen=True)
class _Norm:
    gamma: NDArray[Any]
    beta: NDArray[Any]
    mean: NDArray[Any]
    variance: NDArray[Any]


def _norm(tensors: Tensors, name: str) -> _Norm:
    return _Norm(*(tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")))


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
