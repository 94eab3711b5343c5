"""Which scored images are asked about, and how much of a large `scores.parquet` is in memory meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cv_platform.records import BatchScores, ModelIdentity
from cv_platform.scoring.rows import scores_schema
from cv_platform.scoring.unlabelled import UnlabelledImages
from cv_platform_tests.support.tiny_models import tiny_metadata

GROUP = 1000
FEATURES = 256
COUNTED = pa.proxy_memory_pool(pa.default_memory_pool())
"""Lives as long as the process: what was allocated from it may be given back whenever."""


def scored(folder: Path, confidence: np.ndarray, images: list[str], *, group: int = GROUP) -> UnlabelledImages:
    """Writes scores as a scoring does, a batch a row group; an image of which nothing is known has NaN.

    The first feature of each is its row.
    """
    metadata = tiny_metadata(class_names=("cat", "dog"), feature_dims=FEATURES)
    schema = scores_schema(metadata)
    with pq.ParquetWriter(folder / BatchScores.FILE, schema) as writer:
        for start in range(0, len(images), group):
            sure, rows = confidence[start : start + group], np.arange(start, min(start + group, len(images)))
            vectors = {"bbsd_feats": np.stack([sure, 1 - sure], axis=1), "uae_feats": np.zeros((len(rows), 4))}
            features = np.random.default_rng(start).normal(size=(len(rows), FEATURES))
            features[:, 0] = rows
            columns: dict[str, list[object]] = {
                "path": [f"{row}.png" for row in rows],
                "sha256": [hashlib.sha256(images[row].encode()).hexdigest() for row in rows],
                "confidence": [None if np.isnan(one) else one for one in sure],
                "problem": ["broken" if np.isnan(one) else None for one in sure],
                **{name: list(matrix) for name, matrix in vectors.items()},
                "features": list(features),
                "properties": list(np.zeros((len(rows), 7))),
            }
            none = [None] * len(rows)
            arrays = [pa.array(columns.get(field.name, none), field.type) for field in schema]
            writer.write_table(pa.table(arrays, schema=schema))
    return UnlabelledImages(BatchScores.of_file(ModelIdentity(model_name="pets", version="v"), "", folder), folder)


@pytest.fixture
def counted() -> Iterator[pa.MemoryPool]:
    """Counts the memory that PyArrow takes meanwhile."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(COUNTED)
    yield COUNTED
    pa.set_memory_pool(before)


def test_the_least_sure_come_first_each_once_and_whatever_row_group_they_are_in(tmp_path: Path) -> None:
    sure = np.array([0.9, 0.6, np.nan, 0.8, 0.5, 0.6, 0.7])
    folder = scored(tmp_path, sure, ["a", "b", "broken", "c", "d", "b", "e"], group=2)
    for most, paths in {3: ["4.png", "1.png", "6.png"], 99: ["4.png", "1.png", "6.png", "3.png", "0.png"]}.items():
        found = folder.least_sure(most)
        assert found["path"].tolist() == paths
        assert [f"{features[0]:.0f}.png" for features in found["features"]] == paths
        asked = sure[[int(path[0]) for path in paths]]
        assert [said["cat"] for said in found["prediction_json"]] == pytest.approx(asked)
    assert folder.least_sure(0).empty


def test_of_many_scored_images_a_row_group_is_in_memory(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    count = 20 * GROUP
    sure = np.random.default_rng(0).uniform(0.5, 1, count)
    folder = scored(tmp_path, sure, [str(row) for row in range(count)])
    pool: pa.MemoryPool = request.getfixturevalue("counted")  # Not while they are written.
    found = folder.least_sure(10)
    assert found["path"].tolist() == [f"{row}.png" for row in np.argsort(sure)[:10]]
    # 4 to 7 MB, the threads' buffers included, whatever `count` is; the whole file would take 76 MB.
    assert pool.max_memory() < count * FEATURES * 4
