"""From a TensorFlow function to one ONNX graph of standard operators, which runs without TensorFlow.

https://github.com/onnx/tensorflow-onnx
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

OPSET = 17
"""Of ONNX: the newest that tf2onnx writes without reservations; ONNX Runtime reads it since 1.12."""


def to_onnx(function: Callable[..., dict[str, Any]], signature: Sequence[Any]) -> Any:
    """Returns the ONNX model of a function of tensors.

    Args:
        function: from tensors to named tensors.
        signature: a `tf.TensorSpec` with a name for each input.

    Raises:
        ValueError: something in it does not convert; one line.
    """
    import tensorflow as tf

    try:
        import onnx
        import tf2onnx

        model, _ = tf2onnx.convert.from_function(tf.function(function), list(signature), opset=OPSET)
        onnx.checker.check_model(model, full_check=True)
    # tf2onnx meets foreign layers with errors of many unrelated classes.
    except Exception as err:
        line = (str(err).strip() or type(err).__name__).splitlines()[0][:300]
        raise ValueError(f"Expected layers that convert to ONNX. Received: {line}") from err
    foreign = sorted({node.op_type for node in model.graph.node if node.domain not in {"", "ai.onnx"}})
    if foreign:
        raise ValueError(f"Expected standard ONNX operators. Received: {', '.join(foreign)}.")
    return model
