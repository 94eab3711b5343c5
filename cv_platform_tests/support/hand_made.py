"""A real ONNX bundle that is written by hand in milliseconds, for tests that need one and not what training makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cv_platform_tests.support.tiny_models import MODEL_NAME, TinyExport, tiny_images


def hand_made_export(directory: Path, *, seed: int = 3) -> TinyExport:
    """Writes a model whose probabilities are the softmax of an image's mean colours, with its golden images."""
    directory.mkdir(parents=True)
    onnx.save(_model(seed), str(directory / "model.onnx"))
    images = tiny_images(4, seed=9)
    np.savez(directory / "golden.npz", images=images, tolerance=[1e-4, 1e-3], **_answers(images, directory))
    unused = directory / f"{MODEL_NAME}.keras"
    return TinyExport(directory, unused, unused, images, "onnx")


def _answers(images: np.ndarray, directory: Path) -> dict[str, Any]:
    from cv_platform.serving.model.runtime_onnx import OnnxRuntime

    class_index = np.full(len(images), -1, np.int32)
    answer = OnnxRuntime(directory / "model.onnx", threads=1)(images, class_index)
    names = ("probabilities", "features", "uae", "cam")
    return {"class_index": class_index, **{name: getattr(answer, name) for name in names}}


def _model(seed: int) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    constants = {
        "scale": np.array(0.02 * seed / 3, np.float32),
        "whole": np.array(1 / 255, np.float32),
        "to_features": rng.normal(size=(3, 5)).astype(np.float32),
        "to_uae": rng.normal(size=(3, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["means", "scale"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("MatMul", ["probabilities", "to_features"], ["features"]),
        helper.make_node("MatMul", ["probabilities", "to_uae"], ["uae"]),
        helper.make_node("ReduceMean", ["pixels"], ["grey"], axes=[3], keepdims=0),
        helper.make_node("Mul", ["grey", "whole"], ["cam"]),
    ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 16, 16, 3]),
        helper.make_tensor_value_info("class_index", TensorProto.INT32, ["n"]),
    ]
    shapes = {"probabilities": ["n", 3], "features": ["n", 5], "uae": ["n", 4], "cam": ["n", 16, 16]}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "hand_made", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
