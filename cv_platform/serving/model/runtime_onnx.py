"""Runs an exported ONNX graph by ONNX Runtime: a few tens of megabytes and milliseconds where TensorFlow takes seconds.

The file is not trusted: ONNX Runtime refuses weights outside the model's folder, and operators that it does not bring
along itself; nothing registers further ones here. https://onnxruntime.ai/docs/api/python/api_summary.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cv_platform.errors import CorruptBundleError
from cv_platform.serving.model.runtime import Prediction
from cv_platform.settings import prepare_process

_INPUTS = {"images": ("tensor(uint8)", 4), "class_index": ("tensor(int32)", 1)}
_OUTPUTS = {
    "probabilities": ("tensor(float)", 2),
    "features": ("tensor(float)", 2),
    "uae": ("tensor(float)", 2),
    "cam": ("tensor(float)", 3),
}
_FATAL = 4


class OnnxRuntime:
    """One ONNX graph as a plain function on arrays; safe to call from many threads. Runs on a GPU where there is one.

    Args:
        path: the `.onnx` file.
        threads: of one call; None: one per core.

    Raises:
        CorruptBundleError: the file is no graph with the combined signature.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        # From 1.29 on it tells its maker which model runs, unless the process's environment says no.
        # https://github.com/microsoft/onnxruntime/blob/main/docs/Privacy.md
        prepare_process()
        # It has no types that a checker could follow.
        import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

        ort: Any = onnxruntime
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # Its errors are raised as well; on stderr they would be lines that no log format knows.
        options.log_severity_level = _FATAL
        # Every call is of one image, so what the arena keeps is what the next call needs; blocks that go back to the
        # system after each call (`memory.return_large_blocks`) cost a ResNet50 a tenth of its time.
        options.enable_cpu_mem_arena = True
        # Threads that spin while they wait take the core from the other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = ort.InferenceSession(str(path), options, providers=_providers(ort))
        # ONNX Runtime answers broken files with errors of many unrelated classes.
        except Exception as err:
            raise CorruptBundleError(
                f"{path}: expected an ONNX model. Received: {_first_line(err)}. Export the model again."
            ) from err
        _check_signature(self._session, path)

    def __call__(self, images: NDArray[np.uint8], class_index: NDArray[np.int32]) -> Prediction:
        """Answers `(N, H, W, 3)` uint8 RGB images, explaining the classes `(N,)` int32.

        Raises:
            ValueError: the model refuses the shapes.
        """
        try:
            answers = self._session.run(list(_OUTPUTS), {"images": images, "class_index": class_index})
        # Its error classes have no base of their own.
        except Exception as err:
            raise ValueError(f"Expected images that the model takes. Received: {_first_line(err)}") from err
        return Prediction(*answers)


def _providers(ort: Any) -> list[Any]:
    available = set(ort.get_available_providers())
    # TensorFloat-32 would round the answers by more than the self-test allows.
    wanted: list[tuple[str, dict[str, str]]] = [
        ("CUDAExecutionProvider", {"use_tf32": "0"}),
        ("CPUExecutionProvider", {}),
    ]
    return [(name, options) for name, options in wanted if name in available]


def _check_signature(session: Any, path: Path) -> None:
    received = [
        {value.name: (value.type, len(value.shape)) for value in values}
        for values in (session.get_inputs(), session.get_outputs())
    ]
    if received != [_INPUTS, _OUTPUTS]:
        raise CorruptBundleError(
            f"{path}: expected a model from {_INPUTS} to {_OUTPUTS}. "
            f"Received: from {received[0]} to {received[1]}. Export the model again."
        )


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0][:300]
