"""The combined graph in 8 bits, for `deploy.runtime: onnx_int8`: made once, answering the reference data, then served.

Requests are compared with reference data, so the same graph has to answer both: what 8 bits change of probabilities and
features is then no difference between them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cv_platform.config import DeployConfig, Threshold
from cv_platform.datasets.packing import PackedSplit
from cv_platform.deployment.exports import beside, measure
from cv_platform.deployment.onnx_export import write_onnx
from cv_platform.deployment.quantization import calibration_images, quantise
from cv_platform.drift.extraction import load_model
from cv_platform.errors import ExportError
from cv_platform.files import file_sha256
from cv_platform.records import DriftDetectors, Export, ReferenceData, TrainedModel
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
        ExportError: the model does not convert, or ONNX Runtime does not quantise it.
        InvalidModelError: a file is no model.
    """
    with tempfile.TemporaryDirectory(prefix="cv-int8-") as temporary:
        graph = Path(temporary, "model.onnx")
        write_onnx(load_model(trained.keras_path), load_model(detectors.uae_path), graph)
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


def measure_int8(
    trained: TrainedModel, reference: ReferenceData, deploy: DeployConfig, *, test: PackedSplit, threshold: Threshold
) -> Export:
    """Returns what the graph reaches on the test split, beside the model.

    Args:
        trained: the model, whose `int8_path` it is.
        reference: what the graph has answered.
        deploy: `max_export_loss`.
        test: what it is measured on.
        threshold: of multi-label decisions.

    Raises:
        ExportError: the graph is not there, another one has answered the reference data, or it loses too much.
        CorruptBundleError: the file is no graph with the combined signature.
    """
    path = trained.int8_path
    if not path.is_file() or file_sha256(path) != reference.int8_sha256:
        raise ExportError(
            f"Expected reference data that {path.name} has answered, as deploy.runtime is {INT8}. Received: "
            f"{'those of another graph' if path.is_file() else 'no such graph'}. Materialise reference_data again."
        )
    answer = open_int8(path)
    export = measure(
        f"{INT8}, served",
        lambda images: answer(images)[0],
        path,
        beside(trained, test, threshold),
        most_loss=deploy.max_export_loss,
    )
    if export.refused:
        raise ExportError(f"deploy.runtime: {INT8} is refused: {export.refused} Raise that limit, or set auto.")
    return export
