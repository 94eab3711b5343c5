"""The contract that every network keeps, and what it costs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cv_platform.config import ModelConfig
from cv_platform.config.model import KERAS_APPLICATIONS
from cv_platform.errors import TrainingError
from cv_platform.training.network import _has_bfloat16, build_model, feature_map_layer, resolve_precision

HEAD = {"GlobalAveragePooling2D", "Dropout", "Dense", "Activation"}


def config(architecture: str = "resnet9s", px: int = 16, classes: int = 3, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "model_name": "m",
            "classes": [f"c{i}" for i in range(classes)],
            "input_size": {"h": px, "w": px},
            "architecture": architecture,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("architecture", "px", "map_px"),
    [
        ("small_cnn", 8, 4),
        ("small_cnn", 16, 4),
        ("small_cnn", 50, 6),
        ("resnet9s", 16, 4),
        ("resnet50", 64, 2),
        ("efficientnet_lite0", 64, 2),
        ("MobileNetV3Small", 64, 2),
    ],
)
def test_every_network_keeps_the_contract(architecture: str, px: int, map_px: int) -> None:
    network: Any = build_model(config(architecture, px, dropout=0.1), seed=1)

    assert network.input.name == "image"
    assert (network.input.dtype, network.input.shape) == ("uint8", (None, px, px, 3))
    assert (network.output.dtype, network.output.shape) == ("float32", (None, 3))
    assert network.layers[-1].name == "probabilities"
    assert len(network.get_layer("features").output.shape) == 2
    last_map: Any = feature_map_layer(network)
    assert last_map.output.shape[1:3] == (map_px, map_px)
    head = network.layers[network.layers.index(last_map) + 1 :]
    assert {type(layer).__name__ for layer in head} <= HEAD
    assert "Lambda" not in {type(layer).__name__ for layer in network.layers}
    probabilities = network(np.zeros((2, px, px, 3), np.uint8)).numpy()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_resnet9s_has_the_parameters_that_were_counted_by_hand() -> None:
    # Kernels 648 + 6912 + 18432 + 73728 + 73728 + 294912, four values per normalised channel (24+32+3·64+3·128 = 632),
    # dense 1290.
    network = build_model(config("resnet9s", 32, classes=10), seed=1)
    last_map: Any = feature_map_layer(network)

    assert network.count_params() == 469_650 + 4 * 632 == 472_178
    assert last_map.output.shape[1:] == (4, 4, 128)


@pytest.mark.parametrize(("px", "map_px"), [(8, 4), (50, 7), (64, 4), (128, 4), (224, 7)])
def test_resnet9s_fits_its_strides_to_the_input(px: int, map_px: int) -> None:
    last_map: Any = feature_map_layer(build_model(config("resnet9s", px), seed=1))

    assert last_map.output.shape[1:3] == (map_px, map_px)


def test_multi_label_ends_in_independent_sigmoids() -> None:
    network = build_model(config("small_cnn", classifier_type="multi-label"), seed=1)

    features = network.get_layer("logits").output
    assert network.layers[-1].activation.__name__ == "sigmoid"
    assert features.shape == (None, 3)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    first, again, other = (build_model(config(), seed=seed).get_weights() for seed in (1, 1, 2))

    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_bfloat16_computes_inside_and_leaves_the_global_policy_alone() -> None:
    import keras

    before = keras.config.dtype_policy()
    network: Any = build_model(config(), seed=1, precision="bfloat16")

    assert network.get_layer("stage3_conv").compute_dtype == "bfloat16"
    assert {w.dtype for w in network.weights} == {"float32"}
    assert network.output.dtype == network.get_layer("features").output.dtype == "float32"
    assert keras.config.dtype_policy() is before
    with pytest.raises(TrainingError):
        build_model(config("resnet50", 16), precision="bfloat16")
    assert keras.config.dtype_policy() is before


def test_weight_decay_is_a_penalty_on_kernels_only() -> None:
    network = build_model(config("small_cnn"), weight_decay=0.01, seed=1)

    kernels = [layer.kernel.numpy() for layer in network.layers if hasattr(layer, "kernel")]
    expected = 0.01 * sum(float((kernel**2).sum()) for kernel in kernels)
    assert float(sum(network.losses)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("px", [16, 32])
def test_resnet50_refuses_images_that_leave_no_map(px: int) -> None:
    with pytest.raises(TrainingError, match=r"input_size.*Raise input_size, or take model.architecture: resnet9s"):
        build_model(config("resnet50", px))


def test_a_saved_model_loads_in_safe_mode_and_says_the_same(tmp_path: Path) -> None:
    import keras

    network: Any = build_model(config(dropout=0.1), weight_decay=0.01, seed=1)
    network.save(tmp_path / "m.keras")
    loaded: Any = keras.models.load_model(tmp_path / "m.keras", safe_mode=True)

    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        loaded(images).numpy(), network(images).numpy(), atol=8 * float(np.finfo(np.float32).eps)
    )


def test_starts_from_weights_with_other_classes_but_not_from_another_network(tmp_path: Path) -> None:
    source = build_model(config("small_cnn", classes=5), seed=1)
    weights = tmp_path / "source.weights.h5"
    source.save_weights(weights)

    network: Any = build_model(config("small_cnn", weights=str(weights)), seed=2)

    np.testing.assert_array_equal(
        network.get_layer("block2_conv").kernel.numpy(), source.get_layer("block2_conv").kernel.numpy()
    )
    assert network.output.shape == (None, 3)
    with pytest.raises(TrainingError, match="expected weights of"):
        build_model(config("resnet9s", weights=str(weights)))
    with pytest.raises(TrainingError, match="does not exist"):
        build_model(config("small_cnn", weights=str(tmp_path / "none.weights.h5")))


@pytest.fixture(scope="module")
def published() -> Any:
    """The network of `keras.applications`: untrained, as its weights are published elsewhere."""
    import keras

    untrained: Any = keras.applications.ResNet50
    return untrained(include_top=False, weights=None, input_shape=(64, 64, 3))


def first_stage(network: Any, images: np.ndarray) -> np.ndarray:
    """Returns the first stage's answer: it sees all there is to colour order, the rest is the same network."""
    import keras

    return keras.Model(network.input, network.get_layer("pool1_pool").output)(images).numpy()


@pytest.mark.parametrize(
    ("name", "way"), [("resnet50_notop.weights.h5", "declared"), ("resnet50_notop.h5", "recognised")]
)
def test_published_resnet50_weights_are_turned_from_bgr_to_rgb(
    published: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    import keras
    from keras.src.applications import resnet
    from keras.src.legacy.saving import legacy_h5_format

    weights = tmp_path / name
    if name.endswith(".weights.h5"):
        published.save_weights(weights)
    else:
        with h5py.File(weights, "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, published)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    if way == "recognised":
        md5 = hashlib.md5(weights.read_bytes()).hexdigest()
        monkeypatch.setitem(resnet.WEIGHTS_HASHES, "resnet50", ("", md5))

    order = "bgr" if way == "declared" else "auto"
    network = build_model(config("resnet50", 64, weights=str(weights), weights_channel_order=order))

    theirs = first_stage(
        published, np.asarray(keras.applications.resnet.preprocess_input(images.astype(np.float32).copy()))
    )
    np.testing.assert_allclose(first_stage(network, images), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.whole  # Half a minute, for `make test-whole`.
def test_the_platforms_own_resnet50_says_the_same_after_it_was_loaded_again(tmp_path: Path) -> None:
    own = build_model(config("resnet50", 64), seed=1)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    said = own(images).numpy()
    own.save(tmp_path / "own.keras")
    own.save_weights(tmp_path / "own.weights.h5")

    for weights, order in (("own.keras", "auto"), ("own.weights.h5", "rgb")):
        again = build_model(
            config("resnet50", 64, weights=str(tmp_path / weights), weights_channel_order=order), seed=2
        )
        np.testing.assert_allclose(again(images).numpy(), said, rtol=1e-4, atol=1e-6)
    other = build_model(config("resnet50", 64, classes=5, weights=str(tmp_path / "own.keras")), seed=2)
    np.testing.assert_allclose(first_stage(other, images), first_stage(own, images), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_tell_their_order_of_channels_are_asked_for_it(published: Any, tmp_path: Path) -> None:
    published.save_weights(tmp_path / "some.weights.h5")
    published.save(tmp_path / "some.keras")
    (tmp_path / "garbage.keras").write_bytes(b"PK no archive")

    for name in ("some.weights.h5", "some.keras", "garbage.keras"):
        with pytest.raises(TrainingError, match=r"expected rgb or bgr.*Received: auto.*Choose bgr for weights"):
            build_model(config("resnet50", 64, weights=str(tmp_path / name)))
    with pytest.raises(TrainingError, match="expected weights of small_cnn"):
        build_model(config("small_cnn", weights=str(tmp_path / "garbage.keras")))
    with pytest.raises(TrainingError, match=r"weights of small_cnn are this platform's.*Received: bgr"):
        build_model(config("small_cnn", weights=str(tmp_path / "some.keras"), weights_channel_order="bgr"))


def test_auto_precision_follows_the_cpus_flags(tmp_path: Path) -> None:
    able, unable = tmp_path / "able", tmp_path / "unable"
    able.write_text("flags\t: fpu avx512f avx512_bf16 fma\n")
    unable.write_text("flags\t: fpu avx512f fma\n")

    assert _has_bfloat16(able)
    assert not _has_bfloat16(unable)
    assert not _has_bfloat16(tmp_path / "none")
    assert resolve_precision("float32") == "float32"
    assert resolve_precision("auto") == ("bfloat16" if _has_bfloat16() else "float32")


def test_the_names_of_keras_applications_are_its_names() -> None:
    import keras

    applications: Any = keras.applications
    assert [name for name in KERAS_APPLICATIONS if not callable(getattr(applications, name, None))] == []


def test_an_unknown_name_gets_those_that_are_near() -> None:
    with pytest.raises(ValueError, match=r"keras.applications \(MobileNetV2 or MobileNet\?\), or module:function"):
        config("MobilNetV2")


OWN = """
from keras import layers

def tiny(image, model):
    return layers.Conv2D(4, 3, activation="relu")(layers.Rescaling(1 / 255)(image))

def raising(image, model):
    raise KeyError("stage")

def number(image, model):
    return 3

def pooled(image, model):
    return layers.GlobalAveragePooling2D()(tiny(image, model))

def strange(image, model):
    return layers.Lambda(lambda x: x)(tiny(image, model))

def detached(image, model):
    import keras
    return tiny(keras.Input(image.shape[1:]), model)
"""


def test_a_function_of_the_users_is_a_network_that_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keras

    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    network = build_model(config("own_networks:tiny"), seed=1)
    last_map: Any = feature_map_layer(network)
    assert last_map.output.shape[1:] == (14, 14, 4)
    network.save(tmp_path / "own.keras")
    loaded: Any = keras.models.load_model(tmp_path / "own.keras")
    assert loaded.output_shape == (None, 3)
    for function, received in {
        "raising": r"it raised KeyError: 'stage'. Mend the function",
        "number": r"it returned int. Return what a Keras layer returns",
        "pooled": r"a tensor of shape \(None, 4\). Return the map before it is pooled",
        "strange": r"layers that load nowhere else: Lambda lambda",
        "detached": r"its result is not made from the image",
        "missing": r"AttributeError: module 'own_networks' has no attribute 'missing'",
    }.items():
        with pytest.raises(TrainingError, match=rf"Received: own_networks:{function}: .*{received}"):
            build_model(config(f"own_networks:{function}"), seed=1)
    with pytest.raises(TrainingError, match=r"No module named 'not_there'. Install the module"):
        build_model(config("not_there:tiny"), seed=1)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    network = build_model(config("small_cnn"), seed=1)
    values = network.get_weights()
    values[2][0] = np.nan
    network.set_weights(values)
    network.save(tmp_path / "diverged.keras")
    with pytest.raises(TrainingError, match=r"NaN or infinity in block1_conv/kernel \(1 of 10 arrays\)"):
        build_model(config("small_cnn", weights=str(tmp_path / "diverged.keras")), seed=2)
