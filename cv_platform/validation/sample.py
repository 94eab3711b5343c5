"""The pixels that validation looks at: a seeded, bounded sample of the readable images, decoded once for all checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cv_platform.datasets.quarantine import used
from cv_platform.errors import ImageError
from cv_platform.images import MAX_LOCAL_PIXELS, Preprocessing, preprocess, resize
from cv_platform.properties import batch_properties

PROBE_SIZE = (32, 32)
"""(height, width) in pixels: enough for the pixel statistics, small enough to hold a sample in memory (37 MB)."""
COMPONENT_SIZE = (16, 16)
COMPONENTS = 32
MAX_IMAGES_PER_SPLIT = 3_000
"""Four splits of photos decode in about 15 s, and a distance between two splits has a standard error below 0.02."""


@dataclass(frozen=True)
class ImageSample:
    """Decoded images with what the checks need of them; all arrays and `rows` have the same order.

    Attributes:
        rows: the sampled rows of the manifest, index 0…N-1.
        images: `(N, 32, 32, 3)` uint8, RGB.
        properties: `(N, 7)` float32, `cv_platform.properties.PROPERTY_NAMES`.
        components: `(N, K)` float32, K ≤ 32: principal components of the pixels, largest variance first.
        problems: path → why an image that the manifest calls readable does not decode.
        readable: how many images the sample was taken from.
        embeddings: `(N, features)` float16, of the pretrained encoder.
    """

    rows: pd.DataFrame
    images: np.ndarray
    properties: np.ndarray
    components: np.ndarray
    problems: Mapping[str, str]
    readable: int
    embeddings: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float16))

    @property
    def description(self) -> str:
        """Says of how many images the sample consists."""
        if len(self.rows) == self.readable:
            return f"all {self.readable} images"
        return f"a seeded sample of {len(self.rows)} of {self.readable} images"

    def positions(self, split: str) -> np.ndarray:
        """Returns the positions of a split's images."""
        return np.flatnonzero(self.rows["split"].to_numpy() == split)


def read_sample(
    manifest: pd.DataFrame,
    directory: Path,
    embeddings: np.ndarray,
    *,
    sample_bits: int | None = None,
    max_per_split: int = MAX_IMAGES_PER_SPLIT,
    seed: int = 0,
) -> ImageSample:
    """Decodes up to `max_per_split` images of each split, of those that are used.

    An image that fails to decode is a finding (`problems`), not an error.

    Args:
        manifest: columns path, sha256, split, labels, status.
        directory: what the manifest's paths are relative to.
        embeddings: `(N, features)`, of the manifest's rows.
        sample_bits: by which they are decoded, see `Preprocessing`.
        max_per_split: the largest number of images per split; more are subsampled with `seed`.
        seed: of the subsample.
    """
    manifest = manifest.reset_index(drop=True)
    readable = used(manifest).sort_values("path", kind="stable")
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for _, rows in readable.groupby("split", sort=True):
        labels = rows.index.to_numpy()
        taken = len(labels) <= max_per_split
        chosen.extend(labels if taken else np.sort(generator.choice(labels, max_per_split, replace=False)))
    images: list[np.ndarray] = []
    kept: list[int] = []
    problems: dict[str, str] = {}
    made = Preprocessing(sample_bits=sample_bits)
    for label in chosen:
        path = str(readable.at[label, "path"])
        try:
            data = (directory / path).read_bytes()
            images.append(preprocess(data, PROBE_SIZE, max_pixels=MAX_LOCAL_PIXELS, preprocessing=made))
            kept.append(label)
        except (ImageError, OSError) as err:
            problems[path] = str(err)
    stack = np.stack(images) if images else np.empty((0, *PROBE_SIZE, 3), dtype=np.uint8)
    return ImageSample(
        rows=readable.loc[kept].reset_index(drop=True),
        images=stack,
        properties=batch_properties(stack),
        components=principal_components(stack),
        problems=problems,
        readable=len(readable) - len(problems),
        embeddings=embeddings[kept],
    )


def principal_components(images: np.ndarray, count: int = COMPONENTS) -> np.ndarray:
    """Projects images on their leading principal components.

    Args:
        images: `(N, H, W, 3)` uint8.
        count: the largest number of components.

    Returns:
        `(N, K)` float32 with K ≤ `count`, scaled so that pixels were 0–1; the sign of a component is chosen so that its
        largest loading is positive, which makes the result reproducible.
    """
    if len(images) < 2:
        return np.zeros((len(images), 1), dtype=np.float32)
    small = np.stack([resize(image, COMPONENT_SIZE) for image in images])
    pixels = small.reshape(len(small), -1).astype(np.float32) / 255.0
    pixels -= pixels.mean(axis=0)
    _, vectors = np.linalg.eigh((pixels.T @ pixels).astype(np.float64))
    leading = vectors[:, ::-1][:, : min(count, len(images) - 1)]
    signs = np.sign(leading[np.abs(leading).argmax(axis=0), np.arange(leading.shape[1])])
    return (pixels @ (leading * signs).astype(np.float32)).astype(np.float32)
