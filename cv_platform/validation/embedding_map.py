"""A page with a map of a dataset version: what looks alike lies close together. One file, which needs no server.

The map is scikit-learn's t-SNE (van der Maaten and Hinton 2008) of the encoder's vectors: distances within a cloud mean
something, those between clouds little. https://scikit-learn.org/stable/modules/manifold.html#t-sne
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cv_platform.datasets.embeddings import read_embeddings
from cv_platform.datasets.manifest import read_manifest
from cv_platform.errors import DatasetError
from cv_platform.files import write_file
from cv_platform.pages import render, sealed, thumbnail
from cv_platform.predictions import label_text
from cv_platform.records import DatasetVersion, Embeddings

MOST_IMAGES = 3_000
"""A seeded sample of larger versions: the page stays at about 10 MB, and t-SNE at half a minute of one core."""
_THUMBNAIL_PX = 64
_COMPONENTS = 50
_REMARKS = ("damage", "constant", "narrow_range", "clipped")
_FEWEST = 5


def write_embedding_map(version: DatasetVersion, embeddings: Embeddings, target: Path, *, seed: int = 0) -> int:
    """Writes the page to `target`, and returns how many images are on it.

    Raises:
        DatasetError: there are too few images, or the embeddings are of another version.
    """
    manifest = read_manifest(version.manifest_path)
    vectors = read_embeddings(embeddings, version.manifest, manifest["path"].tolist())
    chosen = np.flatnonzero(~np.isnan(vectors[:, 0]))
    if len(chosen) < _FEWEST:
        raise DatasetError(f"Expected at least {_FEWEST} readable images for a map. Received: {len(chosen)}. Add some.")
    total = len(chosen)
    if total > MOST_IMAGES:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, MOST_IMAGES, replace=False))
    places = project(vectors[chosen].astype(np.float32), seed=seed)
    points = [
        {
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "path": str(row.path),
            "file": (version.directory / str(row.path)).as_uri(),
            "class": label_text(row.labels, row.unknown_labels),
            "split": str(row.split),
            "status": next((name.replace("_", " ") for name in _REMARKS if pd.notna(getattr(row, name))), "no remark"),
            "picture": thumbnail(version.directory / str(row.path), _THUMBNAIL_PX, version.sample_bits),
        }
        for (x, y), row in zip(places, manifest.iloc[chosen].itertuples(), strict=True)
    ]
    page = render(
        "validation/embedding_map.html",
        title=f"Map of {version.provenance}",
        points=points,
        shown=f"{len(points)} of {total} readable images",
    )
    write_file(target, sealed(page))
    return len(points)


def project(vectors: NDArray[np.float32], *, seed: int = 0) -> NDArray[np.float32]:
    """Returns `(N, 2)` float32 places of 0 to 1 for `(N, D)` vectors, N ≥ 5."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    components = min(_COMPONENTS, *vectors.shape)
    reduced = PCA(components, svd_solver="full", random_state=seed).fit_transform(vectors - vectors.mean(axis=0))
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    places = TSNE(2, perplexity=perplexity, init="random", random_state=seed).fit_transform(reduced)
    low, high = places.min(axis=0), places.max(axis=0)
    return np.asarray((places - low) / np.maximum(high - low, 1e-9), dtype=np.float32)
