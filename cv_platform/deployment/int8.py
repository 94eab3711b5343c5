"""The combined graph in 8 bits, for `deploy.runtime: onnx_int8`: made once, answering the reference data, then served.

Requests are compared with reference data, so the same graph has to answer both: what 8 bits change of probabilities and
features is then no difference between them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cv_platform.datasets.packing import PackedSplit
from cv_platform.deployment.export import load_keras
from cv_platform.deployment.onnx_export import write_onnx
from cv_platform.deployment.quantization import calibration_images, quantise
from cv_platform.records import DriftDetectors, TrainedModel
from cv_platform.serving.model.runtime import PREDICTED_CLASS
from cv_platform.serving.model.runtime_onnx import OnnxRuntime

INT8 = "onnx_int8"
"""As `deploy.runtime`."""


def write_int8(trained: TrainedModel, detectors: DriftDetectors, train: PackedSplit) -> None:
    """Writes `trained.int8_path`; classifier and Grad-CAM of the combined signature, and the detectors' encoder.

    Args:
        trained: the model.
        detectors: of the same model.
        train: its images calibrate.

    Raises:
        ExportError: a file is no model, the model does not convert, or ONNX Runtime does not quantise it.
    """
    with tempfile.TemporaryDirectory(prefix="cv-int8-") as temporary:
        graph = Path(temporary, "model.onnx")
        write_onnx(load_keras(trained.keras_path), load_keras(detectors.uae_path), graph)
        quantise(graph, trained.int8_path, calibration_images(train))


def open_int8(path: Path) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns the graph as a function from images `(N, H, W, 3)` uint8 to probabilities, features and embeddings.

    Raises:
        CorruptBundleError: the file is no graph with the combined signature.
    """
    runtime = OnnxRuntime(path)

    def answer(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        given = runtime(images, np.full(len(images), PREDICTED_CLASS, dtype=np.int32))
        return given.probabilities, given.features, given.uae

    return answer
