"""Biases that take back, on average, what rounded weights add; graphs are made by hand, and none needs TensorFlow."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
import pytest

from cv_platform.deployment import quantization

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 4)).astype(np.uint8)


@pytest.fixture(autouse=True)
def whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    # Weights are rounded to 8 bits on each CPU.
    monkeypatch.setattr(quantization, "_adds_without_overflow", lambda: True)


def graph_of(convolutions: list[dict[str, Any]], constants: dict[str, np.ndarray]) -> Any:
    """Returns a model of 1 × 1 convolutions, one after another, over `images` uint8 `(N, 6, 6, 4)`."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["read_0"], perm=[0, 3, 1, 2]),
    ]
    for at, node in enumerate(convolutions):
        output = "probabilities" if at == len(convolutions) - 1 else f"read_{at + 1}"
        names = [f"read_{at}", *node["constants"]]
        nodes.append(helper.make_node("Conv", names, [output], name=f"conv_{at}", group=node.get("group", 1)))
    graph = helper.make_graph(
        nodes,
        "hand",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 6, 6, 4])],
        [helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def corrected(model: Any) -> dict[str, np.ndarray]:
    """Corrects the biases of all convolutions in place, and returns the model's constants by name."""
    names = [node.name for node in model.graph.node if node.op_type == "Conv"]
    means = quantization._channel_means(model, names, quantization._Calibration(IMAGES, ["images"]))
    quantization._correct_biases(model.graph, names, means)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def channel_means(model: Any) -> np.ndarray:
    session = cast(Any, onnxruntime).InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"images": IMAGES})[0].mean(axis=(0, 2, 3))


def test_a_bias_loses_what_rounding_adds_on_average():
    # The largest weight of an output channel is 127 steps: a step of 1, then of 0.5.
    weights = np.array([[127, 0.25, 1.75, 0], [63.5, 0.25, 0.125, -0.5]])[:, :, None, None]
    added = np.array([[0, -0.25, 0.25, 0], [0, -0.25, -0.125, 0]])  # Halves are rounded to even: 0.25 / 0.5 to 0.
    model = graph_of([{"constants": ["w", "b"]}], {"w": weights, "b": np.array([1.0, 2.0])})
    expected = np.array([1.0, 2.0]) - added @ IMAGES.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(corrected(model)["probabilities_corrected_bias"], expected, rtol=1e-5)


def test_a_convolution_without_a_bias_gets_one():
    weights = np.array([[127, 0.25, 0, 0]])[:, :, None, None]
    model = graph_of([{"constants": ["w"]}], {"w": weights})
    expected = 0.25 * IMAGES[..., 1].mean()
    np.testing.assert_allclose(corrected(model)["probabilities_corrected_bias"], [expected], rtol=1e-5)
    assert list(model.graph.node[-1].input) == ["read_0", "w", "probabilities_corrected_bias"]


def test_each_group_reads_its_own_channels():
    weights = np.array([[127, 0.25], [127, 0], [127, 0.25]])[:, :, None, None]
    depthwise = np.array([2.0, 3.0, 4.0, 0.0])[:, None, None, None]  # A weight alone is the largest: no error.
    model = graph_of(
        [{"constants": ["d"], "group": 4}, {"constants": ["w"], "group": 2}],
        {"d": depthwise, "w": np.concatenate([weights, weights[:1]])},
    )
    found = corrected(model)
    np.testing.assert_allclose(found["read_1_corrected_bias"], np.zeros(4), atol=1e-6)
    first, second = 0.25 * 3.0 * IMAGES[..., 1].mean(), 0.0  # The last channel is multiplied by 0.
    np.testing.assert_allclose(found["probabilities_corrected_bias"], [first, 0, second, second], rtol=1e-5)


def test_layers_that_share_a_bias_are_corrected_apart():
    weights = {"w": np.array([[127, 0.25, 0, 0]] * 4), "v": np.array([[0, 0, 0.25, 127]] * 4)}
    model = graph_of(
        [{"constants": ["w", "b"]}, {"constants": ["v", "b"]}],
        {"b": np.full(4, 5.0), **{name: value[:, :, None, None] for name, value in weights.items()}},
    )
    between = 127 * IMAGES[..., 0].mean() + 0.25 * IMAGES[..., 1].mean() + 5
    found = corrected(model)
    np.testing.assert_allclose(found["read_1_corrected_bias"], np.full(4, 5 + 0.25 * IMAGES[..., 1].mean()), rtol=1e-5)
    np.testing.assert_allclose(found["probabilities_corrected_bias"], np.full(4, 5 + 0.25 * between), rtol=1e-5)
    np.testing.assert_allclose(found["b"], np.full(4, 5.0))


def test_rounded_weights_with_corrected_biases_answer_as_before_on_average():
    rng = np.random.default_rng(1)
    model = graph_of(
        [{"constants": ["w", "b"], "group": 2}], {"w": rng.normal(size=(6, 2, 1, 1)), "b": rng.normal(size=6)}
    )
    before = channel_means(model)
    corrected(model)
    for tensor in model.graph.initializer:
        if tensor.name == "w":
            value = onnx.numpy_helper.to_array(tensor)
            step = np.abs(value).max(axis=1, keepdims=True) / 127
            tensor.CopyFrom(onnx.numpy_helper.from_array((np.rint(value / step) * step).astype(np.float32), "w"))
    np.testing.assert_allclose(channel_means(model), before, rtol=1e-4, atol=1e-3)
    model.graph.node[-1].input[2] = "b"
    assert np.abs(channel_means(model) - before).max() > 0.05  # What it would be without.


def test_the_graph_in_8_bits_has_no_constant_that_nothing_reads(tmp_path: Path):
    rng = np.random.default_rng(2)
    model = graph_of(
        [{"constants": ["w", "b"]}, {"constants": ["v"]}],
        {"w": rng.normal(size=(4, 4, 1, 1)), "b": rng.normal(size=4), "v": rng.normal(size=(3, 4, 1, 1))},
    )
    before = channel_means(model)
    onnx.save(model, tmp_path / "float.onnx")
    quantization.quantise(tmp_path / "float.onnx", tmp_path / "int8.onnx", IMAGES)
    made: Any = onnx.load(tmp_path / "int8.onnx")
    read = {name for node in made.graph.node for name in node.input}
    assert {tensor.name for tensor in made.graph.initializer} <= read
    assert "DequantizeLinear" in {node.op_type for node in made.graph.node}
    np.testing.assert_allclose(channel_means(made), before, atol=0.01 * np.abs(before).max())
