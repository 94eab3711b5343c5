from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from cv_platform.config import DeployConfig, ExportFormat
from cv_platform.datasets.packing import PackedSplit
from cv_platform.deployment import quantization
from cv_platform.deployment.bundle import Place, Splits, publish_model
from cv_platform.deployment.exports import Measured, measure_int8, write_exports
from cv_platform.deployment.int8 import open_int8, write_int8
from cv_platform.errors import ExportError
from cv_platform.files import file_sha256
from cv_platform.records import DriftDetectors, ReferenceData, TrainedModel
from cv_platform.serving.model.runtime import load_bundle
from cv_platform.storage import CentralStorage
from cv_platform_tests.support.record_samples import VERSION, drift_detectors, evaluation, task, trained_model
from cv_platform_tests.support.tiny_models import build_classifier, build_encoder, tiny_images

pytestmark = pytest.mark.xdist_group("tensorflow")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("trained")
    model = build_classifier(seed=1, sharpness=20.0)
    # So that each class is the answer to some of these images.
    head = model.get_layer("probabilities")
    head.bias.assign(-np.log(np.asarray(model(coloured_images(60, seed=9)))).mean(axis=0))
    model.save(folder / "tiny.keras")
    build_encoder(seed=2).save(folder / "tiny_uae.keras")
    return trained_model(folder)


@pytest.fixture(scope="module")
def detectors(trained: TrainedModel) -> DriftDetectors:
    return drift_detectors(trained.directory)


def coloured_images(count: int, *, seed: int) -> np.ndarray:
    """Returns `(count, 16, 16, 3)` uint8: noise over a colour of each image's own."""
    colours = np.random.default_rng(seed).integers(0, 200, (count, 1, 1, 3))
    return (colours + tiny_images(count, seed=seed) // 5).astype(np.uint8)


def split_of(trained: TrainedModel, count: int, *, seed: int) -> PackedSplit:
    """Returns images, with what the model itself says of them as labels: all of it is right."""
    import keras

    images = coloured_images(count, seed=seed)
    model: Any = keras.models.load_model(trained.keras_path, compile=False)
    digests = [f"{row + 1000 * seed:064x}" for row in range(count)]
    labels = np.asarray(model(images)).argmax(axis=1)
    assert set(labels.tolist()) == {0, 1, 2}
    return PackedSplit(images, labels, digests, digests)


@pytest.fixture(scope="module")
def train(trained: TrainedModel) -> PackedSplit:
    return split_of(trained, 64, seed=3)


@pytest.fixture(scope="module")
def test(trained: TrainedModel) -> PackedSplit:
    return split_of(trained, 40, seed=4)


def test_every_format_answers_as_the_model_does(trained: TrainedModel, train: PackedSplit, test: PackedSplit):
    formats = get_args(ExportFormat)
    deploy = DeployConfig(exports=formats, max_export_loss=0.2)
    made = {export.format: export for export in write_exports(trained, deploy, test=test, train=train, threshold=0.5)}
    assert list(made) == list(formats)
    for name, export in made.items():
        assert (export.refused, export.images, export.model_accuracy) == ("", 40, 1.0)
        assert export.accuracy is not None
        assert export.accuracy == export.agreement  # As each label is the model's own answer.
        lost = 1 - export.accuracy
        assert export.loss_error == pytest.approx((lost * (1 - lost) / 40) ** 0.5)  # Nothing is won: a binomial share.
        assert export.largest_difference is not None
        assert export.largest_difference < (0.1 if name.endswith("int8") else 1e-4)
        assert export.megabytes == pytest.approx((trained.exports_directory / export.file).stat().st_size / 1e6)
        assert export.cpu_ms is not None
        assert export.cpu_ms > 0
    assert {path.name for path in trained.exports_directory.iterdir()} == {export.file for export in made.values()}


def test_a_format_that_loses_too_much_is_refused_in_words(trained: TrainedModel, train: PackedSplit, test: PackedSplit):
    # Ranges of black images say nothing of others: what 8 bits then answer is wrong.
    black = PackedSplit(np.zeros_like(train.images), train.targets, train.paths, train.sha256)
    deploy = DeployConfig(exports=("onnx_int8",))
    (export,) = write_exports(trained, deploy, test=test, train=black, threshold=0.5)
    assert "more than deploy.max_export_loss 0.01" in export.refused
    assert export.accuracy is not None
    assert not list(trained.exports_directory.iterdir())
    assert export.file == ""


def test_what_is_no_graph_is_not_quantised_and_leaves_nothing(tmp_path: Path, train: PackedSplit):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="Expected a graph that ONNX Runtime quantises"):
        quantization.quantise(tmp_path / "broken.onnx", tmp_path / "int8.onnx", np.asarray(train.images))
    assert [path.name for path in tmp_path.iterdir()] == ["broken.onnx"]


def test_a_graph_in_8_bits_is_served_with_its_map_and_its_rule_for_unknown_images(
    tmp_path: Path, trained: TrainedModel, detectors: DriftDetectors, train: PackedSplit, test: PackedSplit,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr("cv_platform.deployment.bundle.build_bento", lambda *_, **__: "tiny:none")
    deploy = DeployConfig(runtime="onnx_int8", max_export_loss=0.2)
    reference = ReferenceData(model=trained.model, directory=trained.directory, url="", rows=40)
    with pytest.raises(ExportError, match="Materialise reference_data again"):
        measure_int8(trained, reference, deploy, test=test, threshold=0.5)
    write_int8(trained, detectors, train)
    reference = reference.model_copy(update={"int8_sha256": file_sha256(trained.int8_path)})
    measured = measure_int8(trained, reference, deploy, test=test, threshold=0.5)
    storage = CentralStorage(tmp_path / "storage")
    bundle = publish_model(
        trained,
        detectors,
        evaluation(trained.directory),
        test.images[:4],
        deploy=deploy,
        place=Place(storage, tmp_path / "bentoml", tmp_path / "cache"),
        splits=Splits(train, train, test),
        exports=(measured,),
    )
    assert "8 bits" in bundle.runtime_reason
    loaded = load_bundle(storage, "tiny", VERSION, cache=tmp_path / "cache")
    images = np.asarray(test.images)
    answer = loaded.predict_batch(images)
    probabilities, features, uae = open_int8(trained.int8_path)(images)
    np.testing.assert_allclose(answer.probabilities, probabilities, atol=2e-2)
    np.testing.assert_allclose(answer.features, features, atol=5e-2)
    import keras

    encoder: Any = keras.models.load_model(detectors.uae_path, compile=False)
    np.testing.assert_allclose(uae, np.asarray(encoder(images)), atol=1e-4)  # It stays in 32 bits.
    assert answer.cam.shape == (40, 8, 8)
    assert answer.cam.max() == pytest.approx(1.0, abs=1e-3)
    assert loaded.unknown is not None
    assert {rate.kind for rate in bundle.unknown} == {"known", "corrupted", "far"}
    assert (loaded.unknown.score(answer.features) > 1).mean() < 0.5


@pytest.mark.parametrize(("flags", "whole"), [("avx512_vnni", True), ("avx2 fma", False), ("asimd asimddp", True)])
def test_weights_have_7_bits_where_the_cpu_would_overflow(tmp_path: Path, flags: str, whole: bool):
    (tmp_path / "cpuinfo").write_text(f"flags : sse {flags}\n")
    assert quantization._adds_without_overflow(tmp_path / "cpuinfo") is whole


def test_an_export_is_right_as_far_as_labels_are_known():
    truth = np.array([[True, False], [False, False]])
    known = np.array([[True, False], [True, True]])
    answers = np.array([[0.9, 0.9], [0.1, 0.9]], np.float32)
    several = task(classifier_type="multi-label")
    measured = Measured(np.zeros((2, 4, 4, 3), np.uint8), truth, known, several, 0.5, None, answers)
    assert measured.right(answers).tolist() == [True, False]
