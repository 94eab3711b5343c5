"""What a model says of image files: the rows of `scores.parquet`, and the work of the processes that make them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cv_platform.errors import ImageError
from cv_platform.predictions import (
    BBSD_FEATS,
    FEATURES,
    LABEL_SEPARATOR,
    MODEL_NAME,
    MODEL_VERSION,
    PREDICTED_CLASS,
    PROPERTIES,
    UAE_FEATS,
    reference_schema,
)
from cv_platform.scoring.sources import read_file
from cv_platform.serving.model.runtime import LoadedModel, load_bundle
from cv_platform.serving.routes.answer import Predicted, predict_upload
from cv_platform.storage import BundleMetadata, CentralStorage

_VECTORS = (UAE_FEATS, BBSD_FEATS, FEATURES, PROPERTIES)


@dataclass(frozen=True)
class Scorer:
    """Which model answers, and where it is found; each process loads it once, with one thread.

    Attributes:
        storage_url, model_name, version: of the bundle.
        cache: folder for its download.
        max_pixels: of an image; more are not decoded, as by the service.
    """

    storage_url: str
    model_name: str
    version: str
    cache: Path
    max_pixels: int

    @property
    def model(self) -> LoadedModel:
        """Returns it, warm.

        Raises:
            BundleNotFoundError, CorruptBundleError, StorageError: see `load_bundle`.
        """
        return _loaded(self.storage_url, self.model_name, self.version, self.cache)


@dataclass(frozen=True)
class Batch:
    """Some images of a source: what one process scores at a time."""

    key: str
    """Names what its rows are made of."""
    root: str
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its first and its last image."""
        return " to ".join(dict.fromkeys((self.paths[0], self.paths[-1])))

    @property
    def images(self) -> int:
        """How many it has."""
        return len(self.paths)


def scores_schema(metadata: BundleMetadata) -> pa.Schema:
    """Returns the schema of `scores.parquet`; a row is one image, by `path`, in their order.

    As in reference data (`predictions.reference_schema`), without labels: `path`, `sha256`, `model_name`,
    `model_version`, `predicted_class` (of several labels, joined by |), `uae_feats`, `bbsd_feats` (the probabilities,
    in the order of `classes`, JSON in the file's metadata), `features`, `properties`. Besides, `confidence` (the
    highest probability), `unknown_score`, `is_unknown` (none without a rule), and the `problem` of an image that has no
    answer: then what comes of the model is null, and its vectors are NaN.
    """
    shared = reference_schema(
        uae_dims=metadata.uae_dims, classes=len(metadata.class_names), feature_dims=metadata.feature_dims
    )
    own = [("problem", pa.string()), ("confidence", pa.float32()), ("unknown_score", pa.float32())]
    fields = [field for field in shared if field.name != "label"]
    names = {b"model_name": metadata.model_name, b"model_version": metadata.version}
    return pa.schema(
        [*fields, *(pa.field(*one) for one in own), pa.field("is_unknown", pa.bool_())],
        metadata={**names, b"classes": json.dumps(metadata.class_names)},
    )


def score_batch(scorer: Scorer, batch: Batch) -> pa.Table:
    """Returns the rows of a batch's images.

    Raises:
        BundleNotFoundError, CorruptBundleError, StorageError: the model, or the place of the images, is away.
    """
    model = scorer.model
    return _table(batch, [_answer(model, scorer, batch.root, path) for path in batch.paths], model.metadata)


def unanswered(metadata: BundleMetadata, batch: Batch, problem: str) -> pa.Table:
    """Returns the rows of images that nobody can score, and why."""
    answers = [(hashlib.sha256(read_file(batch.root, path)).hexdigest(), problem) for path in batch.paths]
    return _table(batch, answers, metadata)


def _answer(model: LoadedModel, scorer: Scorer, root: str, path: str) -> tuple[str | None, Predicted | str]:
    """Returns an image's sha256, and what the model says of it, or why it says nothing."""
    try:
        data = read_file(root, path)
    except OSError as err:
        return None, f"{type(err).__name__}: {err.strerror or err}"
    digest = hashlib.sha256(data).hexdigest()
    try:
        return digest, predict_upload(model, data, max_pixels=scorer.max_pixels)
    except ImageError as err:
        return digest, f"{type(err).__name__}: {err}"


def _table(batch: Batch, answers: Sequence[tuple[str | None, Predicted | str]], metadata: BundleMetadata) -> pa.Table:
    said = [None if isinstance(answer, str) else answer for _, answer in answers]
    schema, count = scores_schema(metadata), len(answers)
    columns: dict[str, Any] = {
        "path": batch.paths,
        "sha256": [digest for digest, _ in answers],
        MODEL_NAME: [metadata.model_name] * count,
        MODEL_VERSION: [metadata.version] * count,
        PREDICTED_CLASS: [one and LABEL_SEPARATOR.join(one.predicted_classes) for one in said],
        "problem": [answer if isinstance(answer, str) else None for _, answer in answers],
        "confidence": [one and one.prediction.probabilities.max() for one in said],
        "unknown_score": [one and one.unknown_score for one in said],
        "is_unknown": [None if one is None or one.unknown_score is None else one.unknown_score > 1 for one in said],
    }
    arrays = {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}
    for name in _VECTORS:
        width = schema.field(name).type.list_size
        # Parquet cannot give back lists of a fixed size of which some are null.
        matrix = np.full((count, width), np.nan, np.float32)
        for row, one in enumerate(said):
            if one is not None:
                matrix[row] = _vector(one, name)
        values = pa.array(matrix.ravel(), pa.float32())
        arrays[name] = pa.FixedSizeListArray.from_arrays(values, type=schema.field(name).type)
    return pa.table([arrays[name] for name in schema.names], schema=schema)


def _vector(one: Predicted, name: str) -> np.ndarray:
    prediction = one.prediction
    vectors = {UAE_FEATS: prediction.uae, BBSD_FEATS: prediction.probabilities, FEATURES: prediction.features}
    return vectors.get(name, one.properties)


@functools.lru_cache(maxsize=1)
def _loaded(storage_url: str, model_name: str, version: str, cache: Path) -> LoadedModel:
    return load_bundle(CentralStorage(storage_url), model_name, version, cache=cache, threads=1)
