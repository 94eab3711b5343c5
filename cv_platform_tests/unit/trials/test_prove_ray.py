"""What the proof compares of a bundle's graph; `make prove-ray` is the proof."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trials.prove_ray import graph_sha256


def exported(path: Path, *, prefix: str = "a", operation: str = "Add", weight: float = 2.0) -> str:
    names = [f"{prefix}_{at}" for at in range(2)]
    weights = [numpy_helper.from_array(np.full(3, weight + at, np.float32), name) for at, name in enumerate(names)]
    nodes = [helper.make_node(operation, ["x", names[0]], ["y"]), helper.make_node("Mul", ["y", names[1]], ["z"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, prefix, ends[:1], ends[1:], weights[::-1] if prefix == "b" else weights)
    onnx.save(helper.make_model(graph), path)
    return graph_sha256(path)


def test_names_and_order_of_a_graph_do_not_matter(tmp_path: Path) -> None:
    assert exported(tmp_path / "one.onnx") == exported(tmp_path / "two.onnx", prefix="b")


NEXT = float(np.nextafter(np.float32(2), np.float32(3)))


@pytest.mark.parametrize("change", [{"operation": "Sub"}, {"weight": NEXT}])
def test_an_operation_and_the_last_bit_of_a_weight_matter(tmp_path: Path, change: dict[str, object]) -> None:
    assert exported(tmp_path / "one.onnx") != exported(tmp_path / "two.onnx", **change)  # pyright: ignore[reportArgumentType]
