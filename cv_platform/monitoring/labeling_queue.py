"""Fills the queue of images that people are asked to label, from the requests that came since it was filled last.

Each request with a kept upload is in one window of the queue, by the time when it reached the database, which begins
where the last one ended: what an outage has kept in a spool is in the next. The random share is drawn from all of them
with a chance that is noted, whatever the other reasons choose: its inverse is the weight of what people say of it in
`production_metrics`. The other reasons look at `labels.max_candidates`, at what drives the drift report and at what a
challenger answers otherwise than the champion, an upload once. Vectors of uploads are not kept, as a deletion is to
reach everything.

Images of a folder that nobody has labelled (`QueueSources.unlabelled`) are a reason of their own. Those that are chosen
get an upload and a prediction in the log, as labels belong to these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from uuid import UUID, uuid4

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, Text, cast, func, select
from sqlalchemy.dialects.postgresql import insert

from cv_platform.config import ExperimentConfig
from cv_platform.database.schema import (
    deletions,
    feedback,
    images,
    is_request,
    labeling_items,
    predictions,
    shadow_answers,
)
from cv_platform.database.uploads import read_images
from cv_platform.datasets.embeddings import read_embeddings
from cv_platform.datasets.manifest import read_manifest
from cv_platform.datasets.near_copies import THUMBNAIL_PX, find_near_copies, thumbnail
from cv_platform.encoders.embeddings import embed_files
from cv_platform.encoders.encoder import open_encoder
from cv_platform.errors import ImageError, StorageError
from cv_platform.images.files import format_by_signature
from cv_platform.monitoring.queue_choice import POOL, RANDOM, choose, novelty, uncertainty
from cv_platform.monitoring.window import WindowBounds
from cv_platform.predictions import LABELLER
from cv_platform.records import DatasetVersion, DriftReport, Embeddings, LabelingQueue, Replay
from cv_platform.serving.log.deletion import DELETION_LOCK
from cv_platform.serving.model.unknown import UNKNOWN, load_rule
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

UNLABELLED = "unlabelled"
_COLUMNS = ("prediction_id", "model_version", "prediction_json", "features", "image_sha256")


class UnlabelledFolder(Protocol):
    """Images with what a model said of them, see `scoring.unlabelled`."""

    def least_sure(self, most: int) -> pd.DataFrame:
        """Returns rows of `predictions`, with a `path`."""
        ...

    def read(self, path: str, sha256: str) -> bytes:
        """Returns an image."""
        ...


@dataclass(frozen=True)
class QueueSources:
    """What the queue is filled from, besides the request log.

    Attributes:
        dataset, embeddings: the images that are known.
        report: the latest drift report; None without any.
        storage: has the bundles' rules for unknown images.
        settings: `home` keeps vectors and bundles.
        replay: the latest replay of a challenger; None without any.
        unlabelled: images of a folder that were scored; None without any.
    """

    dataset: DatasetVersion
    embeddings: Embeddings
    report: DriftReport | None
    storage: CentralStorage
    settings: Settings
    replay: Replay | None = None
    unlabelled: UnlabelledFolder | None = None

    @property
    def driving(self) -> dict[str, float]:
        """How strongly uploads drive the report, by sha256."""
        images = self.report.top_images if self.report else []
        return {image["image_sha256"]: float(image["score"]) for image in images if image["image_sha256"]}

    @property
    def replayed(self) -> dict[str, float]:
        """How sure the replayed challenger was of another answer, by upload; without those whose class is stated."""
        changed = self.replay.changed if self.replay else ()
        return {one.image_sha256: one.new_confidence for one in changed if one.stated is None}


@dataclass(frozen=True)
class _Candidates:
    """Images that may be asked about.

    Attributes:
        rows: of `predictions`, those of a folder last.
        contents: of the folder's, by sha256.
        requests: of the window, of which `rows` may have a sample.
    """

    rows: pd.DataFrame
    contents: Mapping[str, bytes]
    requests: int


def fill_queue(config: ExperimentConfig, engine: Engine, sources: QueueSources, *, now: datetime) -> LabelingQueue:
    """Adds up to `labels.queue_size` images to the queue.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError, EncoderError, DatasetError: see there.
    """
    labels, quotas = config.labels, config.labels.quotas()
    with engine.connect() as connection:
        start = _last_end(connection, config) or now - timedelta(days=config.monitor.window_days)
    bounds, upload = WindowBounds(start, now, "logged"), predictions.c.image_sha256
    inside = (predictions.c.model_name == config.model.model_name) & upload.is_not(None) & bounds.holds() & is_request()
    by_hash = (
        func.hashtextextended(cast(predictions.c.prediction_id, Text), config.monitor.seed),
        predictions.c.prediction_id,
    )
    most = max(labels.max_candidates, quotas[RANDOM])
    sample = select(predictions.c.prediction_id).where(inside).order_by(*by_hash).limit(most)
    disputed = (
        select(predictions.c.prediction_id)
        .join(shadow_answers)
        .where(inside & ~shadow_answers.c.agrees)
        .order_by(*by_hash)
        .limit(labels.max_candidates)
    )
    is_candidate = (
        predictions.c.prediction_id.in_(sample)
        | predictions.c.prediction_id.in_(disputed)
        | upload.in_([*sources.driving, *sources.replayed])
    )
    wanted = select(*(predictions.c[name] for name in _COLUMNS)).where(inside & is_candidate).order_by(*by_hash)
    with bounds.snapshot(engine) as connection:
        requests = int(connection.execute(select(func.count()).select_from(predictions).where(inside)).scalar_one())
        rows = pd.DataFrame([tuple(row) for row in connection.execute(wanted)], columns=pd.Index(_COLUMNS))
    problems: list[str] = []
    counts: dict[str, int] = {}
    folder, contents = _of_folder(config, engine, sources, problems)
    if len(folder):
        rows = pd.concat([part for part in (rows, folder) if len(part)], ignore_index=True)
    if len(rows) and labels.queue_size:
        items = _chosen(config, engine, sources, _Candidates(rows, contents, requests), problems)
        with engine.begin() as connection:
            _log_folder(connection, rows, contents, {item["prediction_id"] for item in items}, now)
            counts = _add(connection, config, items, now)
    with engine.connect() as connection:
        waiting = connection.execute(
            select(func.count())
            .select_from(labeling_items.join(predictions))
            .where((labeling_items.c.experiment == config.name) & upload.is_not(None) & ~is_labelled())
        ).scalar_one()
    return LabelingQueue(
        experiment=config.name,
        window_start_utc=start,
        window_end_utc=now,
        requests=requests,
        candidates=len(rows),
        counts=counts,
        waiting=int(waiting),
        problems=tuple(problems),
    )


def _of_folder(
    config: ExperimentConfig, engine: Engine, sources: QueueSources, problems: list[str]
) -> tuple[pd.DataFrame, dict[str, bytes]]:
    """Returns rows of a folder's images that are neither in the dataset nor in the log, and their bytes by sha256."""
    quota = config.labels.quotas()["unlabelled"]
    if sources.unlabelled is None or not quota:
        return pd.DataFrame(), {}
    known = set(read_manifest(sources.dataset.manifest_path)["sha256"])
    rows = sources.unlabelled.least_sure(config.labels.max_candidates)
    with engine.connect() as connection:
        upload, gone = predictions.c.image_sha256, deletions.c.prediction_id
        known |= set(connection.execute(select(upload).where(upload.in_(rows["image_sha256"].tolist()))).scalars())
        deleted = set(connection.execute(select(gone).where(gone.in_(rows["prediction_id"].tolist()))).scalars())
    is_new = ~rows["image_sha256"].isin(list(known)) & ~rows["prediction_id"].isin(list(deleted))
    rows = rows.loc[is_new].head(POOL * quota)
    contents: dict[str, bytes] = {}
    for path, sha256 in zip(rows["path"], rows["image_sha256"], strict=True):
        try:
            contents[sha256] = sources.unlabelled.read(path, sha256)
        except StorageError as err:
            problems.append(str(err))
    return rows.loc[rows["image_sha256"].isin(list(contents))], contents


def _log_folder(
    connection: Connection, rows: pd.DataFrame, contents: Mapping[str, bytes], chosen: set[UUID], now: datetime
) -> None:
    """Gives the chosen images of a folder an upload and a prediction, unless it was deleted meanwhile."""
    connection.execute(select(func.pg_advisory_xact_lock_shared(DELETION_LOCK)))
    gone = set(
        connection.execute(
            select(deletions.c.prediction_id).where(deletions.c.prediction_id.in_(list(chosen)))
        ).scalars()
    )
    columns = [column.name for column in predictions.c if column.name in rows.columns]
    for row in rows.loc[:, columns].to_dict(orient="records"):
        content = contents.get(row["image_sha256"])
        if content is None or row["prediction_id"] not in chosen - gone:
            continue
        upload = {"sha256": row["image_sha256"], "content": content, "bytes": len(content), "created_on": now}
        media_type = f"image/{format_by_signature(content[:16]) or 'octet-stream'}".lower()
        connection.execute(insert(images).values(**upload, media_type=media_type).on_conflict_do_nothing())
        connection.execute(insert(predictions).values(**row, created_on=now).on_conflict_do_nothing())


def is_labelled() -> Any:
    """Returns the SQL condition on `labeling_items` that a labeller has said what it shows."""
    said = (feedback.c.prediction_id == labeling_items.c.prediction_id) & feedback.c.source.startswith(LABELLER)
    return select(feedback.c.id).where(said).exists()


def _last_end(connection: Connection, config: ExperimentConfig) -> datetime | None:
    ends = select(func.max(labeling_items.c.window_end_utc)).where(labeling_items.c.experiment == config.name)
    return connection.execute(ends).scalar_one()


def _chosen(
    config: ExperimentConfig,
    engine: Engine,
    sources: QueueSources,
    candidates: _Candidates,
    problems: list[str],
) -> list[dict[str, Any]]:
    """Returns the rows of `labeling_items`."""
    rows = candidates.rows
    uploads = list(dict.fromkeys(rows["image_sha256"]))
    vectors, thumbnails = _look(config, engine, uploads, sources, candidates.contents)
    row_of = {sha256: number for number, sha256 in enumerate(uploads)}
    at = np.array([row_of[sha256] for sha256 in rows["image_sha256"]])
    groups = find_near_copies(thumbnails).sets(len(uploads))[at]
    scores = _scores(config, sources, rows, vectors[at], problems)
    disputed = {**sources.replayed, **_shadowed(engine, rows)}
    surest = np.array([disputed.get(sha256, np.nan) for sha256 in rows["image_sha256"]])
    scores["disagreeing"] = np.where(rows["image_sha256"].duplicated(), np.nan, surest)
    readable = np.isfinite(vectors[at]).all(axis=1)
    quotas = config.labels.quotas()
    for reason in scores.keys() - {RANDOM}:
        scores[reason] = np.where(readable, scores[reason], np.nan)
    is_sent = ~rows["image_sha256"].isin(list(candidates.contents)).to_numpy()
    for reason, score in scores.items():
        scores[reason] = np.where(is_sent == (reason != UNLABELLED), score, np.nan)
    chance = min(1.0, quotas[RANDOM] / max(candidates.requests, 1))
    return [
        {
            "prediction_id": rows["prediction_id"].iat[choice.position],
            "reason": choice.reason,
            "score": choice.score,
            "chance": chance if choice.reason == RANDOM else None,
        }
        for choice in choose(scores, quotas, np.nan_to_num(vectors[at]), groups, seed=config.monitor.seed)
    ]


def _look(
    config: ExperimentConfig,
    engine: Engine,
    uploads: Sequence[str],
    sources: QueueSources,
    contents: Mapping[str, bytes],
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Returns vectors of uploads, NaN of those that do not decode, and their thumbnails."""
    encoder = open_encoder(config.encoder, sources.settings.home, config.model.sample_bits)
    thumbnails = np.zeros((len(uploads), THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    pixels: dict[int, NDArray[np.uint8]] = {}
    for number, sha256 in enumerate(uploads):
        content = contents.get(sha256) or read_images(engine, [sha256]).get(sha256, b"")
        try:
            pixels[number] = encoder.pixels(content)
        except ImageError:
            continue
        thumbnails[number] = thumbnail(pixels[number])
    with TemporaryDirectory(prefix="cv-queue-") as folder:
        vectors = embed_files(uploads, lambda part: [pixels.get(at) for at in part], encoder, Path(folder))
    return vectors, thumbnails


def _scores(
    config: ExperimentConfig,
    sources: QueueSources,
    rows: pd.DataFrame,
    vectors: NDArray[np.float16],
    problems: list[str],
) -> dict[str, NDArray[np.float64]]:
    paths = read_manifest(sources.dataset.manifest_path)["path"]
    known = read_embeddings(sources.embeddings, sources.dataset.manifest, paths)
    known = known[np.isfinite(known).all(axis=1)]
    driving = sources.driving
    first = ~rows["image_sha256"].duplicated().to_numpy()
    scores = {
        "unknown": _unknown(config, sources, rows, problems),
        "drift": np.array([driving.get(sha256, np.nan) for sha256 in rows["image_sha256"]]),
        "novel": novelty(np.nan_to_num(vectors), known),
        "uncertain": _uncertain(config, sources, rows),
    }
    scores[UNLABELLED] = scores["uncertain"]
    for reason, score in scores.items():
        scores[reason] = np.where(first, score, np.nan)
    # They come in the order of a hash: the first of them are a random sample of all.
    return {RANDOM: -np.arange(len(rows), dtype=np.float64), **scores}


def _shadowed(engine: Engine, rows: pd.DataFrame) -> dict[str, float]:
    """Returns how sure a shadow was of another answer than the client was told, by upload."""
    ids = rows["prediction_id"].tolist()
    said = (
        select(predictions.c.image_sha256, shadow_answers.c.probabilities)
        .join(shadow_answers)
        .where(predictions.c.prediction_id.in_(ids) & ~shadow_answers.c.agrees)
    )
    with engine.connect() as connection:
        return {str(sha256): float(max(probabilities)) for sha256, probabilities in connection.execute(said)}


def _uncertain(config: ExperimentConfig, sources: QueueSources, rows: pd.DataFrame) -> NDArray[np.float64]:
    """Returns `(N,)`: how close the answers were to other ones, by the thresholds of their models."""
    scores, model = np.full(len(rows), np.nan), config.model
    for version, part in rows.groupby("model_version"):
        limits: dict[str, float] = {}
        with suppress(StorageError):  # What nobody has published has today's threshold.
            facts = sources.storage.read_metadata(model.model_name, str(version))
            each = np.broadcast_to(facts.threshold, len(facts.class_names)).tolist()
            limits = dict(zip(facts.class_names, each, strict=True))
        for at in part.index:
            if said := rows["prediction_json"].iat[at]:
                thresholds = np.array([limits.get(name, model.threshold) for name in said])
                is_multi_label = model.classifier_type == "multi-label"
                scores[at] = uncertainty(np.array([list(said.values())]), thresholds if is_multi_label else None)[0]
    return scores


def _unknown(
    config: ExperimentConfig, sources: QueueSources, rows: pd.DataFrame, problems: list[str]
) -> NDArray[np.float64]:
    """Returns `(N,)`: how unknown those are that their model's rule calls so; else NaN."""
    scores = np.full(len(rows), np.nan)
    for version, part in rows.groupby("model_version"):
        try:
            cache = sources.settings.home / "cache"
            bundle, facts = sources.storage.fetch_bundle(config.model.model_name, str(version), cache)
            rule = load_rule(bundle / UNKNOWN, feature_dims=facts.feature_dims, classes=len(facts.class_names))
        except StorageError as err:
            problems.append(f"Unknown images of {version} were not looked for: {err}")
            continue
        positions = np.array([at for at in part.index if len(rows["features"].iat[at]) == facts.feature_dims])
        if rule is None or not len(positions):
            continue
        score = rule.score(np.array([rows["features"].iat[at] for at in positions], np.float32))
        scores[positions] = np.where(score > 1.0, score, np.nan)
    return scores


def _add(
    connection: Connection, config: ExperimentConfig, items: Sequence[dict[str, Any]], end: datetime
) -> dict[str, int]:
    """Adds items that are not in the queue, and returns how many by reason; two runs at once add each once."""
    counts: dict[str, int] = {}
    # One that is deleted meanwhile would break the rest.
    alive = set(
        connection.execute(
            select(predictions.c.prediction_id)
            .where(predictions.c.prediction_id.in_([item["prediction_id"] for item in items]))
            .with_for_update(read=True, key_share=True)
        ).scalars()
    )
    for place, item in enumerate(items):
        if item["prediction_id"] in alive:
            row = {**item, "item_id": uuid4(), "experiment": config.name, "window_end_utc": end, "place": place}
            added = connection.execute(insert(labeling_items).values(row).on_conflict_do_nothing()).rowcount
            counts[item["reason"]] = counts.get(item["reason"], 0) + added
    return counts
