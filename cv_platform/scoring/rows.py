"""What a model says of image files: the rows of `scores.parquet`, and the work of the processes that make them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cv_platform.compute.engine import span
from cv_platform.datasets.sources.entries import printable
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
from cv_platform.properties import image_properties
from cv_platform.scoring.sources import read_images
from cv_platform.serving.model.explain import SMALLEST_SIDE_PX, Explain, draw
from cv_platform.serving.model.runtime import LoadedModel, PublishedModel
from cv_platform.serving.routes.answer import Predicted, predict_upload
from cv_platform.storage import BundleMetadata

_VECTORS = (UAE_FEATS, BBSD_FEATS, FEATURES, PROPERTIES)
HEAT_MAP = "heat_map"
_AT_ONCE = 16
"""Images whose pixel statistics are computed one after the other: after a network's call, their code is in no cache."""
_SAID = ("sha256", PREDICTED_CLASS, "problem", "confidence", "unknown_score", "is_unknown", HEAT_MAP)
"""Columns that come with each answer."""


@dataclass(frozen=True)
class Scorer:
    """The model that answers, and what is kept of its answers.

    Attributes:
        published: where it is found.
        max_pixels: of an image; more are not decoded, as by the service.
        heat_maps: whether each row has the heat-map over its image.
    """

    published: PublishedModel
    max_pixels: int
    heat_maps: bool = False


@dataclass(frozen=True)
class Batch:
    """Some files of a source that may be images: what one process scores at a time.

    Attributes:
        key: names what its rows are made of.
        root: see `sources.Found`, also for the others.
        paths: of the files.
        sizes: of objects at a URL.
    """

    key: str
    root: str
    paths: tuple[str, ...]
    sizes: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Returns its first and its last file, for the log."""
        return span(printable(self.paths[0]), printable(self.paths[-1]))

    @property
    def images(self) -> int:
        """Returns how many files it has."""
        return len(self.paths)

    def each(self) -> Iterator[Batch]:
        """Yields a batch of each file."""
        for at, path in enumerate(self.paths):
            yield replace(self, paths=(path,), sizes=self.sizes[at : at + 1])

    def read(self) -> Iterator[tuple[str, bytes | OSError]]:
        """Yields its images, see `sources.read_images`."""
        return read_images(self.root, self.paths, self.sizes)


def scores_schema(metadata: BundleMetadata, *, heat_maps: bool = False) -> pa.Schema:
    """Returns the schema of `scores.parquet`; a row is one image, by `path`, in their order.

    As in reference data (`predictions.reference_schema`), without labels: `path`, `sha256`, `model_name`,
    `model_version`, `predicted_class` (of several labels, joined by |), `uae_feats`, `bbsd_feats` (the probabilities,
    in the order of `classes`, JSON in the file's metadata), `features`, `properties`. Besides, `confidence` (the
    highest probability), `unknown_score`, `is_unknown` (none without a rule), and the `problem` of an image that has no
    answer: then what comes of the model is null, and its vectors are NaN. With `heat_maps`, `heat_map` is a JPEG of
    256 px, the heat-map (Grad-CAM) over the image.
    """
    shared = reference_schema(
        uae_dims=metadata.uae_dims, classes=len(metadata.class_names), feature_dims=metadata.feature_dims
    )
    own = [("problem", pa.string()), ("confidence", pa.float32()), ("unknown_score", pa.float32())]
    fields = [field for field in shared if field.name != "label"]
    own += [("is_unknown", pa.bool_()), *([(HEAT_MAP, pa.binary())] if heat_maps else [])]
    names = {b"model_name": metadata.model_name, b"model_version": metadata.version}
    return pa.schema(
        [*fields, *(pa.field(*one) for one in own)],
        metadata={**names, b"classes": json.dumps(metadata.class_names)},
    )


def score_batch(scorer: Scorer, batch: Batch) -> pa.Table:
    """Returns the rows of a batch's images; files that are none have no row.

    Raises:
        BundleNotFoundError, CorruptBundleError, StorageError: the model, or the place of the images, is away.
    """
    model = scorer.published.load()
    rows = _Rows(batch, scores_schema(model.metadata, heat_maps=scorer.heat_maps), model.metadata)
    for path, content in batch.read():
        _answer(model, scorer, path, content, rows)
    return rows.table()


def unanswered(metadata: BundleMetadata, schema: pa.Schema, batch: Batch, problem: str) -> pa.Table:
    """Returns the rows of images that nobody can score, and why."""
    rows = _Rows(batch, schema, metadata)
    for path, content in batch.read():
        rows.add(path, None if isinstance(content, OSError) else hashlib.sha256(content).hexdigest(), problem)
    return rows.table()


def _answer(model: LoadedModel, scorer: Scorer, path: str, content: bytes | OSError, rows: _Rows) -> None:
    """Adds an image's row: its sha256, and what the model says of it, or why it says nothing."""
    if isinstance(content, OSError):
        return rows.add(path, None, f"{type(content).__name__}: {content.strerror or content}")
    digest = hashlib.sha256(content).hexdigest()
    if printable(path) != path:
        return rows.add(path, digest, f"Expected a file name in UTF-8. Received: {path!a}. Rename the file.")
    try:
        rows.add(path, digest, predict_upload(model, content, max_pixels=scorer.max_pixels))
    except ImageError as err:
        rows.add(path, digest, f"{type(err).__name__}: {err}")


class _Rows:
    """The rows of a batch, image after image.

    Of an answer only the row is kept, and of a few the network's input: where decoded images stay until the batch is
    done, each is decoded into memory that has to be fetched from the system, and out of every cache.
    """

    def __init__(self, batch: Batch, schema: pa.Schema, metadata: BundleMetadata) -> None:
        self._schema, self._model = schema, {MODEL_NAME: metadata.model_name, MODEL_VERSION: metadata.version}
        self._vectors = {
            # Parquet cannot give back lists of a fixed size of which some are null.
            name: np.full((batch.images, self._schema.field(name).type.list_size), np.nan, np.float32)
            for name in _VECTORS
        }
        self._unmeasured: list[tuple[int, NDArray[np.uint8]]] = []
        self._said = [name for name in _SAID if name in schema.names]
        self._columns: dict[str, list[Any]] = {name: [] for name in ("path", *self._model, *self._said)}

    def add(self, path: str, digest: str | None, said: Predicted | str) -> None:
        """Adds the next image's row, with its sha256 and the answer, or why there is none."""
        row = len(self._columns["path"])
        values: dict[str, Any] = {"path": printable(path), "sha256": digest, **self._model}
        if isinstance(said, str):
            values["problem"] = said
        else:
            prediction, score = said.prediction, said.unknown_score
            values[PREDICTED_CLASS] = LABEL_SEPARATOR.join(said.predicted_classes)
            values["confidence"] = prediction.probabilities.max()
            values |= {"unknown_score": score, "is_unknown": None if score is None else score > 1}
            if HEAT_MAP in self._columns:
                cam = said.prediction.cam
                values[HEAT_MAP] = draw(said.image, cam, Explain.JPEG, longest_px=SMALLEST_SIDE_PX).overlaid
            self._vectors[UAE_FEATS][row] = prediction.uae
            self._vectors[BBSD_FEATS][row] = prediction.probabilities
            self._vectors[FEATURES][row] = prediction.features
            self._unmeasured.append((row, said.pixels))
            if len(self._unmeasured) == _AT_ONCE:
                self._measure()
        for name, column in self._columns.items():
            column.append(values.get(name))

    def _measure(self) -> None:
        for row, pixels in self._unmeasured:
            self._vectors[PROPERTIES][row] = image_properties(pixels)
        self._unmeasured.clear()

    def table(self) -> pa.Table:
        """Returns them."""
        self._measure()
        schema = self._schema
        arrays = {name: pa.array(values, schema.field(name).type) for name, values in self._columns.items()}
        for name, matrix in self._vectors.items():
            values = pa.array(matrix[: len(self._columns["path"])].ravel(), pa.float32())
            arrays[name] = pa.FixedSizeListArray.from_arrays(values, type=schema.field(name).type)
        return pa.table([arrays[name] for name in schema.names], schema=schema)
