"""From a published bundle to a model that answers: fetch, verify, load, warm up, self-test.

This module knows no framework. A bundle's metadata name its runtime: `runtime_onnx`, or `runtime_tensorflow`, the only
module of the service that imports TensorFlow; each imports its framework late. Swapping versions while serving is
`holder`'s part.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import shutil
import socket
import zipfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cv_platform.errors import BundleNotFoundError, CorruptBundleError, StorageError
from cv_platform.images import KNOWN_VERSIONS, find_preprocessing
from cv_platform.predictions import decide
from cv_platform.serving.model.unknown import UNKNOWN, UnknownRule, load_rule
from cv_platform.settings import home_here
from cv_platform.storage import MODEL_PATHS, BundleMetadata, CentralStorage

logger = logging.getLogger(__name__)

GOLDEN = "golden.npz"
"""Golden images and what the model answered to them when it was exported."""
PREDICTED_CLASS = -1
"""As `class_index`: explain the class that the model predicts."""
_KEPT_DOWNLOADS = 4
_OUTPUTS = ("probabilities", "features", "uae", "cam")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says about one image (or, with a leading axis N, about a batch). All arrays are float32.

    Attributes:
        probabilities: `(C,)`, 0–1, in the order of the metadata's `class_names`.
        features: `(F,)`, the penultimate layer.
        uae: `(D,)`, the untrained encoder's embedding.
        cam: `(h, w)`, 0–1: Grad-CAM at the last feature map's resolution; all zero where nothing speaks for the class
            by more than rounding does.
    """

    probabilities: NDArray[np.float32]
    features: NDArray[np.float32]
    uae: NDArray[np.float32]
    cam: NDArray[np.float32]


class Runtime(Protocol):
    """One exported model in some framework; safe to call from many threads."""

    def __call__(self, images: NDArray[np.uint8], class_index: NDArray[np.int32]) -> Prediction:
        """Answers `(N, H, W, 3)` uint8 RGB images, explaining the classes `(N,)` int32, in one combined call."""
        ...


class LoadedModel:
    """A verified model, warm and ready; safe to call from many threads.

    Attributes:
        metadata: the bundle's.
        unknown: tells images that show nothing it has learned; None where its bundle carries no rule.
        preprocessing: what makes the pixels that it was trained on; uploads are decoded and framed by it.

    Raises:
        CorruptBundleError: it was trained on a preprocessing that this installation does not know.
    """

    def __init__(self, metadata: BundleMetadata, runtime: Runtime, unknown: UnknownRule | None = None) -> None:
        preprocessing = find_preprocessing(metadata.preprocessing_hash, metadata.image_size)
        if preprocessing is None:
            known = " or ".join(map(str, KNOWN_VERSIONS))
            raise CorruptBundleError(
                f"{metadata.model_name} {metadata.version}: expected a model trained on version {known} of the "
                f"preprocessing. Received: preprocessing {metadata.preprocessing_hash}, another release. "
                "Train it again, or serve it with the release that trained it."
            )
        self.metadata = metadata
        self.preprocessing = preprocessing
        self.unknown = unknown
        self._runtime = runtime

    def predict(self, image: NDArray[np.uint8], class_index: int = PREDICTED_CLASS) -> Prediction:
        """Answers one image.

        Args:
            image: `(H, W, 3)` uint8 RGB in the metadata's `image_size`, as `images.preprocess` makes it.
            class_index: the class that the map explains; −1 is the predicted one.

        Raises:
            ValueError: another shape or dtype, or no such class.
        """
        asked = None if class_index == PREDICTED_CLASS else np.array([class_index], dtype=np.int32)
        batch = self.predict_batch(image[np.newaxis], asked)
        return Prediction(batch.probabilities[0], batch.features[0], batch.uae[0], batch.cam[0])

    def predict_batch(self, images: NDArray[np.uint8], class_index: NDArray[np.int32] | None = None) -> Prediction:
        """Answers `(N, H, W, 3)` uint8 RGB images; `class_index` is `(N,)` int32, by default the predicted classes.

        Raises:
            ValueError: another shape or dtype, or no such class.
        """
        height, width = self.metadata.image_size
        if images.ndim != 4 or images.shape[1:] != (height, width, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"Expected (N, {height}, {width}, 3) uint8 RGB images. Received: {images.dtype} {images.shape}."
            )
        if class_index is None:
            return self._runtime(images, np.full(len(images), PREDICTED_CLASS, dtype=np.int32))
        classes = len(self.metadata.class_names)
        if class_index.shape != images.shape[:1] or ((class_index < PREDICTED_CLASS) | (class_index >= classes)).any():
            raise ValueError(
                f"Expected a class from 0 to {classes - 1} for each image, or −1. Received: {class_index.tolist()}."
            )
        return self._runtime(images, class_index.astype(np.int32, copy=False))


def predicted_classes(probabilities: NDArray[np.float32], metadata: BundleMetadata) -> tuple[str, ...]:
    """Returns the most probable class, or for multi-label every class from the threshold on, in class order."""
    if metadata.classifier_type == "multi-label":
        decisions = decide(probabilities, metadata.threshold)
        return tuple(name for name, chosen in zip(metadata.class_names, decisions, strict=True) if chosen)
    return (metadata.class_names[int(probabilities.argmax())],)


def load_bundle(
    storage: CentralStorage, model_name: str, version: str, *, cache: Path, threads: int | None = None
) -> LoadedModel:
    """Fetches a bundle, verifies its checksums, loads it, warms it up and lets it pass its self-test.

    Args:
        storage: where the bundle was published.
        model_name: the model.
        version: its version.
        cache: folder for downloads; local storage is read in place.
        threads: threads of one model call (with TensorFlow only the first model of a process can choose). None: the
            framework's default.

    Raises:
        BundleNotFoundError: there is no such version.
        CorruptBundleError: a checksum, the model or its self-test does not hold.
        StorageError: the storage cannot be reached.
    """
    folder, metadata = fetch(storage, model_name, version, cache=cache)
    return load_folder(folder, metadata, threads=threads)


def fetch(storage: CentralStorage, model_name: str, version: str, *, cache: Path) -> tuple[Path, BundleMetadata]:
    """Returns a bundle's local folder, checksums verified, and its metadata; workers of one host take turns.

    Downloads of older versions are dropped, the last few are kept for a rollback.

    Raises:
        BundleNotFoundError, CorruptBundleError, StorageError: see `load_bundle`.
    """
    if storage.is_local:
        return storage.fetch_bundle(model_name, version, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache, exclusive=True):
            fetched = storage.fetch_bundle(model_name, version, cache)
            complete = sorted(cache.glob("*/*/.complete"), key=lambda mark: mark.stat().st_mtime, reverse=True)
            for mark in complete[_KEPT_DOWNLOADS:]:
                if mark.parent != fetched[0]:
                    shutil.rmtree(mark.parent, ignore_errors=True)
            return fetched
    except OSError as err:
        raise StorageError(f"Cannot keep downloads in {cache}: {err}. Check its rights and the free space.") from err


@dataclass(frozen=True)
class PublishedModel:
    """A bundle by where it was published: what a shard names, and each process loads once, with one thread.

    Attributes:
        storage_url: of central storage.
        model_name, version: of the bundle.
        home: of the installation, see `settings.home_here`.
        cache: folder below it for downloads.
    """

    storage_url: str
    model_name: str
    version: str
    home: Path
    cache: str = "cache/bundles"

    def load(self) -> LoadedModel:
        """Returns it, warm.

        Raises:
            BundleNotFoundError, CorruptBundleError, StorageError: see `load_bundle`.
        """
        return _loaded(self)


@functools.lru_cache(maxsize=2)
def _loaded(model: PublishedModel) -> LoadedModel:
    storage, cache = CentralStorage(model.storage_url), home_here(model.home) / model.cache
    try:
        return load_bundle(storage, model.model_name, model.version, cache=cache, threads=1)
    except BundleNotFoundError as err:
        if storage.has_anything():
            raise
        raise StorageError(
            f"Expected {model.model_name} {model.version} in {model.storage_url}. Received: nothing, as "
            f"{socket.gethostname()} sees it. Mount it, if it is away. Each machine that works on shards has to see "
            "it: name a folder that all of them share, or a URL such as s3://bucket/prefix, as CV_STORAGE."
        ) from err


@contextmanager
def locked(directory: Path, *, exclusive: bool) -> Generator[None, None, None]:
    """Keeps the workers of one host apart in `directory`: one that writes, or any that read.

    Raises:
        OSError: an exclusive lock in a folder that cannot be written. Readers need none there.
    """
    try:
        lock = (directory / ".lock").open("a")
    except OSError:
        if exclusive:
            raise
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


def load_folder(folder: Path, metadata: BundleMetadata, *, threads: int | None = None) -> LoadedModel:
    """Loads a bundle's files, warms the model up and lets it pass its self-test; checksums are the caller's part.

    Raises:
        CorruptBundleError: the files are no model of this metadata, or it answers otherwise than when it was exported.
    """
    name = f"{metadata.model_name} {metadata.version}"
    golden = _read_golden(folder / GOLDEN, name)
    rule = load_rule(folder / UNKNOWN, feature_dims=metadata.feature_dims, classes=len(metadata.class_names))
    model = LoadedModel(metadata, _open_runtime(folder / MODEL_PATHS[metadata.runtime], metadata, threads), rule)
    try:
        model.predict(golden["images"][0])  # Warm: the first call allocates and traces nothing afterwards.
        answer = model.predict_batch(golden["images"], golden["class_index"])
    except (ValueError, ArithmeticError) as err:
        raise CorruptBundleError(f"{name}: expected a model that takes its golden images. Received: {err}") from err
    _self_test(answer, golden, metadata, name)
    logger.info("%s is loaded and passed its self-test on %d images", name, len(golden["images"]))
    return model


def _open_runtime(path: Path, metadata: BundleMetadata, threads: int | None) -> Runtime:
    try:
        if metadata.runtime == "onnx":
            from cv_platform.serving.model.runtime_onnx import OnnxRuntime

            return OnnxRuntime(path, threads=threads)
        from cv_platform.serving.model.runtime_tensorflow import TensorFlowRuntime

        return TensorFlowRuntime(path, threads=threads)
    except ImportError as err:
        raise CorruptBundleError(
            f"{metadata.model_name} {metadata.version}: expected what its runtime {metadata.runtime} needs. Received: "
            f"{err}. Serve it by its own Bento, whose requirements hold it, or export it with another deploy.runtime."
        ) from err


def _read_golden(path: Path, name: str) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            golden = {key: archive[key] for key in ("images", "class_index", "tolerance", *_OUTPUTS)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
        raise CorruptBundleError(
            f"{name}: expected golden images in {path.name}. Received: {err}. Export it again."
        ) from err
    if not len(golden["images"]):
        raise CorruptBundleError(f"{name}: expected golden images. Received: none. Export it again.")
    return golden


def _self_test(answer: Prediction, golden: dict[str, NDArray[Any]], metadata: BundleMetadata, name: str) -> None:
    """Compares the answers with those at export.

    `tolerance` holds (probabilities, cam): 1e-4 and 1e-3, wider for a model that computes in 16 bits. Maps are compared
    by their mean difference: another CPU rounds otherwise, which may flip one cell's gate but never many. Embeddings
    have no fixed range, so theirs is relative to the largest value.
    """
    tolerance, cam_tolerance = (float(t) for t in golden["tolerance"])
    widths = {"probabilities": len(metadata.class_names), "features": metadata.feature_dims, "uae": metadata.uae_dims}
    mistakes: list[str] = []
    for output in _OUTPUTS:
        received: NDArray[np.float32] = getattr(answer, output)
        expected = golden[output]
        if received.shape != expected.shape or (output in widths and received.shape[1] != widths[output]):
            mistakes.append(
                f"{output} of shape {received.shape} instead of {expected.shape} (metadata: {widths.get(output)})"
            )
            continue
        difference = np.abs(received.astype(np.float64) - expected)
        if output == "cam":
            distance, limit = float(difference.mean()), cam_tolerance
        elif output == "probabilities":
            distance, limit = float(difference.max()), tolerance
        else:
            distance, limit = float(difference.max()), 10 * tolerance * max(1.0, float(np.abs(expected).max()))
        if not distance <= limit:  # Not `>`: a NaN fails too.
            mistakes.append(f"{output} off by {distance:.2g}, allowed {limit:.2g}")
    if mistakes:
        raise CorruptBundleError(
            f"{name}: expected the answers of its export to {len(golden['images'])} golden images. "
            f"Received: {'; '.join(mistakes)}. Export the model again."
        )
