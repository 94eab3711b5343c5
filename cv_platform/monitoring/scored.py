"""The drift report of images that were scored in one go: `scores.parquet` beside the reference of the model's version.

For those who send no requests, and before a folder is trusted to a model. Nothing is alarmed and nothing is kept but a
page: a folder is judged when somebody asks, at `monitor.alpha`, and is no part of the year's allowance of windows.
"""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cv_platform.config import MonitorConfig
from cv_platform.drift.detectors import seeded_rows
from cv_platform.drift.map_plot import draw_map
from cv_platform.drift.reference import read_reference
from cv_platform.drift.sample import DriftSample
from cv_platform.drift.slices import SLICE_COLUMNS
from cv_platform.errors import DatasetError
from cv_platform.files import whole_file
from cv_platform.images import find_preprocessing
from cv_platform.monitoring.encoded import Encoded
from cv_platform.monitoring.report import ModelFacts, with_verdict
from cv_platform.monitoring.report_page import render_page, thumbnails
from cv_platform.monitoring.sentences import drift_summary
from cv_platform.monitoring.top_images import pictures_of_reference
from cv_platform.monitoring.window import Window
from cv_platform.predictions import BBSD_FEATS, FEATURES, PREDICTED_CLASS, PROPERTIES, UAE_FEATS
from cv_platform.records import BatchDriftReport, ModelIdentity, PackedImages
from cv_platform.scoring.sources import open_source, read_file
from cv_platform.storage import CentralStorage

logger = logging.getLogger(__name__)

_VECTORS = {"bbsd": BBSD_FEATS, "features": FEATURES, "uae": UAE_FEATS, "properties": PROPERTIES}
_NAMESPACE = uuid.UUID("6d4b0b0e-54a5-4a55-9f1c-0f4f5d1f6c4e")


@dataclass(frozen=True)
class ScoredImages:
    """Images that a model has scored.

    Attributes:
        model: that has answered.
        source: where they are, see `scoring.sources.find_images`.
        scores: `scores.parquet` of them.
        scratch: where an archive is unpacked.
    """

    model: ModelIdentity
    source: str
    scores: Path
    scratch: Path


def report_on_scores(
    scored: ScoredImages,
    monitor: MonitorConfig,
    page: Path,
    *,
    experiment: str,
    storage: CentralStorage,
    cache: Path,
    now: datetime,
    packed: PackedImages | None = None,
) -> BatchDriftReport:
    """Judges scored images as a window of requests is judged, and writes the page.

    An image that is there several times counts once, and one without an answer not at all.

    Args:
        scored: the images.
        monitor: the test's settings; detectors of the pretrained encoder, whose vectors scores lack, are left out.
        page: HTML file of the report.
        experiment: that the report is of.
        storage: has the version's reference data.
        cache: folder for downloads.
        now: when the report is made.
        packed: the images of the reference split, for the page; None: they are not here.

    Raises:
        BundleNotFoundError, StorageError: the version or its reference data cannot be had.
        ReferenceMismatchError: the reference was made by another version, preprocessing or encoder.
    """
    model = scored.model
    metadata = storage.read_metadata(model.model_name, model.version)
    reference_path = storage.fetch_reference_data(model.model_name, model.version, cache)
    reference = read_reference(
        reference_path,
        model_name=model.model_name,
        model_version=model.version,
        preprocessing_hash=metadata.preprocessing_hash,
        encoder_hash=metadata.encoder_hash,
    )
    window = read_scores(scored.scores, monitor, now)
    report = BatchDriftReport(
        report_id=str(uuid.uuid5(_NAMESPACE, f"{experiment}\n{model}\n{scored.source}")),
        experiment=experiment,
        model=model,
        source=scored.source,
        directory=page.parent,
        window_start_utc=now,
        window_end_utc=now,
        requests=window.requests,
        rows=len(window.rows),
        unusable_rows=window.unusable,
        repeated_rows=window.repeats,
        is_sampled=window.is_sampled,
        reference_rows=len(reference),
        alpha=monitor.alpha,
        min_samples=monitor.min_samples,
    )
    places = None
    if window.sample is not None and report.rows >= monitor.min_samples:
        compared = Encoded(reference, window.sample, reference_path)
        report = with_verdict(report, monitor, compared, reference_path, window, ModelFacts.of(metadata))
        places = draw_map(reference, window.sample, seed=0)
    preprocessing = find_preprocessing(metadata.preprocessing_hash, metadata.image_size)
    pictures, problems = _pictures(report, scored, packed, None if preprocessing is None else preprocessing.sample_bits)
    report = report.model_copy(update={"problems": tuple(problems)})
    page.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(page) as partial:
        partial.write_text(render_page(report, pictures, None, places), encoding="utf-8")
    logger.info("%s", drift_summary(report))
    return report


def read_scores(scores: Path, monitor: MonitorConfig, now: datetime) -> Window:
    """Returns the answered images of `scores.parquet` as `window.read_window` returns requests.

    `monitor.max_samples` of them at most, drawn by `monitor.seed`, in the order of the file; each by its path, in the
    column `prediction_id`. Row groups are read one after the other, so that a file of millions fits into memory.
    """
    with pq.ParquetFile(scores) as file:
        answered = file.read(columns=["sha256", "problem"]).to_pandas()
        known = answered["problem"].isna()
        first = known & ~answered.loc[known, "sha256"].duplicated().reindex(answered.index, fill_value=True)
        rows = np.flatnonzero(first if monitor.repeats == "once" else known)
        chosen = rows[seeded_rows(len(rows), monitor.max_samples, monitor.seed)]
        table = _rows(file, chosen)
    sample, is_finite = None, np.zeros(0, np.bool_)
    if len(table):
        sample, is_finite = DriftSample.from_rows({name: _matrix(table, column) for name, column in _VECTORS.items()})
    columns = {"prediction_id": "path", "predicted_class": PREDICTED_CLASS, "image_sha256": "sha256"}
    shown = pd.DataFrame({name: table[column].to_pylist() for name, column in columns.items()})
    shown = shown.assign(created_on=now, **dict.fromkeys(SLICE_COLUMNS))
    return Window(
        sample=sample if sample is not None and len(sample) else None,
        rows=shown.loc[is_finite].reset_index(drop=True),
        requests=int(known.sum()),
        late=0,
        repeats=int(known.sum() - first.sum()),
        is_sampled=len(chosen) < len(rows),
        unusable=len(table) - int(is_finite.sum()),
    )


def _rows(file: pq.ParquetFile, chosen: NDArray[np.intp]) -> pa.Table:
    columns = ["path", "sha256", PREDICTED_CLASS, *_VECTORS.values()]
    parts, start = list[pa.Table](), 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        inside = chosen[(chosen >= start) & (chosen < start + count)] - start
        if len(inside) or not group:
            parts.append(file.read_row_group(group, columns=columns).take(pa.array(inside, pa.int64())))
        start += count
    return pa.concat_tables(parts) if parts else file.schema_arrow.empty_table().select(columns)


def _matrix(table: pa.Table, column: str) -> NDArray[np.float32]:
    values = table[column].combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(values), values.type.list_size)


def _pictures(
    report: BatchDriftReport, scored: ScoredImages, packed: PackedImages | None, sample_bits: int | None
) -> tuple[dict[str, str], list[str]]:
    """Returns data URLs by sha256 of the top images and what is beside them; files that are gone have none."""
    contents: dict[str, bytes] = {}
    with suppress(DatasetError):
        root = open_source(scored.source, scored.scratch) if report.top_images else ""
        for row in report.top_images:
            with suppress(OSError):
                contents[row["image_sha256"]] = read_file(root, row["prediction_id"])
    pictures, problems = thumbnails(contents, sample_bits)
    beside, unseen = pictures_of_reference(report, packed)
    return {**beside, **pictures}, [*problems, *unseen]
