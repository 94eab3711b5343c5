"""The images that drive a drift report, each beside the most similar ones of the reference, and pictures of both.

Pictures of uploads come from the request log, those of the reference split from the packed images of this installation.
Neither is in the reference data: these stay small, and an image is in no more places than it was.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from cv_platform.database.uploads import read_images
from cv_platform.datasets.packing import open_split
from cv_platform.drift.localisation import nearest_rows
from cv_platform.drift.reference import read_reference_labels
from cv_platform.drift.sample import DriftSample
from cv_platform.errors import DatasetError, ImageError
from cv_platform.images import Preprocessing, preprocess
from cv_platform.monitoring.report_page import PICTURE_PX, thumbnails
from cv_platform.monitoring.window import Window
from cv_platform.pages import picture
from cv_platform.predictions import LABEL, PREDICTED_CLASS
from cv_platform.records import DriftReport, PackedImages

TOP_IMAGES, _NEAREST = 12, 3
_SHEET_COLUMNS, _SHEET_ROWS = 4, 2


def top_images(
    window: Window, scores: NDArray[np.float64], reference: DriftSample, current: DriftSample, path: Path
) -> list[dict[str, Any]]:
    """Returns the strongest images of a window, each upload once, with their nearest images of the reference.

    Args:
        window: its rows.
        scores: of `localisation.image_scores`, aligned with them.
        reference, current: what was compared; `current` is aligned with the window's rows.
        path: parquet of the reference.
    """
    ranked = window.rows.assign(score=scores, row=np.arange(len(scores)))
    ranked = ranked.sort_values("score", ascending=False, kind="stable")
    # Without a kept upload, each prediction stands for itself.
    identity = ranked["image_sha256"].where(ranked["image_sha256"].notna(), ranked["prediction_id"].astype(str))
    top = ranked[~identity.duplicated()].head(TOP_IMAGES)
    nearest = nearest_rows(reference, current.take(np.array(top["row"].tolist(), np.intp)), count=_NEAREST)
    known = read_reference_labels(path)
    return [
        {
            "prediction_id": str(row["prediction_id"]),
            "created_on": str(row["created_on"]),
            "predicted_class": row["predicted_class"],
            "score": float(row["score"]),
            "image_sha256": row["image_sha256"],
            # Of a window that was accepted, few are labelled.
            "nearest": [
                {"image_sha256": one["sha256"], "label": one[LABEL] or one[PREDICTED_CLASS]}
                for one in known.iloc[rows].to_dict(orient="records")
            ],
        }
        for (_, row), rows in zip(top.iterrows(), nearest, strict=True)
    ]


def pictures_of(
    report: DriftReport, engine: Engine, packed: PackedImages | None, sample_bits: int | None = None
) -> tuple[dict[str, str], list[str]]:
    """Returns data URLs by sha256 of the top images and what is beside them, and sentences for what cannot be shown.

    Args:
        report: with its top images.
        engine: of the request log.
        packed: where the images of the reference split are; None: nowhere here.
        sample_bits: by which uploads are decoded, see `images.Preprocessing`.
    """
    wanted = {row["image_sha256"] for row in report.top_images if row["image_sha256"]}
    uploads = read_images(engine, sorted(wanted | _beside(report) if report.reference else wanted))
    pictures, problems = thumbnails(uploads, sample_bits)
    if report.reference:
        return pictures, problems
    reference, unseen = pictures_of_reference(report, packed)
    return {**reference, **pictures}, [*problems, *unseen]


def pictures_of_reference(report: DriftReport, packed: PackedImages | None) -> tuple[dict[str, str], list[str]]:
    """Returns data URLs by sha256 of the reference split's images beside the top images; see `pictures_of`."""
    beside = _beside(report)
    if not beside or packed is None:
        return {}, []
    try:
        return _packed(packed, beside), []
    except DatasetError as err:
        return {}, [f"Images of the reference cannot be shown: {err}"]


def _beside(report: DriftReport) -> set[str]:
    return {one["image_sha256"] for row in report.top_images for one in row["nearest"] if one["image_sha256"]}


def contact_sheet(report: DriftReport, engine: Engine, sample_bits: int | None = None) -> bytes | None:
    """Returns a JPEG of the first top images whose upload is kept and decodes, side by side; None without any.

    `sample_bits` is what `images.Preprocessing` says of them.
    """
    wanted = [sha256 for row in report.top_images if (sha256 := row["image_sha256"])]
    uploads = read_images(engine, wanted)
    cells: list[NDArray[np.uint8]] = []
    made = Preprocessing(framing="pad", sample_bits=sample_bits)
    for sha256 in wanted:
        with suppress(KeyError, ImageError):
            cells.append(preprocess(uploads[sha256], (PICTURE_PX, PICTURE_PX), preprocessing=made))
    cells = cells[: _SHEET_COLUMNS * _SHEET_ROWS]
    if not cells:
        return None
    columns = min(len(cells), _SHEET_COLUMNS)
    rows = -(-len(cells) // columns)
    sheet = np.full((rows * PICTURE_PX, columns * PICTURE_PX, 3), 255, np.uint8)
    for at, cell in enumerate(cells):
        top, left = at // columns * PICTURE_PX, at % columns * PICTURE_PX
        sheet[top : top + PICTURE_PX, left : left + PICTURE_PX] = cell
    return cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def _packed(packed: PackedImages, sha256s: Collection[str]) -> dict[str, str]:
    split = open_split(packed, "reference")
    rows = {sha256: row for row, sha256 in enumerate(split.sha256) if sha256 in sha256s}
    made: dict[str, str] = {}
    for sha256, row in rows.items():
        _, png = cv2.imencode(".png", np.asarray(split.images[row : row + 1])[0, ..., ::-1])
        made[sha256] = picture(png.tobytes(), PICTURE_PX) or ""
    return made
