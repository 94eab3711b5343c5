"""The plain form of each head against TensorFlow's gradient tape, and the heads that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cv_platform.config import ModelConfig
from cv_platform.deployment.export import export_bundle
from cv_platform.deployment.signature import plain_signature, tape_signature
from cv_platform.errors import ExportError
from cv_platform.serving.model.runtime import Prediction
from cv_platform.serving.model.runtime_onnx import OnnxRuntime
from cv_platform_tests.support.processor import needs_bfloat16
from cv_platform_tests.support.tiny_models import build_classifier, build_encoder, tiny_images

pytestmark = pytest.mark.xdist_group("tensorflow")


def classifier(head: Any, *, feature_map: str = "relu", side: int = 16) -> Any:
    """Builds a classifier whose head is `head(feature map)`, with "features" and "probabilities" in it."""
    import keras

    keras.utils.set_random_seed(3)
    inputs = keras.Input((side, side, 3), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = keras.layers.Conv2D(12, 3, strides=2, activation=feature_map)(x)
    return keras.Model(inputs, head(x))


def head(pooling: Any, *between: Any, output: str = "softmax") -> Any:
    """Returns a head of `pooling`, the layers `between`, features and an output layer."""
    import keras

    def build(x: Any) -> Any:
        for layer in (pooling, *between, keras.layers.Dense(9, activation="relu", name="features")):
            x = layer(x)
        return keras.layers.Dense(4, activation=output, name="probabilities")(x)

    return build


def compared(model: Any, images: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns what both signatures answer, explaining another class for each image."""
    import tensorflow as tf

    encoder = build_encoder(seed=1)
    asked = (np.arange(len(images)) % 5 - 1).astype(np.int32)
    tape, plain = (
        {name: np.asarray(value) for name, value in tf.function(make(model, encoder))(images, asked).items()}
        for make in (tape_signature, plain_signature)
    )
    return tape, plain


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
@pytest.mark.parametrize("pooling", ["GlobalAveragePooling2D", "GlobalMaxPooling2D"])
def test_the_plain_form_is_the_gradient(pooling: str, output: str):
    import keras

    between = [
        keras.layers.Dropout(0.5),
        keras.layers.Dense(16, activation="tanh"),
        keras.layers.Dense(16),
        keras.layers.ReLU(),
        keras.layers.Dense(12, use_bias=False),
        keras.layers.Activation("tanh"),
    ]
    model = classifier(head(getattr(keras.layers, pooling)(), *between, output=output))
    tape, plain = compared(model, tiny_images(20, seed=8))
    assert len(np.unique(tape["cam"].max(axis=(1, 2)))) > 1 or tape["cam"].any()
    for name, expected in tape.items():
        np.testing.assert_allclose(plain[name], expected, atol=2e-6, err_msg=name)


def test_the_plain_form_keeps_the_gate_of_a_map_with_negative_cells():
    import keras

    model = classifier(head(keras.layers.GlobalAveragePooling2D()), feature_map="tanh")
    tape, plain = compared(model, tiny_images(20, seed=9))
    assert tape["cam"].any()
    np.testing.assert_allclose(plain["cam"], tape["cam"], atol=2e-6)


def test_a_softmax_layer_behind_a_dense_one_is_explained_alike():
    import keras

    def build(x: Any) -> Any:
        x = keras.layers.GlobalAveragePooling2D(name="features")(x)
        return keras.layers.Softmax(name="probabilities")(keras.layers.Dense(4)(x))

    tape, plain = compared(classifier(build), tiny_images(10, seed=10))
    assert tape["cam"].any()
    np.testing.assert_allclose(plain["cam"], tape["cam"], atol=2e-6)


def saturated(scale: float) -> Any:
    """Builds a classifier with two layers of tanh in its head, the second saturated as much as `scale` is large."""
    import keras

    model = classifier(head(keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(7, activation="tanh")))
    features = model.get_layer("features")
    features.activation = keras.activations.tanh
    kernel, _ = features.get_weights()
    # Far from 0 by the bias alone, so that every unit is saturated on every image.
    features.set_weights([scale * kernel, np.where(np.arange(9) % 2, -scale, scale).astype(np.float32)])
    return model


@pytest.mark.parametrize(
    ("scale", "shown"),
    # 1 − tanh²(2) is 0.07; 1 − tanh²(9) is 6e-8, half of what a float32 near 1 can tell; behind 100 all is 0 or noise.
    [(2.0, True), (9.0, False), (100.0, False), (1e6, False)],
)
def test_a_map_that_is_only_rounding_is_blank_in_every_runtime(tmp_path: Path, scale: float, shown: bool):
    model, images = saturated(scale), tiny_images(12, seed=11)
    tape, plain = compared(model, images)
    model.save(tmp_path / "m.keras")
    build_encoder(seed=1).save(tmp_path / "u.keras")
    files = (tmp_path / "m.keras", tmp_path / "u.keras", tmp_path)
    exported = export_bundle(*files, golden_images=images)
    assert (exported.runtime, exported.parity["cam"] <= 1e-3) == ("onnx", True)
    asked = (np.arange(len(images)) % 5 - 1).astype(np.int32)
    for cam in (tape["cam"], plain["cam"], OnnxRuntime(tmp_path / "model.onnx", threads=1)(images, asked).cam):
        assert cam.any() == shown
        np.testing.assert_allclose(cam, tape["cam"], atol=1e-3)


def test_a_map_that_is_only_rounding_is_blank_behind_a_head_without_a_plain_form():
    import keras
    import tensorflow as tf

    def answers(scale: float) -> np.ndarray:
        flat = [keras.layers.Flatten(), keras.layers.Dense(7, activation="tanh", name="bent")]
        model = classifier(head(*flat))
        kernel, _ = model.get_layer("bent").get_weights()
        model.get_layer("bent").set_weights([kernel, np.full(7, scale, np.float32)])
        images, encoder = tiny_images(12, seed=11), build_encoder(seed=1)
        serve = tf.function(tape_signature(model, encoder))
        return np.asarray(serve(images, np.full(12, -1, np.int32))["cam"])

    assert (answers(0.5).max(axis=(1, 2)) > 0.99).all()
    assert not answers(20.0).any()


@pytest.mark.parametrize("output", ["softmax", "sigmoid"])
def test_a_certain_answer_keeps_its_map_in_every_runtime(output: str):
    import keras

    model = classifier(head(keras.layers.GlobalAveragePooling2D(), output=output))
    out = model.get_layer("probabilities")
    kernel, bias = out.get_weights()
    out.set_weights([1e4 * kernel, bias])
    tape, plain = compared(model, tiny_images(12, seed=11))
    # Within a few units in the last place of certainty, where p(1 − p), the factor that is left out, is rounding.
    doubts = np.abs(tape["probabilities"] - np.round(tape["probabilities"])).max(axis=1)
    confident = doubts < 4 * np.finfo(np.float32).eps
    assert confident.sum() >= 6
    assert (tape["cam"][confident].max(axis=(1, 2)) > 0.99).any()
    np.testing.assert_allclose(plain["cam"], tape["cam"], atol=1e-5)


def test_heads_without_a_plain_form_are_refused_by_the_name_of_the_layer():
    import keras

    layers = keras.layers
    average = layers.GlobalAveragePooling2D

    def branches(x: Any) -> Any:
        pooled = layers.Concatenate(name="both")([average()(x), layers.GlobalMaxPooling2D()(x)])
        return layers.Dense(3, activation="softmax", name="probabilities")(layers.Dense(5, name="features")(pooled))

    refused = {
        "'flat' (Flatten)": head(layers.Flatten(name="flat")),
        "gelu in the layer 'bent'": head(average(), layers.Dense(8, activation="gelu", name="bent")),
        "'capped' (ReLU)": head(average(), layers.ReLU(max_value=6.0, name="capped")),
        "'normed' (BatchNormalization)": head(average(), layers.BatchNormalization(name="normed")),
        "'both' (Concatenate)": branches,
    }
    for words, build in refused.items():
        with pytest.raises(ExportError) as caught:
            plain_signature(classifier(build), build_encoder(seed=1))
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "side", "kind"),
    [
        ("small_cnn", 16, "multi-class"),
        ("small_cnn", 16, "multi-label"),
        ("resnet9s", 16, "multi-class"),
        pytest.param("resnet50", 33, "multi-label", marks=pytest.mark.whole),  # A minute, for `make test-whole`.
        ("efficientnet_lite0", 64, "multi-class"),
    ],
)
def test_each_architecture_runs_by_onnx_and_answers_as_the_tape(
    tmp_path: Path, architecture: str, side: int, kind: str
):
    import keras
    import tensorflow as tf

    from cv_platform.training.network import build_model

    config = ModelConfig.model_validate(
        {
            "model_name": "m",
            "classes": ["a", "b", "c"],
            "architecture": architecture,
            "input_size": {"h": side, "w": side},
            "classifier_type": kind,
        }
    )
    model = build_model(config)
    inputs = keras.Input((side, side, 3), dtype="uint8")
    pooled = keras.layers.AveragePooling2D(8)(keras.layers.Rescaling(1 / 255)(inputs))
    encoder = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(pooled)))
    model.save(tmp_path / "m.keras")
    encoder.save(tmp_path / "u.keras")
    images = np.random.default_rng(2).integers(0, 256, (6, side, side, 3), dtype=np.uint8)
    exported = export_bundle(tmp_path / "m.keras", tmp_path / "u.keras", tmp_path, golden_images=images[:3])
    assert (exported.runtime, (tmp_path / "saved_model").exists()) == ("onnx", False)
    assert exported.parity["probabilities"] <= 1e-4
    assert exported.parity["cam"] <= 1e-3
    asked = np.array([-1, 0, 1, 2, 2, 1], dtype=np.int32)
    expected = {k: np.asarray(v) for k, v in tf.function(tape_signature(model, encoder))(images, asked).items()}
    answer: Prediction = OnnxRuntime(tmp_path / "model.onnx", threads=1)(images, asked)
    np.testing.assert_allclose(answer.probabilities, expected["probabilities"], atol=1e-5)
    assert np.abs(answer.cam - expected["cam"]).max() <= 1e-3
    assert expected["cam"].any()


def test_a_head_that_does_not_fit_falls_back_to_tensorflow_and_says_why(tmp_path: Path):
    import keras

    model = classifier(head(keras.layers.Flatten(name="flat")))
    model.save(tmp_path / "m.keras")
    build_encoder(seed=1).save(tmp_path / "u.keras")
    files = (tmp_path / "m.keras", tmp_path / "u.keras", tmp_path)
    exported = export_bundle(*files, golden_images=tiny_images(2))
    assert (exported.runtime, exported.parity) == ("tensorflow", {})
    assert "No ONNX" in exported.runtime_reason
    assert "'flat' (Flatten)" in exported.runtime_reason
    assert (tmp_path / "saved_model" / "saved_model.pb").is_file()
    assert not (tmp_path / "model.onnx").exists()
    with pytest.raises(ExportError, match=r"flat.*deploy\.runtime"):
        export_bundle(*files, golden_images=tiny_images(2), runtime="onnx")


@needs_bfloat16
def test_a_layer_that_does_not_convert_falls_back_to_tensorflow(tmp_path: Path):
    import keras

    def build(x: Any) -> Any:
        # 16-bit convolutions, which ONNX Runtime does not have on a CPU.
        x = keras.layers.Conv2D(8, 3, activation="relu", dtype="mixed_bfloat16")(x)
        return head(keras.layers.GlobalAveragePooling2D(dtype="float32"))(x)

    classifier(build).save(tmp_path / "m.keras")
    build_encoder(seed=1).save(tmp_path / "u.keras")
    exported = export_bundle(tmp_path / "m.keras", tmp_path / "u.keras", tmp_path, golden_images=tiny_images(2))
    assert exported.runtime == "tensorflow"
    assert "bfloat16" in exported.runtime_reason


def test_a_graph_that_answers_otherwise_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from cv_platform.deployment import export

    build_classifier(seed=1).save(tmp_path / "m.keras")
    build_encoder(seed=1).save(tmp_path / "u.keras")
    files = (tmp_path / "m.keras", tmp_path / "u.keras", tmp_path)
    # Another model's graph stands for a conversion that went wrong.
    original = export.write_onnx
    monkeypatch.setattr(export, "write_onnx", lambda model, uae, path: original(build_classifier(seed=2), uae, path))
    exported = export_bundle(*files, golden_images=tiny_images(2))
    assert exported.runtime == "tensorflow"
    assert "probabilities off by" in exported.runtime_reason
    assert exported.parity["probabilities"] > 1e-4
    assert not (tmp_path / "model.onnx").exists()
    with pytest.raises(ExportError, match="probabilities off by"):
        export_bundle(*files, golden_images=tiny_images(2), runtime="onnx")
