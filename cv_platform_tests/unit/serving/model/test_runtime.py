import io
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from cv_platform.config import ModelConfig
from cv_platform.datasets.packing import pack_forms
from cv_platform.datasets.shards.pixels import packed_pixels
from cv_platform.errors import BundleNotFoundError, CorruptBundleError
from cv_platform.images import Preprocessing, preprocess, preprocessing_hash, resize
from cv_platform.properties import image_properties
from cv_platform.serving.model.runtime import LoadedModel, load_bundle, load_folder
from cv_platform.serving.routes.answer import predict_upload
from cv_platform.storage import CentralStorage, new_version
from cv_platform_tests.support.tiny_models import (
    IMAGE_SIZE,
    MODEL_NAME,
    TinyExport,
    publish_tiny,
    tiny_images,
    tiny_metadata,
)

pytestmark = pytest.mark.xdist_group("tensorflow")


@pytest.fixture(scope="module", params=["onnx", "tensorflow"])
def model(request: pytest.FixtureRequest, tiny_export: TinyExport, tensorflow_export: TinyExport) -> LoadedModel:
    export = tiny_export if request.param == "onnx" else tensorflow_export
    return load_folder(export.folder, tiny_metadata(runtime=request.param))


def changed_golden(folder: Path, target: Path, **changes: np.ndarray) -> Path:
    """Copies a bundle's files with other golden answers."""
    shutil.copytree(folder, target)
    with np.load(folder / "golden.npz") as golden:
        values = {**{key: golden[key] for key in golden.files}, **changes}
    np.savez(target / "golden.npz", **values)
    return target


def test_loads_a_published_bundle_and_answers_its_golden_images(tmp_path: Path, tiny_export: TinyExport, cache: Path):
    storage = CentralStorage(tmp_path / "storage")
    metadata = publish_tiny(storage, tiny_export)
    loaded = load_bundle(storage, MODEL_NAME, metadata.version, cache=cache)
    assert loaded.metadata == metadata
    with np.load(tiny_export.folder / "golden.npz") as golden:
        answer = loaded.predict(golden["images"][2])
        np.testing.assert_allclose(answer.probabilities, golden["probabilities"][2], atol=1e-6)
        np.testing.assert_allclose(answer.features, golden["features"][2], atol=1e-6)
        np.testing.assert_allclose(answer.uae, golden["uae"][2], atol=1e-6)
        np.testing.assert_allclose(answer.cam, golden["cam"][2], atol=1e-5)


def test_downloads_from_storage_that_is_no_folder(tiny_export: TinyExport, cache: Path):
    storage = CentralStorage("memory://runtime-test")
    metadata = publish_tiny(storage, tiny_export)
    load_bundle(storage, MODEL_NAME, metadata.version, cache=cache)
    assert (cache / MODEL_NAME / metadata.version / "model.onnx").is_file()


def test_keeps_the_last_few_downloads_only(tiny_export: TinyExport, cache: Path):
    storage = CentralStorage("memory://prune-test")
    versions = [publish_tiny(storage, tiny_export).version for _ in range(6)]
    for version in versions:
        load_bundle(storage, MODEL_NAME, version, cache=cache)
    kept = {path.name for path in (cache / MODEL_NAME).iterdir()}
    assert versions[-1] in kept
    assert len(kept) == 4


def test_one_image_answers_as_it_does_in_a_batch(model: LoadedModel):
    images = tiny_images(5, seed=3)
    batch = model.predict_batch(images)
    one = model.predict(images[4])
    assert (one.probabilities.shape, one.features.shape, one.uae.shape, one.cam.shape) == ((3,), (5,), (4,), (8, 8))
    np.testing.assert_allclose(one.probabilities, batch.probabilities[4], atol=1e-6)
    np.testing.assert_allclose(one.cam, batch.cam[4], atol=1e-5)


def test_explains_the_class_that_is_asked_for(model: LoadedModel):
    image = tiny_images(1, seed=4)[0]
    predicted = int(model.predict(image).probabilities.argmax())
    np.testing.assert_allclose(model.predict(image, predicted).cam, model.predict(image).cam, atol=1e-6)
    other = model.predict(image, (predicted + 1) % 3)
    assert np.abs(other.cam - model.predict(image).cam).max() > 0.01
    np.testing.assert_allclose(other.probabilities, model.predict(image).probabilities, atol=1e-6)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 16, 3), np.uint8),
        np.zeros((16, 16), np.uint8),
        np.zeros((16, 16, 4), np.uint8),
        np.zeros((16, 16, 3), np.float32),
    ],
)
def test_refuses_another_shape_or_dtype(model: LoadedModel, image: np.ndarray):
    with pytest.raises(ValueError, match=r"Expected \(N, 16, 16, 3\) uint8"):
        model.predict(image)


@pytest.mark.parametrize("class_index", [-2, 3])
def test_refuses_a_class_that_is_not_there(model: LoadedModel, class_index: int):
    with pytest.raises(ValueError, match="from 0 to 2"):
        model.predict(tiny_images(1)[0], class_index)


def test_many_threads_get_the_answers_of_one(model: LoadedModel):
    images = tiny_images(8, seed=5)
    expected = [model.predict(image).probabilities for image in images]
    wrong: list[int] = []

    def ask(start: int) -> None:
        for step in range(40):
            index = (start + step) % len(images)
            if not np.allclose(model.predict(images[index]).probabilities, expected[index], atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong


def test_unknown_version_lists_the_published_ones(tmp_path: Path, tiny_export: TinyExport, cache: Path):
    storage = CentralStorage(tmp_path / "storage")
    published = publish_tiny(storage, tiny_export).version
    with pytest.raises(BundleNotFoundError, match=published):
        load_bundle(storage, MODEL_NAME, new_version(), cache=cache)


@pytest.mark.parametrize("damaged", ["golden.npz", "model.onnx"])
def test_refuses_a_changed_file(tmp_path: Path, tiny_export: TinyExport, cache: Path, damaged: str):
    storage = CentralStorage(tmp_path / "storage")
    version = publish_tiny(storage, tiny_export).version
    path = tmp_path / "storage" / "models" / MODEL_NAME / version / damaged
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptBundleError, match=damaged):
        load_bundle(storage, MODEL_NAME, version, cache=cache)


def test_refuses_a_model_whose_file_was_broken_before_it_was_published(tmp_path: Path, tiny_export: TinyExport):
    folder = shutil.copytree(tiny_export.folder, tmp_path / "copy")
    (folder / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(CorruptBundleError, match="ONNX"):
        load_folder(folder, tiny_metadata())


def test_refuses_a_model_that_answers_otherwise_than_at_export(
    tmp_path: Path, tiny_export: TinyExport, other_export: TinyExport
):
    folder = shutil.copytree(other_export.folder, tmp_path / "copy")
    shutil.copyfile(tiny_export.folder / "golden.npz", folder / "golden.npz")
    with pytest.raises(CorruptBundleError) as caught:
        load_folder(folder, tiny_metadata())
    assert "probabilities off by" in str(caught.value)
    assert "uae off by" in str(caught.value)


@pytest.mark.parametrize(("output", "step", "allowed"), [("probabilities", 2e-4, "0.0001"), ("cam", 2e-3, "0.001")])
def test_self_test_has_the_stated_tolerance(
    tmp_path: Path, tiny_export: TinyExport, output: str, step: float, allowed: str
):
    with np.load(tiny_export.folder / "golden.npz") as golden:
        answers = golden[output]
    within = changed_golden(tiny_export.folder, tmp_path / "within", **{output: answers + np.float32(step / 4)})
    load_folder(within, tiny_metadata())
    beyond = changed_golden(tiny_export.folder, tmp_path / "beyond", **{output: answers + np.float32(step)})
    with pytest.raises(CorruptBundleError, match=f"{output} off by .*allowed {allowed}"):
        load_folder(beyond, tiny_metadata())


def test_golden_answers_that_are_not_numbers_do_not_pass(tmp_path: Path, tiny_export: TinyExport):
    folder = changed_golden(tiny_export.folder, tmp_path / "nan", features=np.full((4, 5), np.nan, np.float32))
    with pytest.raises(CorruptBundleError, match="features"):
        load_folder(folder, tiny_metadata())


def test_metadata_that_do_not_fit_the_model_are_refused(tiny_export: TinyExport):
    with pytest.raises(CorruptBundleError, match="uae of shape"):
        load_folder(tiny_export.folder, tiny_metadata(uae_dims=9))
    with pytest.raises(CorruptBundleError, match="golden images"):
        load_folder(tiny_export.folder, tiny_metadata(image_size=(8, 8), preprocessing_hash=preprocessing_hash((8, 8))))


def test_a_model_of_the_former_preprocessing_is_served_with_its_pixels(tiny_export: TinyExport):
    former = tiny_metadata(preprocessing_hash=preprocessing_hash(IMAGE_SIZE, Preprocessing(version=2)))
    drawing = Image.new("LA", (IMAGE_SIZE[1], IMAGE_SIZE[0]), (0, 0))  # Black, and transparent: white for a browser.
    stream = io.BytesIO()
    drawing.save(stream, "PNG")
    seen = {}
    for name, metadata in (("former", former), ("latest", tiny_metadata())):
        model = load_folder(tiny_export.folder, metadata)
        predicted = predict_upload(model, stream.getvalue(), max_pixels=10_000)
        seen[name] = int(predicted.image.min()), int(predicted.image.max())
        expected = model.predict(np.full((*IMAGE_SIZE, 3), seen[name][0], dtype=np.uint8))
        np.testing.assert_array_equal(predicted.prediction.probabilities, expected.probabilities)
    assert seen == {"former": (0, 0), "latest": (255, 255)}


def test_a_model_is_served_with_the_framing_that_it_was_trained_on(tiny_export: TinyExport):
    height, width = IMAGE_SIZE
    wide = np.random.default_rng(0).integers(0, 255, (height, 2 * width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(wide).save(stream, "PNG")
    cropped = tiny_metadata(preprocessing_hash=preprocessing_hash(IMAGE_SIZE, Preprocessing(framing="crop")))
    model = load_folder(tiny_export.folder, cropped)
    predicted = predict_upload(model, stream.getvalue(), max_pixels=10_000)
    expected = model.predict(np.ascontiguousarray(wide[:, width // 2 : width // 2 + width]))
    np.testing.assert_array_equal(predicted.prediction.probabilities, expected.probabilities)
    # The map is one of the whole upload: what was cut off had no part in the answer.
    columns = predicted.prediction.cam.shape[1]
    assert columns == 2 * expected.cam.shape[1]
    assert not predicted.prediction.cam[:, : columns // 4].any()


@pytest.mark.parametrize(("suffix", "channels"), [(".png", 1), (".png", 3), (".tiff", 1), (".tiff", 3)])
def test_a_model_is_served_with_the_bits_that_its_pack_was_made_with(
    tiny_export: TinyExport, tmp_path: Path, suffix: str, channels: int
):
    height, width = IMAGE_SIZE
    deep = np.random.default_rng(0).integers(0, 4096, (3 * height, 2 * width, channels), dtype=np.uint16)
    encoded, data = cv2.imencode(suffix, deep)
    assert encoded
    config = ModelConfig.model_validate(
        {
            "model_name": "tiny",
            "classes": ["a", "b"],
            "input_size": {"h": height, "w": width},
            "resize": "pad",
            "sample_bits": 12,
        }
    )
    form = pack_forms(config)["test"]
    packed = packed_pixels(data.tobytes(), form)
    by_hand = cv2.imencode(".png", (deep >> 4).astype(np.uint8))[1].tobytes()
    np.testing.assert_array_equal(packed, preprocess(by_hand, IMAGE_SIZE, preprocessing=Preprocessing(framing="pad")))

    model = load_folder(tiny_export.folder, tiny_metadata(preprocessing_hash=form.preprocessing_hash))
    predicted = predict_upload(model, data.tobytes(), max_pixels=10_000)
    np.testing.assert_array_equal(resize(predicted.image, IMAGE_SIZE, framing="pad"), packed)
    np.testing.assert_array_equal(predicted.prediction.probabilities, model.predict(packed).probabilities)
    assert predicted.properties == pytest.approx(image_properties(packed))
    without = load_folder(tiny_export.folder, tiny_metadata())
    assert predict_upload(without, data.tobytes(), max_pixels=10_000).image.max() == 15


def test_refuses_a_model_of_another_preprocessing(tiny_export: TinyExport):
    with pytest.raises(CorruptBundleError, match=r"version 2 or 3 of the preprocessing.*Train it again"):
        load_folder(tiny_export.folder, tiny_metadata(preprocessing_hash="0" * 16))


def test_refuses_a_model_that_is_not_exported_for_its_runtime(tiny_export: TinyExport, tensorflow_export: TinyExport):
    with pytest.raises(CorruptBundleError, match=r"model\.onnx"):
        load_folder(tensorflow_export.folder, tiny_metadata(runtime="onnx"))
    with pytest.raises(CorruptBundleError, match="SavedModel"):
        load_folder(tiny_export.folder, tiny_metadata(runtime="tensorflow"))


def test_names_the_runtime_that_is_not_installed(tensorflow_export: TinyExport, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # What an import finds then is ImportError.
    with pytest.raises(CorruptBundleError, match=r"runtime tensorflow needs.*own Bento"):
        load_folder(tensorflow_export.folder, tiny_metadata(runtime="tensorflow"))


def test_an_onnx_model_is_loaded_and_asked_without_tensorflow(tiny_export: TinyExport):
    code = (
        "import sys, pathlib, numpy as np\n"
        "from cv_platform.serving.model.runtime import load_folder\n"
        "from cv_platform_tests.support.tiny_models import tiny_images, tiny_metadata\n"
        "load_folder(pathlib.Path(sys.argv[1]), tiny_metadata(), threads=1).predict(tiny_images(1)[0])\n"
        "assert not {'tensorflow', 'keras', 'onnx', 'tf2onnx', 'pandas'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_export.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_serving_modules_loads_no_framework():
    code = (
        "import sys, cv_platform.serving.model.holder, cv_platform.serving.model.promotion\n"
        "import cv_platform.deployment.rollout, cv_platform.deployment.export\n"
        "import cv_platform.serving.model.runtime_tensorflow\n"
        "frameworks = {'tensorflow', 'keras', 'onnx', 'onnxruntime', 'tf2onnx', 'bentoml', 'dagster', 'mlflow'}\n"
        "assert not frameworks & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
