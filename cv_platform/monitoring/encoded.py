"""The pretrained encoder's vectors of what a drift report compares, for the detectors that need them.

Those of the dataset's images were made for the asset `embeddings`, and are read. Those of uploads are computed from the
stored images when a report is made, never while a request waits, and are kept in the database for as long as the
upload: a deletion takes both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine

from cv_platform.config import ExperimentConfig
from cv_platform.database.uploads import keep_vectors, read_images, read_vectors
from cv_platform.drift.detectors import seeded_rows
from cv_platform.drift.reference import read_reference_labels
from cv_platform.drift.sample import DriftSample
from cv_platform.encoders.embeddings import kept_vectors
from cv_platform.encoders.encoder import BATCH_IMAGES, Encoder, open_encoder
from cv_platform.errors import ImageError
from cv_platform.monitoring.window import Window


@dataclass(frozen=True)
class Encoded:
    """Both sides of a comparison with the encoder's vectors, and what is missing in them.

    Attributes:
        reference, current: the samples.
        path: parquet of the reference.
        rows: of the current one, those that have a vector.
        problems: in sentences.
    """

    reference: DriftSample
    current: DriftSample
    path: Path
    rows: int = 0
    problems: tuple[str, ...] = ()


def with_encoded(
    config: ExperimentConfig,
    engine: Engine,
    home: Path,
    reference: DriftSample,
    reference_path: Path,
    window: Window,
    *,
    is_accepted: bool,
) -> Encoded:
    """Adds the encoder's vectors where a configured detector needs them, of `monitor.max_encoded` uploads at most.

    Args:
        config: `monitor` and `encoder`.
        engine: of the request log.
        home: `Settings.home`: has the encoder, and the vectors of the dataset's images.
        reference: the rows of `reference_path`.
        reference_path: parquet, which has the sha256 of its images.
        window: what is compared with it.
        is_accepted: the reference is of uploads, not of the dataset's images.

    Raises:
        EncoderError: the encoder cannot be used.
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    assert window.sample is not None
    if not config.monitor.needs_encoder:
        return Encoded(reference, window.sample, reference_path)
    encoder, monitor = open_encoder(config.encoder, home, config.model.sample_bits), config.monitor

    def of_uploads(sha256s: Sequence[str | None]) -> NDArray[np.float16]:
        vectors = np.full((len(sha256s), encoder.features), np.nan, np.float16)
        rows = seeded_rows(len(sha256s), monitor.max_encoded, monitor.seed)
        made = _vectors(engine, encoder, [sha256 for row in rows if (sha256 := sha256s[int(row)])])
        for row in rows:
            vectors[row] = made.get(sha256s[int(row)] or "", np.nan)
        return vectors

    images = read_reference_labels(reference_path)["sha256"].tolist()
    known = of_uploads(images) if is_accepted else kept_vectors(images, encoder, home)
    uploads = window.rows["image_sha256"]
    current = window.sample.with_encoded(of_uploads(uploads.where(uploads.notna(), None).tolist()))
    reference = reference.with_encoded(known)
    problems: list[str] = []
    asked, rows = min(len(current), monitor.max_encoded), len(current.encoded_rows)
    if rows < asked:
        problems.append(
            f"The encoder looked at {rows} of {asked} images of the window: the others were not kept, are deleted, or "
            "do not decode."
        )
    if len(reference.encoded_rows) < 2 or rows < 2:
        problems.append(
            f"The encoder's tests took no part: they have {len(reference.encoded_rows)} images of the reference and "
            f"{rows} of the window. Materialise embeddings, and keep uploads (CV_LOG_IMAGES=all)."
        )
    return Encoded(reference, current, reference_path, rows, tuple(problems))


def _vectors(engine: Engine, encoder: Encoder, sha256s: Sequence[str]) -> dict[str, NDArray[np.float16]]:
    """Returns the vectors of the uploads that are there and decode; computes and keeps those that nobody has."""
    known = read_vectors(engine, sha256s, encoder.key)
    missing = sorted(set(sha256s) - known.keys())
    for start in range(0, len(missing), BATCH_IMAGES):
        uploads = read_images(engine, missing[start : start + BATCH_IMAGES])
        pixels = dict(_decoded(uploads, encoder))
        made = {sha256: np.empty(0, np.float16) for sha256 in uploads}
        if pixels:
            made |= dict(zip(pixels, encoder.embed(np.stack([*pixels.values()])).astype(np.float16), strict=True))
        keep_vectors(engine, made, encoder.key)
        known |= made
    return {sha256: vector for sha256, vector in known.items() if vector.size == encoder.features}


def _decoded(uploads: dict[str, bytes], encoder: Encoder) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for sha256, content in uploads.items():
        try:
            yield sha256, encoder.pixels(content)
        except ImageError:
            continue
