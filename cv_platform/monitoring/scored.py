"""The drift report of images that were scored in one go: `scores.parquet` beside the reference of the model's version.

For those who send no requests, and before a folder is trusted to a model. Nothing is alarmed and nothing is kept but a
page: a folder is judged when somebody asks, at `monitor.alpha`, and is no part of the year's allowance of windows.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
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
from cv_platform.drift.family import DETECTORS
from cv_platform.drift.map_plot import draw_map
from cv_platform.drift.reference import read_reference
from cv_platform.drift.sample import DriftSample
from cv_platform.drift.slices import SLICE_COLUMNS
from cv_platform.errors import StorageError
from cv_platform.files import file_sha256, whole_file
from cv_platform.images import find_preprocessing
from cv_platform.monitoring.encoded import Encoded
from cv_platform.monitoring.report import ModelFacts, window_facts, with_verdict
from cv_platform.monitoring.report_page import render_page, thumbnails
from cv_platform.monitoring.top_images import pictures_of_reference
from cv_platform.monitoring.window import Window
from cv_platform.predictions import BBSD_FEATS, FEATURES, PREDICTED_CLASS, PROPERTIES, UAE_FEATS
from cv_platform.records import BatchDriftReport, ModelIdentity, PackedImages
from cv_platform.scored_rows import read_answers, read_rows
from cv_platform.storage import BundleMetadata, CentralStorage

_VECTORS = {"bbsd": BBSD_FEATS, "features": FEATURES, "uae": UAE_FEATS, "properties": PROPERTIES}
_NAMESPACE = uuid.UUID("6d4b0b0e-54a5-4a55-9f1c-0f4f5d1f6c4e")


@dataclass(frozen=True)
class ScoredImages:
    """Images that a model has scored.

    Attributes:
        model: that has answered.
        source: where they are, for the page.
        scores: `scores.parquet` of them.
        read: returns an image as it was scored, by path and sha256, or raises StorageError; None: the page shows none.
    """

    model: ModelIdentity
    source: str
    scores: Path
    read: Callable[[str, str], bytes] | None


def comparable_reference(storage: CentralStorage, metadata: BundleMetadata, cache: Path) -> tuple[Path, DriftSample]:
    """Returns the reference data of a published version: a local parquet, and its rows.

    Raises:
        BundleNotFoundError, StorageError: they cannot be had.
        ReferenceMismatchError: they were made by another version, preprocessing or encoder.
    """
    path = storage.fetch_reference_data(metadata.model_name, metadata.version, cache)
    return path, read_reference(
        path,
        model_name=metadata.model_name,
        model_version=metadata.version,
        preprocessing_hash=metadata.preprocessing_hash,
        encoder_hash=metadata.encoder_hash,
    )


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
        BundleNotFoundError, StorageError, ReferenceMismatchError: see `comparable_reference`.
    """
    model = scored.model
    metadata = storage.read_metadata(model.model_name, model.version)
    reference_path, reference = comparable_reference(storage, metadata, cache)
    window, unanswered = read_scores(scored.scores, monitor)
    report = BatchDriftReport(
        report_id=str(uuid.uuid5(_NAMESPACE, f"{experiment}\n{model}\n{file_sha256(scored.scores)}")),
        experiment=experiment,
        model=model,
        source=scored.source,
        directory=page.parent,
        unanswered=unanswered,
        window_start_utc=now,
        window_end_utc=now,
        alpha=monitor.alpha,
        **window_facts(window, reference, monitor, "images"),
    )
    problems, places = [*report.problems, *_problems(report, monitor)], None
    if window.sample is not None and report.rows >= monitor.min_samples and _detectors(monitor):
        compared = Encoded(reference, window.sample, reference_path)
        report = with_verdict(report, monitor, compared, reference_path, window, ModelFacts.of(metadata))
        places = draw_map(reference, window.sample, seed=0)
    pictures, unseen = _pictures(report, scored, packed, _sample_bits(metadata))
    report = report.model_copy(update={"problems": (*problems, *unseen)})
    page.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(page) as partial:
        partial.write_text(render_page(report, pictures, None, places), encoding="utf-8")
    return report


def read_scores(scores: Path, monitor: MonitorConfig) -> tuple[Window, int]:
    """Returns the answered images of `scores.parquet` as `window.read_window` returns requests, and how many others.

    `monitor.max_samples` of them at most, drawn by `monitor.seed`, in the order of the file; each by its path, in the
    column `prediction_id`. Row groups are read one after the other: of all rows, 13 bytes stay.
    """
    with pq.ParquetFile(scores) as file:
        answers = read_answers(file)
        rows = np.flatnonzero(answers.is_there)
        first = answers.first_of_copies(rows)
        judged = first if monitor.repeats == "once" else rows
        chosen = judged[seeded_rows(len(judged), monitor.max_samples, monitor.seed)]
        table = read_rows(file, chosen, ["path", "sha256", PREDICTED_CLASS, *_VECTORS.values()])
    sample, is_finite = None, np.zeros(0, np.bool_)
    if len(table):
        sample, is_finite = DriftSample.from_rows({name: _matrix(table, column) for name, column in _VECTORS.items()})
    columns = {"prediction_id": "path", "predicted_class": PREDICTED_CLASS, "image_sha256": "sha256"}
    shown = pd.DataFrame({name: table[column].to_pylist() for name, column in columns.items()})
    shown = shown.assign(created_on="", **dict.fromkeys(SLICE_COLUMNS))  # Nobody has asked at any time.
    window = Window(
        sample=sample if sample is not None and len(sample) else None,
        rows=shown.loc[is_finite].reset_index(drop=True),
        requests=len(rows),
        late=0,
        repeats=len(rows) - len(first),
        is_sampled=len(chosen) < len(judged),
        unusable=len(table) - int(is_finite.sum()),
    )
    return window, len(answers.is_there) - len(rows)


def _matrix(table: pa.Table, column: str) -> NDArray[np.float32]:
    values = table[column].combine_chunks()
    flat = values.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(values), values.type.list_size)


def _detectors(monitor: MonitorConfig) -> list[str]:
    """Returns the configured detectors that need no vectors of the pretrained encoder."""
    return [one.name for one in DETECTORS if one.name in monitor.detectors and not one.name.startswith("encoder_")]


def _problems(report: BatchDriftReport, monitor: MonitorConfig) -> list[str]:
    problems: list[str] = []
    if report.unanswered:
        problems.append(
            f"{report.unanswered} images have no answer, and no part in the verdict: the column `problem` of their "
            "rows says why."
        )
    if not _detectors(monitor):
        problems.append(
            "monitor.detectors names those of the pretrained encoder alone, whose vectors scores do not have. Name "
            "another one for a verdict."
        )
    return problems


def _sample_bits(metadata: BundleMetadata) -> int | None:
    preprocessing = find_preprocessing(metadata.preprocessing_hash, metadata.image_size)
    return None if preprocessing is None else preprocessing.sample_bits


def _pictures(
    report: BatchDriftReport, scored: ScoredImages, packed: PackedImages | None, sample_bits: int | None
) -> tuple[dict[str, str], list[str]]:
    """Returns data URLs by sha256 of the top images and what is beside them, and sentences for what is not shown."""
    contents: dict[str, bytes] = {}
    problems: list[str] = []
    if (read := scored.read) is not None:
        for row in report.top_images:
            try:
                contents[row["image_sha256"]] = read(row["prediction_id"], row["image_sha256"])
            except StorageError as err:
                problems.append(f"{row['prediction_id']} is not shown: {err}")
    pictures, undecoded = thumbnails(contents, sample_bits)
    beside, unseen = pictures_of_reference(report, packed)
    return {**beside, **pictures}, [*problems, *undecoded, *unseen]
