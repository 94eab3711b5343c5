"""Real images as drift detection sees them, as they are and shifted, for `bench_drift`: computed once, then kept.

A small network is trained on half of the training images; all the others are held out. The shifts are those of
`notes/drift.md` and, as another camera would make them, six of Hendrycks and Dietterich's corruptions at severity 2 of
CIFAR-10-C (https://arxiv.org/abs/1903.12261). Turns are made as Rabanser et al. 2019 make them, by Keras's generator
with its default border (https://github.com/steverab/failing-loudly), but for the shear of a fifth of a degree.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.options import Options
from cv_platform.config import DriftDetectionConfig, EncoderConfig, InputSize, ModelConfig
from cv_platform.drift.sample import REPRESENTATIONS, DriftSample

SIDE_PX = 32
SEVERITY_2 = "severity 2: "
_SHIFTED = 1000
"""Images that are shifted; windows are drawn of them."""
_EPOCHS, _BATCH = 12, 64
_VERSION = 2
"""Raise it when other numbers would be computed: kept ones are computed again."""

Pixels = NDArray[np.uint8]
Change = Callable[[Pixels, np.random.Generator], Pixels]


@dataclass(frozen=True)
class Samples:
    """What a set's images look like to the detectors.

    Attributes:
        name: of the set.
        accuracy: of the network on the held-out images.
        held_out: no image of which the network was trained on.
        labels: `(N,)` of those.
        sources: rows of `held_out` that were shifted.
        shifted: of each shift, those images, in that order.
    """

    name: str
    accuracy: float
    held_out: DriftSample
    labels: NDArray[np.int64]
    sources: NDArray[np.int64]
    shifted: dict[str, DriftSample]


def shifts() -> dict[str, Change]:
    """Returns what is done to images of 32 px, by name."""
    return {
        "noise sd 10": _noise(10),
        "noise sd 100": _noise(100),
        "small turn, shift, zoom": _moved(10, 0.05, 0.1, flips=False),
        "medium turn, shift, zoom": _moved(40, 0.2, 0.2, flips=True),
        "channels swapped": lambda image, _: np.ascontiguousarray(image[..., ::-1]),
        "brightness 0.7": lambda image, _: (image * 0.7).astype(np.uint8),
        "JPEG quality 20": _jpeg(20),
        SEVERITY_2 + "noise": _noise(0.06 * 255),
        SEVERITY_2 + "blur": lambda image, _: np.asarray(cv2.GaussianBlur(image, (0, 0), 0.6), np.uint8),
        SEVERITY_2 + "brightness": lambda image, _: np.clip(image + 0.1 * 255, 0, 255).astype(np.uint8),
        SEVERITY_2 + "contrast": lambda image, _: _contrast(image, 0.5),
        SEVERITY_2 + "JPEG": _jpeg(65),
        SEVERITY_2 + "pixelate": lambda image, _: _pixelate(image, 0.9),
    }


def read_samples(options: Options) -> list[Samples]:
    """Returns the digits, and the images of `options.archive` (SPLIT/CLASS/image) where there is one.

    What is computed is kept in `options.home`, or below `options.output`.
    """
    folder = (options.home or options.output) / "drift_samples"
    folder.mkdir(parents=True, exist_ok=True)
    sets: list[tuple[str, Callable[[], tuple[Pixels, NDArray[np.int64]]], bool]] = [("digits", _digits, False)]
    archive = options.archive
    if archive is not None:
        sets.append((archive.name.split(".")[0], lambda: _archived(archive), True))
    found: list[Samples] = []
    for name, read, is_shifted in sets:
        file = folder / f"{name}-{_VERSION}-{options.seed}.npz"
        if not file.exists():
            options.say(f"{name}: training, and computing features …")
            _write(file, *read(), is_shifted=is_shifted, seed=options.seed)
        found.append(_read(name, file))
    return found


def _write(file: Path, images: Pixels, labels: NDArray[np.int64], *, is_shifted: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    trained, held_out = np.split(order, [min(5000, len(order) // 2)])
    with tempfile.TemporaryDirectory(prefix="cv-bench-drift-") as folder:
        look = _network(images[trained], labels[trained], Path(folder), seed)
        whole = look(images[held_out])
        parts = {"held_out": whole}
        if is_shifted:
            sources = rng.permutation(len(held_out))[:_SHIFTED]
            for name, change in shifts().items():
                made = np.stack([change(image, rng) for image in images[held_out[sources]]])
                parts[name] = look(made)
        else:
            sources = np.empty(0, np.int64)
    arrays = {f"{part}/{name}": array for part, found in parts.items() for name, array in found.items()}
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, labels=labels[held_out], sources=sources, **arrays)
    partial.replace(file)


def _read(name: str, file: Path) -> Samples:
    with np.load(file) as kept:
        samples = {
            part: DriftSample(*(kept[f"{part}/{each}"] for each in (*REPRESENTATIONS, "encoded")))
            for part in ("held_out", *shifts())
            if f"{part}/bbsd" in kept
        }
        labels, sources = kept["labels"], kept["sources"]
    held_out = samples.pop("held_out")
    accuracy = float((held_out.bbsd.argmax(axis=1) == labels).mean())
    return Samples(name, accuracy, held_out, labels, sources, samples)


def _network(
    images: Pixels, labels: NDArray[np.int64], folder: Path, seed: int
) -> Callable[[Pixels], dict[str, NDArray[np.float32]]]:
    """Returns what turns images into the matrices of a sample."""
    import keras

    from cv_platform.drift.encoders import build_uae
    from cv_platform.drift.extraction import extract
    from cv_platform.encoders.encoder import open_encoder
    from cv_platform.properties import batch_properties
    from cv_platform.training.network import build_model

    classes = tuple(str(one) for one in range(int(labels.max()) + 1))
    size = InputSize(h=SIDE_PX, w=SIDE_PX)
    network: Any = build_model(ModelConfig(model_name="bench", classes=classes, input_size=size), seed=seed)
    network.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy")
    network.fit(images, labels, batch_size=_BATCH, epochs=_EPOCHS, verbose=0)
    keras_path, uae_path = folder / "network.keras", folder / "uae.keras"
    network.save(keras_path)
    build_uae((SIDE_PX, SIDE_PX), DriftDetectionConfig().uae_encoding_dims, seed).save(uae_path)
    encoder = open_encoder(EncoderConfig(), folder)

    def look(pixels: Pixels) -> dict[str, NDArray[np.float32]]:
        def batches() -> Iterator[Pixels]:
            yield from np.array_split(pixels, max(1, len(pixels) // 250))

        bbsd, features, uae = extract(keras_path, uae_path, batches())
        side = (encoder.input_px, encoder.input_px)
        encoded = np.concatenate(
            [
                encoder.embed(np.stack([cv2.resize(image, side, interpolation=cv2.INTER_LINEAR) for image in batch]))
                for batch in batches()
            ]
        )
        properties = batch_properties(pixels)
        return {"bbsd": bbsd, "features": features, "uae": uae, "properties": properties, "encoded": encoded}

    return look


def _digits() -> tuple[Pixels, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    images = (np.asarray(grey).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [cv2.resize(image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_LINEAR) for image in images]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1), np.asarray(labels, np.int64)


def _archived(archive: Path) -> tuple[Pixels, NDArray[np.int64]]:
    images: list[Pixels] = []
    names: list[str] = []
    with tarfile.open(archive) as opened:
        for member in opened:
            file = opened.extractfile(member) if member.name.endswith((".jpg", ".png")) else None
            if file is None:
                continue
            image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR)
            images.append(cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), (SIDE_PX, SIDE_PX)).astype(np.uint8))
            names.append(Path(member.name).parent.name)
    classes = sorted(set(names))
    return np.stack(images), np.array([classes.index(name) for name in names], np.int64)


def _noise(sd: float) -> Change:
    return lambda image, rng: np.clip(image + rng.normal(0, sd, image.shape), 0, 255).astype(np.uint8)


def _jpeg(quality: int) -> Change:
    def change(image: Pixels, _: np.random.Generator) -> Pixels:
        data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1], dtype=np.uint8)

    return change


def _moved(degrees: float, share: float, zoom: float, *, flips: bool) -> Change:
    def change(image: Pixels, rng: np.random.Generator) -> Pixels:
        side = image.shape[0]
        centre = np.full(2, (side - 1) / 2)
        angle, scales = np.deg2rad(rng.uniform(-degrees, degrees)), rng.uniform(1 - zoom, 1 + zoom, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scales
        moved = centre - turn @ centre + rng.uniform(-share, share, 2) * side
        matrix = np.column_stack([turn, moved])
        made = np.asarray(cv2.warpAffine(image, matrix, (side, side), borderMode=cv2.BORDER_REPLICATE), np.uint8)
        return np.ascontiguousarray(made[:, ::-1]) if flips and rng.random() < 0.5 else made

    return change


def _contrast(image: Pixels, factor: float) -> Pixels:
    mean = image.mean(axis=(0, 1), keepdims=True)
    return np.clip((image - mean) * factor + mean, 0, 255).astype(np.uint8)


def _pixelate(image: Pixels, factor: float) -> Pixels:
    side = image.shape[0]
    small = cv2.resize(image, (round(side * factor),) * 2, interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_NEAREST), np.uint8)
