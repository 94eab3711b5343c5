"""Scores all images of a source by a published model, batch by batch; what was scored before a kill stays."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import feather

from cv_platform.compute import map_shards
from cv_platform.compute.engine import Engine, Salvage
from cv_platform.datasets.sources.entries import printable
from cv_platform.errors import BundleNotFoundError, LockHeldError
from cv_platform.files import exclusive, whole_file
from cv_platform.scoring.rows import HEAT_MAP, Batch, Scorer, score_batch, scores_schema, unanswered
from cv_platform.scoring.sources import Found, PassedOver, find_images
from cv_platform.serving.model.runtime import PublishedModel
from cv_platform.settings import Settings
from cv_platform.storage import BundleMetadata, CentralStorage

logger = logging.getLogger(__name__)

_MOST_IMAGES = 1024
_FEWEST_IMAGES = 128
_PART = ".arrow"
_BATCHES = 256
"""Of a source, if they are of a size between the two above; more do not lie in a folder beside the output."""


@dataclass(frozen=True)
class Scored:
    """What came of a scoring.

    Attributes:
        images: rows of the output.
        problems: of them, those without an answer.
        unknown: of them, those that show nothing the model has learned.
        passed_over: what of the source has no row.
        computed: those that no earlier, killed scoring had done.
        seconds: that these took.
    """

    images: int
    problems: int
    unknown: int
    passed_over: PassedOver
    computed: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """Says it."""
        rate = f", {self.computed / max(self.seconds, 1e-9):,.0f} per second" if self.computed else ""
        said = f"{self.images:,} images: {self.problems:,} without an answer, {self.unknown:,} unknown; "
        return "; ".join(filter(None, [f"{said}{self.computed:,} scored now{rate}", self.passed_over.line()]))


def score_images(
    source: str,
    version: str,
    output: Path,
    *,
    settings: Settings,
    engine: Engine | None = None,
    heat_maps: bool = False,
) -> Scored:
    """Writes `output`, a Parquet file with exactly one row for each image of `source`; see `rows.scores_schema`.

    Batches lie in a hidden folder beside `output` until all are done: the next call goes on with those of one that was
    killed, if model and files are still the same.

    Args:
        source: see `sources.find_images`.
        version: of a published model.
        output: of the rows; replaced if it is there.
        settings: storage, cache, and the most pixels of an image.
        engine: who scores; None: processes of this machine.
        heat_maps: whether each row has the heat-map over its image, which takes some 12 KB.

    Raises:
        BundleNotFoundError, CorruptBundleError, StorageError: the model cannot be had.
        DatasetError: there are no images.
        LockHeldError: another process writes the same output.
    """
    metadata = published_metadata(CentralStorage(settings.storage_url), version)
    published = PublishedModel(settings.storage_url, metadata.model_name, version, settings.home)
    scorer = Scorer(published, settings.max_upload_pixels, heat_maps)
    schema = scores_schema(metadata, heat_maps=heat_maps)
    parts = output.absolute().with_name(f".{output.name}.parts")
    with _alone(parts, output), _kept_unless_empty(parts):
        logger.info("Listing the images of %s", source)
        found = find_images(source, parts)
        started = time.perf_counter()
        batches = list(_batches(found, metadata, schema))
        computed = _make_parts(batches, scorer, metadata, schema, parts, engine)
        seconds = time.perf_counter() - started
        scored = _join(found, batches, schema, parts, output)
        shutil.rmtree(parts)
    return replace(scored, computed=computed, seconds=seconds)


def published_metadata(storage: CentralStorage, version: str) -> BundleMetadata:
    """Returns the metadata of a version, whatever its model is called.

    Raises:
        BundleNotFoundError: it is not published.
        StorageError: storage cannot be read.
    """
    for model_name, known in storage.stored_bundles():
        if known == version and version in storage.bundle_versions(model_name):
            return storage.read_metadata(model_name, version)
    known = sorted(version for _, version in storage.stored_bundles())
    raise BundleNotFoundError(
        f"Expected a published version. Received: {version}. Published: {', '.join(known[-10:]) or 'none'}."
    )


@contextlib.contextmanager
def _alone(parts: Path, output: Path) -> Iterator[None]:
    try:
        with exclusive(parts.with_name(f"{parts.name}.lock"), timeout_seconds=0.0):
            yield
    except LockHeldError as err:
        raise LockHeldError(
            f"Expected one scoring at a time to write {output}. Received: a second. Wait for the first, or stop it; "
            "then this one goes on from there."
        ) from err


@contextlib.contextmanager
def _kept_unless_empty(parts: Path) -> Iterator[None]:
    """Makes the folder of the parts, and leaves none behind of a scoring whose source is not there."""
    parts.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            parts.rmdir()


def batch_size(images: int) -> int:
    """Returns how many of so many images are scored at a time, and begun anew when that is killed."""
    return min(_MOST_IMAGES, max(_FEWEST_IMAGES, images // _BATCHES))


def _batches(found: Found, metadata: BundleMetadata, schema: pa.Schema) -> Iterator[Batch]:
    """Yields the batches of a source, the same ones for the same files, the same model and the same columns."""
    size = batch_size(len(found.paths))
    model = [metadata.model_name, metadata.version, sorted(metadata.checksums.items())]
    model += [HEAT_MAP] if HEAT_MAP in schema.names else []
    base = hashlib.sha256(json.dumps(model).encode())
    for start in range(0, len(found.paths), size):
        rows = slice(start, start + size)
        digest = base.copy()
        digest.update(json.dumps([found.paths[rows], found.stamps[rows]]).encode())
        yield Batch(digest.hexdigest()[:32], found.root, tuple(found.paths[rows]), tuple(found.sizes[rows]))


def _make_parts(
    batches: Sequence[Batch],
    scorer: Scorer,
    metadata: BundleMetadata,
    schema: pa.Schema,
    parts: Path,
    engine: Engine | None,
) -> int:
    """Scores the batches that have no part yet, and returns how many images these were."""
    done = {path.stem for path in parts.glob(f"*{_PART}")}
    todo = [batch for batch in batches if batch.key not in done]
    missing, total = (sum(batch.images for batch in some) for some in (todo, batches))
    computed = 0
    if missing < total:
        logger.info("%d of %d files were scored before", total - missing, total)
    salvage = Salvage(
        divide=Batch.each,
        join=pa.concat_tables,
        lost=lambda batch, why: unanswered(metadata, schema, batch, f"its decoding {why}"),
    )
    for batch, rows in map_shards(
        partial(score_batch, scorer),
        todo,
        engine=engine,
        title="Scoring",
        total=missing,
        in_order=False,
        salvage=salvage,
    ):
        with whole_file(parts / f"{batch.key}{_PART}") as partial_file:
            feather.write_feather(rows, str(partial_file), compression="uncompressed")  # It is read once.
        computed += len(rows)
    return computed


def _join(found: Found, batches: Sequence[Batch], schema: pa.Schema, parts: Path, output: Path) -> Scored:
    """Writes the parts, in order, as one file; returns what is in them.

    Raises:
        DatasetError: not one image.
    """
    images = problems = unknown = 0
    passed_over: list[str] = []
    # Numbers hardly repeat: a dictionary of them would be made only to be thrown away.
    options: dict[str, Any] = {"use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)]}
    with (
        whole_file(output) as partial_file,
        pq.ParquetWriter(partial_file, schema, compression="zstd", **options) as writer,
    ):
        for batch in batches:
            rows = feather.read_table(str(parts / f"{batch.key}{_PART}")).replace_schema_metadata(schema.metadata)
            passed_over += sorted(set(map(printable, batch.paths)).difference(rows["path"].to_pylist()))
            if not len(rows):
                continue
            images += len(rows)
            problems += len(rows) - rows["problem"].null_count
            unknown += rows.filter(rows["is_unknown"]).num_rows  # Null, where there is no rule, is no.
            writer.write_table(rows)
        if not images:
            shutil.rmtree(parts)
            raise found.no_images(PassedOver.of(passed_over))
    return Scored(images, problems, unknown, found.passed_over + PassedOver.of(passed_over))
