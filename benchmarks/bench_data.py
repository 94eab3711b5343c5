"""What is found in a dataset with planted near-copies and exact leaks, and how many honest images are accused.

Copies of random images of `options.archive` are planted: in turn saved again as JPEG, cropped by 2 pixels, mirrored,
brightened, and all of it at once. The search knows no splits, so which of them a copy is in makes no difference to it.
"""

from __future__ import annotations

import tarfile
import tempfile
from collections import Counter
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import Options
from cv_platform.config import EncoderConfig
from cv_platform.errors import DatasetError

NEAR_COPIES = 240
LEAKS = 40
LIBRARIES = ("numpy", "scikit-learn", "onnxruntime", "opencv-python-headless")


def run(options: Options) -> Report:
    """Plants copies among the images of `options.archive`, and looks for them.

    Raises:
        DatasetError: there is no archive.
    """
    from cv_platform.datasets.near_copies import find_near_copies, thumbnail
    from cv_platform.encoders.encoder import open_encoder
    from cv_platform.images import decode, resize

    if options.archive is None:
        raise DatasetError("Expected --archive with a tar of images. Received: none.")
    clock = Stopwatch()
    generator = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory(prefix="cv-bench-data-") as folder:
        with tarfile.open(options.archive) as archive:
            archive.extractall(folder, filter="data")
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
        images = [decode(path.read_bytes()) for path in files]
        planted = _plant(images, generator)
        options.say(f"{len(files)} images, {len(planted)} copies planted; embedding …")
        encoder = open_encoder(EncoderConfig(), Path(folder) / "home")
        side = (encoder.input_px, encoder.input_px)
        vectors = encoder.embed(np.stack([resize(image, side) for image in images]))
    found = find_near_copies(np.stack([thumbnail(image) for image in images]), vectors.astype(np.float16))
    pairs = {(int(a), int(b)) for a, b in found.pairs}
    kinds, hits = Counter(kind for _, _, kind in planted), Counter(k for a, b, k in planted if (a, b) in pairs)
    accused = {at for a, b in pairs for at in (a, b) if b < len(files)}
    near = [kind for kind in kinds if kind != "the same"]
    share = sum(hits[kind] for kind in near) / sum(kinds[kind] for kind in near)
    honest = len(accused) / len(files)
    return Report(
        name="data",
        title="Planted copies that are found, and honest images that are accused",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"images": len(files), "near-copies": NEAR_COPIES, "leaks": LEAKS, "limit": found.limit},
        observations={},
        ratios=[],
        checks=[
            Check(
                what="copies byte for byte",
                expected=f"{LEAKS} found",
                received=f"{hits['the same']}",
                held=hits["the same"] == LEAKS,
            ),
            Check(what="near-copies", expected="≥ 95 % found", received=f"{share:.1%}", held=share >= 0.95),
            Check(what="honest images", expected="≤ 0.5 % accused", received=f"{honest:.2%}", held=honest <= 0.005),
        ],
        notes=[f"{kind}: {hits[kind]} of {kinds[kind]} found" for kind in near],
    )


def _plant(images: list[NDArray[np.uint8]], generator: np.random.Generator) -> list[tuple[int, int, str]]:
    """Appends copies to `images`, and returns `(position, copy's position, kind)`."""
    kinds = {
        "saved again": _jpeg,
        "cropped by 2 px": lambda image: image[2:-2, 2:-2],
        "mirrored": lambda image: image[:, ::-1],
        "brightened by 20 %": lambda image: np.clip(image * 1.2, 0, 255).astype(np.uint8),
        "all of it": lambda image: _jpeg(np.clip(image[2:, 2:][:, ::-1] * 1.1, 0, 255).astype(np.uint8)),
    }
    originals = generator.choice(len(images), NEAR_COPIES + LEAKS, replace=False).tolist()
    wanted = [*islice(cycle(kinds), NEAR_COPIES), *["the same"] * LEAKS]
    planted = []
    for at, kind in zip(originals, wanted, strict=True):
        change = kinds.get(kind, np.array)
        planted.append((at, len(images), kind))
        images.append(np.ascontiguousarray(change(images[at])))
    return planted


def _jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    quality = [cv2.IMWRITE_JPEG_QUALITY, 60]
    encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), quality)[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1], dtype=np.uint8)
