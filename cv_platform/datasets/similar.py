"""Which images of a dataset version look most like a given one, by what the pretrained encoder sees in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from cv_platform.config import EncoderConfig
from cv_platform.datasets.embeddings import embed_dataset
from cv_platform.datasets.manifest import read_manifest
from cv_platform.encoders.encoder import open_encoder
from cv_platform.errors import InvalidDatasetError
from cv_platform.images import MAX_LOCAL_PIXELS
from cv_platform.predictions import label_text
from cv_platform.records import DatasetVersion


@dataclass(frozen=True)
class SimilarImage:
    """An image of the dataset, and the cosine of its vector with the asked one's: −1 to 1, 1 for the same."""

    path: str
    split: str
    label: str
    similarity: float


def find_similar(
    image: Path, version: DatasetVersion, encoder: EncoderConfig, *, home: Path, count: int = 10
) -> list[SimilarImage]:
    """Returns the `count` images of a version that are most similar to a file, the most similar first.

    Exact: every vector is compared, a row group at a time. The version's vectors are computed where they are not kept.

    Raises:
        InvalidDatasetError: the file cannot be read.
        ImageError: it is no image.
        EncoderError: the encoder cannot be used.
    """
    opened = open_encoder(encoder, home, version.sample_bits)
    try:
        pixels = opened.pixels(image.read_bytes(), max_pixels=MAX_LOCAL_PIXELS)
    except OSError as err:
        raise InvalidDatasetError(f"Expected an image at {image}. Received: {err.strerror}. Correct the path.") from err
    asked = opened.embed(pixels[np.newaxis])[0]
    asked /= max(float(np.linalg.norm(asked)), 1e-12)
    found: list[tuple[float, str]] = []
    with pq.ParquetFile(embed_dataset(version, encoder, home=home).path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["path", "vector"])
            vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
            vectors = vectors.astype(np.float32)
            cosines = vectors @ asked / np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
            nearest = np.argsort(-cosines, kind="stable")[:count]
            paths = table["path"].take(nearest).to_pylist()
            found = sorted([*found, *zip(map(float, -cosines[nearest]), paths, strict=True)])[:count]
    rows = read_manifest(version.manifest_path).set_index("path")
    text = {path: label_text(rows.at[path, "labels"], rows.at[path, "unknown_labels"]) for _, path in found}
    return [SimilarImage(path, str(rows.at[path, "split"]), text[path], -negative) for negative, path in found]
