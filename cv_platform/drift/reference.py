"""Reference data: what the model answers on held-out images, `<model_name>_ref_data.parquet`.

A row is one readable image of the reference split, keyed by `sha256` (a file that it holds twice has two rows).
The file carries in its metadata which model version, preprocessing and encoder made it, and is refused for any other.
Columns: `cv_platform.predictions.reference_schema`.
"""

# PyArrow and pandas come without complete types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from cv_platform.compute.engine import Engine, patiently
from cv_platform.config import ModelConfig
from cv_platform.drift.detectors import Answer, HeldOutImages, extract_sample, seeded_rows
from cv_platform.drift.sample import DriftSample, Float32Matrix
from cv_platform.errors import InvalidSampleError, ReferenceMismatchError
from cv_platform.files import file_sha256, whole_file
from cv_platform.predictions import (
    BBSD_FEATS,
    FEATURES,
    LABEL,
    LABEL_SEPARATOR,
    MODEL_NAME,
    MODEL_VERSION,
    PREDICTED_CLASS,
    PROPERTIES,
    UAE_FEATS,
    UNKNOWN_LABELS,
    VECTOR_COLUMNS,
    known_labels,
    label_texts,
    one_hot,
    predicted_flags,
    reference_schema,
)
from cv_platform.records import DriftDetectors, ReferenceData, TrainedModel
from cv_platform.storage import CentralStorage

_VECTORS = {BBSD_FEATS: "bbsd", FEATURES: "features", UAE_FEATS: "uae", PROPERTIES: "properties"}


class ReferenceIdentity(BaseModel):
    """What made a reference file: rows of any other origin are never compared with it."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    model_name: str
    model_version: str
    preprocessing_hash: str
    encoder_hash: str
    class_names: tuple[str, ...]


def build_reference_data(
    trained: TrainedModel,
    detectors: DriftDetectors,
    held_out: HeldOutImages,
    model: ModelConfig,
    *,
    storage: CentralStorage,
    answer: Answer | None = None,
    engine: Engine | None = None,
) -> ReferenceData:
    """Writes and publishes the reference data: one ordered pass, features and label of a row from one image.

    Args:
        trained: the model; the parquet is written beside it, complete or not at all.
        detectors: of the same version.
        held_out: the reference split.
        model: its configuration; `reference_data_n_sample` limits the rows (seeded), none takes all.
        storage: where it is published.
        answer: what is served, where it is the graph in 8 bits (`trained.int8_path`); None: Keras answers.
        engine: whose machines answer for images that take long; None: this process alone.

    Raises:
        InvalidSampleError: the split has fewer than two images.
        InvalidModelError: see `extract`.
    """
    drift, class_names = model.drift_detection, trained.task.class_names
    rows = seeded_rows(len(held_out.paths), drift.reference_data_n_sample, drift.uae_seed)
    if len(rows) < 2:
        raise InvalidSampleError(
            f"Expected at least 2 readable images in the reference split. Received: {len(rows)}. "
            "Raise dataset.reference_fraction, or give the dataset a larger reference split."
        )
    sample = extract_sample(trained.keras_path, detectors.uae_path, held_out, rows, answer, engine)
    targets = np.asarray(held_out.targets)[rows]
    chosen: list[int] = rows.tolist()
    predicted = predicted_flags(sample.bbsd, trained.task.classifier_type, model.threshold)
    path = trained.directory / f"{trained.model.model_name}_ref_data.parquet"
    write_reference(
        path,
        ReferenceIdentity(
            model_name=trained.model.model_name,
            model_version=trained.model.version,
            preprocessing_hash=trained.task.preprocessing_hash,
            encoder_hash=detectors.encoder_hash,
            class_names=class_names,
        ),
        sample,
        paths=[held_out.paths[row] for row in chosen],
        sha256=[held_out.sha256[row] for row in chosen],
        labels=label_texts(one_hot(targets, len(class_names)), class_names),
        unknown_labels=label_texts(~known_labels(targets, len(class_names)), class_names),
        predicted=label_texts(predicted, class_names),
    )
    name, version = trained.model.model_name, trained.model.version
    url = patiently(f"The upload of {path.name}", storage.publish_reference_data, path, name, version)
    int8_sha256 = "" if answer is None else file_sha256(trained.int8_path)
    return ReferenceData(
        model=trained.model, directory=trained.directory, url=url, rows=len(rows), int8_sha256=int8_sha256
    )


def write_reference(
    path: Path,
    identity: ReferenceIdentity,
    sample: DriftSample,
    *,
    paths: Sequence[str],
    sha256: Sequence[str],
    labels: Sequence[str],
    predicted: Sequence[str],
    unknown_labels: Sequence[str] = (),
) -> None:
    """Writes a reference file, complete or not at all.

    Args:
        path: of the parquet file; its folder is made.
        identity: what made the rows.
        sample: the rows' vectors.
        paths, sha256, labels, predicted: the other columns, aligned with `sample`.
        unknown_labels: likewise; without any, there is no such column.
    """
    has_unknown = any(unknown_labels)
    columns = {
        "path": paths,
        "sha256": sha256,
        LABEL: labels,
        MODEL_NAME: [identity.model_name] * len(sample),
        MODEL_VERSION: [identity.model_version] * len(sample),
        PREDICTED_CLASS: predicted,
        **({UNKNOWN_LABELS: unknown_labels} if has_unknown else {}),
    }
    schema = reference_schema(
        uae_dims=sample.uae.shape[1],
        classes=sample.bbsd.shape[1],
        feature_dims=sample.features.shape[1],
        has_unknown_labels=has_unknown,
    )
    arrays: dict[str, pa.Array] = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    for column, attribute in _VECTORS.items():
        matrix: Float32Matrix = getattr(sample, attribute)
        arrays[column] = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel(), pa.float32()), matrix.shape[1])
    table = pa.table(
        [arrays[name] for name in schema.names],
        schema=schema.with_metadata({"cv_platform": identity.model_dump_json()}),
    )
    options: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": [name for name in columns if name not in {"path", "sha256"}],
        # Floats compress a quarter better byte by byte; nested columns are named by their leaf.
        "column_encoding": {f"{column}.list.element": "BYTE_STREAM_SPLIT" for column in _VECTORS},
    }
    with whole_file(path) as partial:
        pq.write_table(table, partial, **options)


def read_reference(
    path: Path,
    *,
    model_name: str | None = None,
    model_version: str | None = None,
    preprocessing_hash: str | None = None,
    encoder_hash: str | None = None,
) -> DriftSample:
    """Reads the vectors of a reference file, in the order of its rows.

    Args:
        path: of the parquet file.
        model_name, model_version, preprocessing_hash, encoder_hash: what must have made it; None: any.

    Raises:
        ReferenceMismatchError: it is not reference data, or of another origin; every difference is named.
        InvalidSampleError: a row is not finite.
    """
    identity = read_identity(path)
    expected = {
        "model_name": model_name,
        "model_version": model_version,
        "preprocessing_hash": preprocessing_hash,
        "encoder_hash": encoder_hash,
    }
    differences = [
        f"{field} {getattr(identity, field)} instead of {value}"
        for field, value in expected.items()
        if value is not None and value != getattr(identity, field)
    ]
    if differences:
        raise ReferenceMismatchError(
            f"Expected reference data of the model that answered the requests. Received: {path.name} with "
            f"{'; '.join(differences)}. Materialise the reference_data of that model version."
        )
    table = pq.read_table(path, columns=list(VECTOR_COLUMNS))
    return DriftSample(**{attribute: _matrix(table, column) for column, attribute in _VECTORS.items()})


def read_identity(path: Path) -> ReferenceIdentity:
    """Reads what made a reference file.

    Raises:
        ReferenceMismatchError: it is missing, or not reference data.
    """
    try:
        metadata = pq.read_schema(path).metadata or {}
        return ReferenceIdentity.model_validate_json(metadata[b"cv_platform"])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError) as err:
        raise ReferenceMismatchError(
            f"Expected reference data with their origin. Received: {path}: {err!r}. Materialise reference_data."
        ) from err


def read_reference_labels(path: Path) -> pd.DataFrame:
    """Reads a reference file's path, sha256, label, predicted_class and unknown_labels; rows as in `read_reference`."""
    columns = ["path", "sha256", LABEL, PREDICTED_CLASS]
    if UNKNOWN_LABELS in pq.read_schema(path).names:
        return pq.read_table(path, columns=[*columns, UNKNOWN_LABELS]).to_pandas()
    return pq.read_table(path, columns=columns).to_pandas().assign(**{UNKNOWN_LABELS: ""})


def label_targets(labels: Iterable[str], class_names: tuple[str, ...]) -> NDArray[np.bool_]:
    """Returns `(N, C)` bool from label texts such as `cat` or, for several, `cat|dog`."""
    index = {name: i for i, name in enumerate(class_names)}
    texts = list(labels)
    targets = np.zeros((len(texts), len(class_names)), dtype=np.bool_)
    for row, label in enumerate(texts):
        # A class name may itself hold the separator; as a single label it is found whole.
        names = [label] if label in index else [part for part in label.split(LABEL_SEPARATOR) if part]
        for name in names:
            if name in index:
                targets[row, index[name]] = True
    return targets


def _matrix(table: pa.Table, column: str) -> Float32Matrix:
    vectors = table.column(column).combine_chunks()
    chunk = vectors.chunk(0) if isinstance(vectors, pa.ChunkedArray) else vectors
    return chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), chunk.type.list_size)
