"""Tiny exported models, real ones, for tests that load bundles: 16×16 pixels, three classes, untrained and seeded."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cv_platform.images import preprocessing_hash
from cv_platform.storage import BundleMetadata, CentralStorage, new_version

MODEL_NAME = "tiny"
CLASS_NAMES = ("cat", "dog", "owl")
IMAGE_SIZE = (16, 16)


@dataclass(frozen=True)
class TinyExport:
    """The files of one exported model; `folder` holds what a bundle holds, `runtime` runs it."""

    folder: Path
    keras_path: Path
    uae_path: Path
    images: np.ndarray
    runtime: Literal["onnx", "tensorflow"]


def tiny_images(count: int, *, seed: int = 0) -> np.ndarray:
    """Returns `(count, 16, 16, 3)` uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *IMAGE_SIZE, 3), dtype=np.uint8)


def build_classifier(*, seed: int, activation: str = "softmax", sharpness: float = 1.0) -> Any:
    """Builds a classifier of the shape that training makes; `sharpness` scales its logits."""
    import keras

    keras.utils.set_random_seed(seed)
    inputs = keras.Input((*IMAGE_SIZE, 3), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = keras.layers.Conv2D(6, 3, activation="relu", padding="same")(x)
    x = keras.layers.MaxPooling2D()(x)
    side = keras.layers.Conv2D(8, 3, padding="same")(x)
    side = keras.layers.BatchNormalization()(side)
    x = keras.layers.Add()([keras.layers.Conv2D(8, 1)(x), side])
    x = keras.layers.ReLU(name="feature_map")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    # tanh: an untrained relu may leave one feature alive, whose map is the same for every class.
    x = keras.layers.Dense(5, activation="tanh", name="features")(x)
    x = keras.layers.Dropout(0.3)(x)
    head: Any = keras.layers.Dense(len(CLASS_NAMES), activation=activation, name="probabilities", dtype="float32")
    model = keras.Model(inputs, head(x))
    head.kernel.assign(head.kernel * sharpness)
    return model


def build_encoder(*, seed: int) -> Any:
    """Builds an encoder with four dimensions."""
    import keras

    keras.utils.set_random_seed(seed)
    inputs = keras.Input((*IMAGE_SIZE, 3), dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(4, 3, strides=2, activation="relu")(x)
    return keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Flatten()(x)))


def export_tiny(
    directory: Path, *, seed: int, golden: int = 4, runtime: Literal["onnx", "tensorflow"] = "onnx"
) -> TinyExport:
    """Puts an exported model into `directory`, which is made; each is built once in a process."""
    made = _exported(seed, golden, runtime)
    shutil.copytree(made.folder, directory)
    keras_path, uae_path = (directory / path.name for path in (made.keras_path, made.uae_path))
    return TinyExport(directory, keras_path, uae_path, made.images.copy(), made.runtime)


@functools.cache
def _exported(seed: int, golden: int, runtime: Literal["onnx", "tensorflow"]) -> TinyExport:
    from cv_platform.deployment.export import export_bundle

    directory = Path(tempfile.mkdtemp(prefix="cv-tiny-"))
    atexit.register(shutil.rmtree, directory)
    keras_path, uae_path = directory / f"{MODEL_NAME}.keras", directory / f"{MODEL_NAME}_uae.keras"
    build_classifier(seed=seed).save(keras_path)
    build_encoder(seed=seed + 1).save(uae_path)
    images = tiny_images(golden, seed=seed)
    exported = export_bundle(keras_path, uae_path, directory, golden_images=images, runtime=runtime)
    return TinyExport(directory, keras_path, uae_path, images, exported.runtime)


def tiny_metadata(version: str | None = None, **changes: Any) -> BundleMetadata:
    """Returns metadata that fit `export_tiny`."""
    values: dict[str, Any] = {
        "model_name": MODEL_NAME,
        "version": version or new_version(),
        "created_utc": datetime.now(UTC),
        "runtime": "onnx",
        "classifier_type": "multi-class",
        "class_names": CLASS_NAMES,
        "image_size": IMAGE_SIZE,
        "uae_dims": 4,
        "feature_dims": 5,
        "preprocessing_hash": preprocessing_hash(IMAGE_SIZE),
        "encoder_hash": "0123456789abcdef",
        "ds_name": "tiny",
        "dvc_tag": "v1.0.0",
        "dvc_md5": "d41d8cd98f00b204e9800998ecf8427e.dir",
    }
    return BundleMetadata(**{**values, **changes})


def publish_tiny(
    storage: CentralStorage, export: TinyExport, version: str | None = None, **changes: Any
) -> BundleMetadata:
    """Publishes an exported model under a version of its own."""
    return storage.publish_bundle(export.folder, tiny_metadata(version, runtime=export.runtime, **changes))
