"""The drift report as a page (`report.html`), with its images inside."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from cv_platform.drift.family import DETECTORS
from cv_platform.errors import ImageError
from cv_platform.images import Preprocessing, decode
from cv_platform.monitoring.sentences import SLICE_NAMES, cause_note
from cv_platform.pages import render
from cv_platform.records import DriftReport

PICTURE_PX = 160


def thumbnails(uploads: Mapping[str, bytes], sample_bits: int | None = None) -> tuple[dict[str, str], list[str]]:
    """Shrinks uploads for the page, decoded by what `images.Preprocessing` says of `sample_bits`.

    Returns:
        A data URL (JPEG) by sha256, and a sentence for each upload that does not decode.
    """
    pictures: dict[str, str] = {}
    problems: list[str] = []
    for sha256, content in uploads.items():
        try:
            image = decode(content, preprocessing=Preprocessing(sample_bits=sample_bits))
        except ImageError as err:
            problems.append(f"Image {sha256[:12]} cannot be shown: {err}")
            continue
        height, width = image.shape[:2]
        scale = PICTURE_PX / max(height, width)
        if scale < 1:
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
        pictures[sha256] = f"data:image/jpeg;base64,{base64.b64encode(np.asarray(jpeg).tobytes()).decode()}"
    return pictures, problems


def render_page(
    report: DriftReport, pictures: Mapping[str, str], power: Path | None = None, places: bytes | None = None
) -> str:
    """Returns the report as HTML.

    Args:
        report: the report.
        pictures: data URL by sha256, for those of its top images that were kept.
        power: SVG of how often windows are noticed; None, or gone: it is left out.
        places: PNG of where reference and window lie; None: it is left out.
    """
    svg = power.read_bytes() if power and power.exists() else None
    return render(
        "monitoring/report.html",
        title=f"{report.experiment}: drift report",
        report=report,
        cause_note=cause_note(report.causes) if report.causes is not None else None,
        detectors=_detectors(report),
        slice_names=SLICE_NAMES,
        pictures=pictures,
        power=f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" if svg else None,
        places=f"data:image/png;base64,{base64.b64encode(places).decode()}" if places else None,
    )


def _detectors(report: DriftReport) -> list[tuple[str, str, str, str]]:
    """Returns name, title, effect and its interval of each detector."""
    effects = report.effects
    largest = {"bbsd_ks": effects.bbsd, "properties_ks": effects.properties} if effects else {}
    titles = {detector.name: detector.title for detector in DETECTORS}
    rows = []
    for name in report.adjusted_p_values:
        told = "{:.3f}"
        ends = report.intervals.get(name)
        if name in largest:
            effect = f"KS distance {largest[name].ks_distance:.3f} in {largest[name].dimension}"
        elif effects is not None and name in effects.mmd:
            standardised = effects.mmd_standardised[name]
            ends = (math.sqrt(max(0.0, ends[0])), math.sqrt(max(0.0, ends[1]))) if ends else None
            effect = f"MMD {effects.mmd[name]:.3f}, {standardised:+.1f} standard deviations of its null"
        elif name in {"classifier", "encoder_classifier"}:
            effect = f"tells {report.statistics[name]:.0%} of pairs apart; by chance half of them"
            told = "{:.0%}"
        elif name in {"bbsd_mean", "properties_mean"}:
            effect = f"{report.statistics[name]:.1f} times as far apart as by chance"
            told = "{:.1f}"
        else:
            effect = f"{report.statistics[name]:.3f}"
        rows.append((name, titles.get(name, name), effect, " to ".join(map(told.format, ends)) if ends else ""))
    return rows
