from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cv_platform.deployment.export import export_bundle
from cv_platform.drift.extraction import load_model
from cv_platform.errors import ExportError
from cv_platform.serving.model.runtime import Prediction
from cv_platform.serving.model.runtime_onnx import OnnxRuntime
from cv_platform.serving.model.runtime_tensorflow import TensorFlowRuntime
from cv_platform_tests.support.tiny_models import TinyExport, build_classifier, build_encoder, tiny_images

pytestmark = pytest.mark.xdist_group("tensorflow")


def grad_cam_oracle(model, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Guided Grad-CAM of the chosen class's probability, straight from its definition, on the Keras model itself."""
    import keras
    import tensorflow as tf

    watched = keras.Model(model.input, [model.get_layer("feature_map").output, model.output])
    with tf.GradientTape() as tape:
        feature_map, probabilities = watched(images, training=False)
        score = tf.reduce_sum(tf.gather(probabilities, classes, batch_dims=1))
    gradient, feature_map = np.asarray(tape.gradient(score, feature_map)), np.asarray(feature_map)
    weights = (np.maximum(gradient, 0) * (feature_map > 0)).mean(axis=(1, 2), keepdims=True)
    maps = np.maximum((weights * feature_map).sum(axis=3), 0)
    largest = maps.max(axis=(1, 2), keepdims=True)
    return np.divide(maps, largest, out=np.zeros_like(maps), where=largest > 0)


def run(folder: Path, images: np.ndarray, class_index: int = -1) -> Prediction:
    exported = folder / "model.onnx"
    runtime = OnnxRuntime(exported) if exported.is_file() else TensorFlowRuntime(folder / "saved_model")
    return runtime(images, np.full(len(images), class_index, dtype=np.int32))


@pytest.fixture(params=["onnx", "tensorflow"])
def exported(request: pytest.FixtureRequest, tiny_export: TinyExport, tensorflow_export: TinyExport) -> TinyExport:
    """The same model in each runtime."""
    return tiny_export if request.param == "onnx" else tensorflow_export


def test_probabilities_features_and_embeddings_are_those_of_keras(exported: TinyExport):
    import keras

    images = tiny_images(7, seed=11)
    model = load_model(exported.keras_path)
    encoder = load_model(exported.uae_path)
    features = keras.Model(model.input, model.get_layer("features").output)
    answer = run(exported.folder, images)
    np.testing.assert_allclose(answer.probabilities, np.asarray(model(images, training=False)), atol=1e-6)
    np.testing.assert_allclose(answer.features, np.asarray(features(images, training=False)), atol=1e-6)
    np.testing.assert_allclose(answer.uae, np.asarray(encoder(images, training=False)), atol=1e-6)
    assert {a.dtype for a in (answer.probabilities, answer.features, answer.uae, answer.cam)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("class_index", [-1, 0, 1, 2])
def test_map_equals_an_independent_grad_cam(exported: TinyExport, class_index: int):

    images = tiny_images(6, seed=12)
    model = load_model(exported.keras_path)
    predicted = np.asarray(model(images)).argmax(axis=1)
    classes = predicted if class_index < 0 else np.full(len(images), class_index)
    answer = run(exported.folder, images, class_index)
    assert answer.cam.shape == (6, 8, 8)
    np.testing.assert_allclose(answer.cam, grad_cam_oracle(model, images, classes), atol=1e-4)


def test_an_answer_does_not_depend_on_its_batch(exported: TinyExport):
    images = tiny_images(5, seed=13)
    together = run(exported.folder, images)
    alone = run(exported.folder, images[3:4])
    np.testing.assert_allclose(alone.probabilities[0], together.probabilities[3], atol=1e-6)
    np.testing.assert_allclose(alone.cam[0], together.cam[3], atol=1e-5)


@pytest.mark.parametrize("runtime", ["onnx", "tensorflow"])
def test_multi_label_model_exports_with_the_map_of_the_asked_class(tmp_path: Path, runtime: Any):
    model = build_classifier(seed=5, activation="sigmoid")
    model.save(tmp_path / "m.keras")
    build_encoder(seed=6).save(tmp_path / "u.keras")
    images = tiny_images(4, seed=14)
    export_bundle(tmp_path / "m.keras", tmp_path / "u.keras", tmp_path, golden_images=images, runtime=runtime)
    answer = run(tmp_path, images, 2)
    np.testing.assert_allclose(answer.probabilities, np.asarray(model(images, training=False)), atol=1e-6)
    np.testing.assert_allclose(answer.cam, grad_cam_oracle(model, images, np.full(4, 2)), atol=1e-4)


@pytest.mark.parametrize("runtime", ["onnx", "tensorflow"])
def test_a_model_that_is_certain_keeps_its_map(tmp_path: Path, runtime: Any):
    # With logits in the thousands the probability is 1 but for rounding, and its own gradient is rounding.
    build_classifier(seed=1, sharpness=10_000.0).save(tmp_path / "m.keras")
    build_encoder(seed=6).save(tmp_path / "u.keras")
    images = tiny_images(8, seed=15)
    export_bundle(tmp_path / "m.keras", tmp_path / "u.keras", tmp_path, golden_images=images, runtime=runtime)
    answer = run(tmp_path, images)
    np.testing.assert_allclose(answer.probabilities.max(axis=1), 1.0, rtol=4 * float(np.finfo(np.float32).eps))
    np.testing.assert_allclose(answer.cam.max(), 1.0, rtol=float(np.finfo(np.float32).eps))


@pytest.mark.parametrize("runtime", ["onnx", "tensorflow"])
def test_a_map_without_evidence_is_zero_not_nan(tmp_path: Path, runtime: Any):
    import keras

    inputs = keras.Input((16, 16, 3), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(4, 3, kernel_initializer="zeros", activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(3, activation="relu", name="features")(x)
    keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="probabilities")(x)).save(tmp_path / "m.keras")
    build_encoder(seed=6).save(tmp_path / "u.keras")
    export_bundle(tmp_path / "m.keras", tmp_path / "u.keras", tmp_path, golden_images=tiny_images(2), runtime=runtime)
    np.testing.assert_array_equal(run(tmp_path, tiny_images(2)).cam, np.zeros((2, 14, 14), dtype=np.float32))


def test_golden_file_holds_images_and_answers(exported: TinyExport):
    answer = run(exported.folder, exported.images)
    with np.load(exported.folder / "golden.npz", allow_pickle=False) as golden:
        np.testing.assert_array_equal(golden["images"], exported.images)
        np.testing.assert_array_equal(golden["class_index"], answer.probabilities.argmax(axis=1))
        np.testing.assert_allclose(golden["cam"], answer.cam, atol=1e-6)
        assert golden["tolerance"].tolist() == [1e-4, 1e-3]


def test_refuses_models_that_do_not_fit_and_names_every_mistake(tmp_path: Path, tiny_export: TinyExport):
    import keras

    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(inputs))
    keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="out")(x)).save(tmp_path / "m.keras")
    with pytest.raises(ExportError) as caught:
        export_bundle(tmp_path / "m.keras", tiny_export.uae_path, tmp_path, golden_images=tiny_export.images)
    message = str(caught.value)
    for part in ("float32", "the encoder (None, 16, 16, 3)", "golden images", "'features'", "'probabilities'"):
        assert part in message


def test_refuses_a_file_that_is_no_model(tmp_path: Path, tiny_export: TinyExport):
    broken = tmp_path / "m.keras"
    broken.write_bytes(tiny_export.keras_path.read_bytes()[:2000])
    with pytest.raises(ExportError, match=r"m\.keras"):
        export_bundle(broken, tiny_export.uae_path, tmp_path, golden_images=tiny_export.images)


def test_refuses_a_model_with_pickled_code(tmp_path: Path, tiny_export: TinyExport):
    import keras

    inputs = keras.Input((16, 16, 3), dtype="uint8", name="image")
    x = keras.layers.Lambda(lambda images: images / 255, output_shape=(16, 16, 3))(inputs)
    keras.Model(inputs, x).save(tmp_path / "m.keras")
    with pytest.raises(ExportError, match="Lambda"):
        export_bundle(tmp_path / "m.keras", tiny_export.uae_path, tmp_path, golden_images=tiny_export.images)
