"""From an ONNX graph to one whose convolutions compute in 8 bits, by ONNX Runtime's static quantisation.

Weights have a scale for each channel, activations one that calibration images fix. In a graph that is served, what is
behind the feature map stays in 32 bits (head, Grad-CAM, what `is_unknown` reads: they cost next to nothing), and so
does the encoder of the drift detectors. Of a classifier alone only the last layer does. Biases take back what rounding
the weights adds to a channel on average: where many pixels are alike, as those of a blank background, it adds up.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from cv_platform.datasets.packing import PackedSplit
from cv_platform.errors import ExportError
from cv_platform.files import whole_file

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 256
_BATCH = 16
_DENSE = ("Gemm", "MatMul")
_QUANTISED = ("Conv", "Clip", "Relu", "Add", "MaxPool", *_DENSE)
"""Operators that have 8-bit forms, and those between them."""
_WHOLE_RANGE = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
"""Instructions that add products of 8 bits without overflow; a CPU that lacks them needs weights of 7 bits."""


def calibration_images(train: PackedSplit) -> np.ndarray:
    """Returns a seeded choice of training images, `(N, H, W, 3)` uint8."""
    rows = np.sort(np.random.default_rng(0).permutation(len(train.paths))[:CALIBRATION_IMAGES])
    return np.asarray(train.images[rows])


def quantise(source: Path, target: Path, images: np.ndarray) -> None:
    """Writes `source` with convolutions in 8 bits, complete or not at all.

    Args:
        source: ONNX file with the input `images` and the output `probabilities`; `class_index` may be a further input.
        target: the file.
        images: `(N, H, W, 3)` uint8; the activations' ranges are theirs.

    Raises:
        ExportError: ONNX Runtime does not quantise this graph.
    """
    import onnx
    from onnxruntime import quantization  # pyright: ignore[reportMissingTypeStubs]
    from onnxruntime.quantization.onnx_model import ONNXModel  # pyright: ignore[reportMissingTypeStubs]
    from onnxruntime.quantization.shape_inference import quant_pre_process  # pyright: ignore[reportMissingTypeStubs]

    tools: Any = quantization
    with tempfile.TemporaryDirectory(prefix="cv-quantise-") as temporary:
        prepared = Path(temporary, "prepared.onnx")
        try:
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            model: Any = onnx.load(str(prepared))
            inputs, body = [value.name for value in model.graph.input], _body(model.graph)
            means = _channel_means(model, body, _Calibration(images, inputs))
            _correct_biases(model.graph, body, means)
            # ONNX Runtime warns of tensors that nothing reads, as the biases before.
            ONNXModel(model).clean_initializers()
            onnx.save(model, str(prepared))
            with whole_file(target) as partial:
                tools.quantize_static(
                    str(prepared),
                    str(partial),
                    _Calibration(images, inputs),
                    quant_format=tools.QuantFormat.QDQ,
                    per_channel=True,
                    reduce_range=not _adds_without_overflow(),
                    activation_type=tools.QuantType.QUInt8,
                    weight_type=tools.QuantType.QInt8,
                    nodes_to_quantize=body,
                )
        # ONNX Runtime meets foreign graphs with errors of many unrelated classes.
        except Exception as err:
            line = (str(err).strip() or type(err).__name__).splitlines()[0][:300]
            raise ExportError(f"Expected a graph that ONNX Runtime quantises. Received: {line}") from err
    logger.info("Quantised: %.1f MB, before %.1f", target.stat().st_size / 1e6, source.stat().st_size / 1e6)


class _Calibration:
    """What ONNX Runtime draws calibration batches from."""

    def __init__(self, images: np.ndarray, inputs: list[str]) -> None:
        self._batches = self._feeds(images, inputs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the inputs of the next batch, or None after the last."""
        return next(self._batches, None)

    @staticmethod
    def _feeds(images: np.ndarray, inputs: list[str]) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            feed = {"images": batch, "class_index": np.full(len(batch), -1, dtype=np.int32)}
            yield {name: feed[name] for name in inputs}


def _body(graph: Any) -> list[str]:
    """Returns the names of what leads to the probabilities before the head; the drift detectors' encoder does not."""
    is_served = any(value.name == "class_index" for value in graph.input)
    dense = [node.name for node in graph.node if node.op_type in _DENSE]
    head, behind_head = set(dense if is_served else dense[-1:]), set[str]()
    for node in graph.node:  # Each after those that it reads.
        if node.name in head or not behind_head.isdisjoint(node.input):
            behind_head |= set(node.output)
    makers = {output: node for node in graph.node for output in node.output}
    todo, found = ["probabilities"], dict[str, Any]()
    while todo:
        node = makers.get(todo.pop())
        if node is not None and node.name not in found:
            found[node.name] = node
            todo += node.input
    body = [node for node in found.values() if behind_head.isdisjoint(node.output)]
    return [node.name for node in body if node.op_type in _QUANTISED]


def _convolutions(graph: Any, names: list[str]) -> list[Any]:
    """Returns the named convolutions of images whose weights are constants."""
    axes, wanted = {tensor.name: len(tensor.dims) for tensor in graph.initializer}, set(names)
    nodes = [node for node in graph.node if node.op_type == "Conv" and node.name in wanted]
    return [node for node in nodes if [axes.get(name) for name in node.input[1:]] in ([4], [4, 1])]


def _channel_means(model: Any, names: list[str], calibration: _Calibration) -> dict[str, np.ndarray]:
    """Returns the mean of each channel, `(C,)`, of what the named convolutions read, by the name of that tensor."""
    import onnx
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    helper, ort = onnx.helper, cast(Any, onnxruntime)
    read = sorted({node.input[0] for node in _convolutions(model.graph, names)})
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    # Averaged within the graph: what all layers read takes gigabytes for large images.
    for at, name in enumerate(read):
        watched.graph.node.append(helper.make_node("GlobalAveragePool", [name], [f"mean_{at}"]))
        watched.graph.output.append(helper.make_tensor_value_info(f"mean_{at}", onnx.TensorProto.FLOAT, None))
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[list[np.ndarray]] = [[] for _ in read]
    while (feed := calibration.get_next()) is not None and read:
        for rows, batch in zip(found, session.run([f"mean_{at}" for at in range(len(read))], feed), strict=True):
            rows.append(batch[:, :, 0, 0])
    return {name: np.concatenate(rows).mean(axis=0) for name, rows in zip(read, found, strict=True)}


def _correct_biases(graph: Any, names: list[str], means: dict[str, np.ndarray]) -> None:
    """Takes from biases what the rounded weights of the named convolutions add on average.

    Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, with the
    means of calibration images. The zeros around an image count as if they were more of it.
    """
    from onnx import numpy_helper

    tensors, most = {tensor.name: tensor for tensor in graph.initializer}, 127 if _adds_without_overflow() else 64
    for node in _convolutions(graph, names):
        weights: np.ndarray = numpy_helper.to_array(tensors[node.input[1]])
        outputs, inputs = weights.shape[:2]
        # As ONNX Runtime rounds: symmetric, by the largest weight of an output channel.
        step = np.abs(weights).reshape(outputs, -1).max(axis=1) / most
        step = np.where(step > 0, step, 1.0)[:, None, None, None]
        added = (np.rint(weights / step) * step - weights).sum(axis=(2, 3))
        groups = means[node.input[0]].reshape(-1, 1, inputs)
        shift = (added.reshape(len(groups), -1, inputs) * groups).sum(axis=2).ravel()
        bias = numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 else np.zeros(outputs)
        # A tensor of its own: several layers may share one.
        name = f"{node.output[0]}_corrected_bias"
        graph.initializer.append(numpy_helper.from_array((bias - shift).astype(np.float32), name))
        node.input[:] = [*node.input[:2], name]


def _adds_without_overflow(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        flags = cpuinfo.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not _WHOLE_RANGE.isdisjoint(flags)
