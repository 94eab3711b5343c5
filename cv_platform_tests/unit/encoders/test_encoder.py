from __future__ import annotations

import gc
import hashlib
import importlib.util
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cv_platform.compute.carried import CarriedFile
from cv_platform.config import EncoderConfig
from cv_platform.encoders.efficientnet_lite import keras_feature_map, write_onnx
from cv_platform.encoders.encoder import BATCH_IMAGES, PRETRAINED, Encoder, open_encoder, pretrained_weights
from cv_platform.encoders.torch_file import read_state_dict
from cv_platform.errors import EncoderError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def lite0(home: Path) -> Encoder:
    return open_encoder(EncoderConfig(input_px=64), home)


def noise(count: int, side: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


# The larger one takes its time: it is tested where whole installations are.
EACH = pytest.mark.parametrize("name", ["lite0", pytest.param("lite2", marks=pytest.mark.whole)])


@EACH
def test_it_knows_what_photographs_show(home: Path, name: Literal["lite0", "lite2"]) -> None:
    from sklearn.datasets import load_sample_images

    encoder = open_encoder(EncoderConfig(name=name, input_px=224), home)
    tensors = read_state_dict(pretrained_weights(name))
    scikit_image = importlib.util.find_spec("skimage")
    assert scikit_image is not None
    folder = Path(str(scikit_image.origin)).with_name("data")
    pictures = {698: load_sample_images().images[0]}  # A palace.
    for right, file in ((285, "chelsea.png"), (967, "coffee.png"), (657, "rocket.jpg")):
        pixels = cv2.imread(str(folder / file))
        assert pixels is not None
        pictures[right] = cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    for right, picture in pictures.items():
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        square = cv2.resize(picture[top : top + side, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)
        features = encoder.embed(np.asarray(square, np.uint8)[None])
        logits = features @ tensors["_fc.weight"].T + tensors["_fc.bias"]
        assert right in np.argsort(-logits[0])[:5]


@EACH
def test_keras_and_onnx_compute_the_same(home: Path, name: Literal["lite0", "lite2"]) -> None:
    import keras

    encoder = open_encoder(EncoderConfig(name=name, input_px=64), home)
    tensors = read_state_dict(pretrained_weights(name))
    images = noise(4, 64)
    image = keras.Input((64, 64, 3))
    feature_map = keras_feature_map(image, tensors, PRETRAINED[name].repeats)
    network: Any = keras.Model(image, keras.layers.GlobalAveragePooling2D()(feature_map))
    np.testing.assert_allclose(network.predict(images, verbose=0), encoder.embed(images), atol=1e-4)


def test_weights_of_another_network_are_refused() -> None:
    tensors = read_state_dict(pretrained_weights("lite0"))
    with pytest.raises(EncoderError, match="EfficientNet-Lite"):
        write_onnx(tensors, (1, 3, 3, 4, 4, 5, 1))


def test_batches_come_in_order_and_are_what_single_images_are(lite0: Encoder) -> None:
    images = noise(2 * BATCH_IMAGES + 3, 64)
    joined = lite0.embed(images)
    assert joined.shape == (len(images), 1280)
    np.testing.assert_allclose(
        joined[[0, 20, 34]], np.concatenate([lite0.embed(images[[at]]) for at in (0, 20, 34)]), atol=1e-4
    )
    assert lite0.embed(images[:0]).shape == (0, 1280)


def test_another_process_opens_the_same_encoder(lite0: Encoder) -> None:
    again = pickle.loads(pickle.dumps(lite0))
    assert again.key == lite0.key
    np.testing.assert_allclose(again.embed(noise(1, 64)), lite0.embed(noise(1, 64)), atol=1e-6)
    with pytest.raises(TypeError, match="Expected an encoder of open_encoder"):
        pickle.dumps(replace(lite0, _source=None))


def test_another_machine_opens_a_file_of_ones_own_that_it_does_not_see(tmp_path: Path) -> None:
    here, images = tmp_path / "here", noise(2, 32)
    here.mkdir()
    encoder = open_encoder(own_file(here, ["N", 3]), here / "home")
    sent = pickle.dumps(encoder)
    here.rename(tmp_path / "away")
    opened = pickle.loads(sent)
    assert opened is not encoder
    assert opened.key == encoder.key
    np.testing.assert_allclose(opened.embed(images), encoder.embed(images), rtol=1e-5, atol=1e-6)
    assert not here.exists()
    assert pickle.loads(sent) is opened
    kept = [one for one in gc.get_objects() if isinstance(one, CarriedFile)]
    assert [one.content for one in kept if one.path.is_relative_to(here)] == [None]


@pytest.mark.parametrize("images", [noise(1, 32), noise(1, 64).astype(np.float32), noise(1, 64)[0]])
def test_pixels_of_another_form_are_refused(images: NDArray[np.uint8], lite0: Encoder) -> None:
    with pytest.raises(ValueError, match=r"Expected \(N, 64, 64, 3\) uint8"):
        lite0.embed(images)


def test_it_is_converted_once(home: Path, lite0: Encoder) -> None:
    (graph,) = (home / "cache" / "encoders").glob(f"{PRETRAINED['lite0'].sha256[:16]}-*")
    made = graph.stat().st_mtime_ns
    again = open_encoder(EncoderConfig(input_px=64), home)
    assert (again.key, graph.stat().st_mtime_ns) == (lite0.key, made)
    assert open_encoder(EncoderConfig(input_px=96), home).key != lite0.key
    # As 7107123 computed it: what was embedded is not embedded again.
    assert lite0.key == "d153db352b3adadd"
    declared = open_encoder(EncoderConfig(input_px=64), home, 12)
    assert declared.key != lite0.key
    assert pickle.loads(pickle.dumps(declared)).key == declared.key


def own_file(folder: Path, output: list[int | str]) -> EncoderConfig:
    """Writes a network that returns each channel's mean, or with other `output` something that is no vector."""
    images = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["N", 3, "H", "W"])
    nodes = [helper.make_node("GlobalAveragePool", ["pixels"], ["pooled" if len(output) == 2 else "out"])]
    if len(output) == 2:
        nodes.append(helper.make_node("Flatten", ["pooled"], ["out"]))
    vectors = helper.make_tensor_value_info("out", TensorProto.FLOAT, output)
    model = helper.make_model(
        helper.make_graph(nodes, "means", [images], [vectors]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path = folder / "own.onnx"
    path.write_bytes(model.SerializeToString())
    return EncoderConfig(file=path, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), input_px=32)


def test_a_file_of_ones_own_gets_channels_first_and_standardised(tmp_path: Path) -> None:
    encoder = open_encoder(own_file(tmp_path, ["N", 3]), tmp_path)
    white = encoder.embed(np.full((1, 32, 32, 3), 255, np.uint8))
    np.testing.assert_allclose(white, [[(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]], rtol=1e-5)


def test_a_keras_file_of_ones_own_is_converted_once_and_computes_what_keras_does(tmp_path: Path) -> None:
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    network: Any = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling2D(),
        ]
    )
    path = tmp_path / "own.keras"
    network.save(path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    config = EncoderConfig(file=path, sha256=sha256, input_px=32, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    encoder = open_encoder(config, tmp_path)
    images = noise(3, 32)
    seen = (images / np.float32(255) - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    np.testing.assert_allclose(encoder.embed(images), network.predict(seen, verbose=0), atol=1e-4)
    (graph,) = (tmp_path / "cache" / "encoders").iterdir()
    made = graph.stat().st_mtime_ns
    assert (open_encoder(config, tmp_path).key, graph.stat().st_mtime_ns) == (encoder.key, made)
    sent = pickle.dumps(encoder)  # With what it was converted to: who takes it has no need of Keras.
    graph.rename(tmp_path / "away")
    np.testing.assert_allclose(pickle.loads(sent).embed(images), encoder.embed(images), rtol=1e-5, atol=1e-6)

    keras.Sequential([keras.Input((32, 32, 3)), layers.Conv2D(8, 3)]).save(path)
    maps = config.model_copy(update={"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    with pytest.raises(EncoderError, match=r"first output is \(N, features\)"):
        open_encoder(maps, tmp_path)
    path.write_text("no network")
    text = config.model_copy(update={"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    with pytest.raises(EncoderError, match="Expected a Keras model at"):
        open_encoder(text, tmp_path)


def test_a_file_that_is_no_encoder_of_that_sha256_is_refused(tmp_path: Path) -> None:
    config = own_file(tmp_path, ["N", 3, 1, 1])
    with pytest.raises(EncoderError, match=r"first output is \(N, features\)"):
        open_encoder(config, tmp_path)
    with pytest.raises(EncoderError, match="sha256"):
        open_encoder(config.model_copy(update={"sha256": "0" * 64}), tmp_path)
    with pytest.raises(EncoderError, match="No such file"):
        open_encoder(config.model_copy(update={"file": tmp_path / "missing.onnx"}), tmp_path)
    text = tmp_path / "text.onnx"
    text.write_text("no network")
    sha256 = hashlib.sha256(text.read_bytes()).hexdigest()
    with pytest.raises(EncoderError, match="Expected an ONNX encoder"):
        open_encoder(EncoderConfig(file=text, sha256=sha256), tmp_path)


def test_a_file_needs_its_sha256() -> None:
    with pytest.raises(ValueError, match="sha256sum"):
        EncoderConfig(file=Path("own.onnx"))
