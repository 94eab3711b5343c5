"""The challenger on what production was asked last: the champion's logged uploads, answered by both, side by side.

The gate has compared the two on test images, which are as old as the dataset; these are what people send now. Both
answer from their published bundles, each with its own pixels, thresholds and rule for unknown images. An upload counts
once. Accuracy is compared on uploads that people have labelled and neither model was trained on.

Only what is sure refuses a challenger: a share counts as beyond its limit where its 95 % interval (Wilson) is.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, select

from cv_platform import images
from cv_platform.compute import map_shards
from cv_platform.compute.engine import Engine as ComputeEngine
from cv_platform.compute.engine import Salvage, patiently
from cv_platform.compute.local import WORTH_SECONDS
from cv_platform.config import EvaluateConfig, ExperimentConfig, ReplayConfig
from cv_platform.database.schema import images as stored_images
from cv_platform.database.schema import is_request, predictions
from cv_platform.database.uploads import read_feedback, read_images
from cv_platform.deployment.bundle import TRAINED_ON
from cv_platform.deployment.champion import class_difference, images_seen
from cv_platform.drift.reference import label_targets
from cv_platform.errors import BundleNotFoundError, CorruptBundleError, ImageError
from cv_platform.evaluation.gate import compare
from cv_platform.evaluation.intervals import wilson
from cv_platform.files import whole_file
from cv_platform.pages import picture, render
from cv_platform.predictions import label_texts, predicted_flags
from cv_platform.records import ChangedAnswer, Comparison, ModelIdentity, Replay
from cv_platform.serving.model.runtime import LoadedModel, PublishedModel, fetch
from cv_platform.storage import BundleMetadata, CentralStorage

_BATCH = 32
_BATCH_BYTES = 16 * 2**20
"""The most that the uploads of a shard have, unless it is one alone: the driver holds three shards for each worker."""
_ROWS_PER_UPLOAD = 5
"""So many requests are looked at for each upload that is wanted: an upload may have been sent again and again."""
_SHOWN = 24
_NAMED = 5
_PICTURE_PX = 120


@dataclass(frozen=True)
class _Upload:
    """An upload, its size, and the requests that sent it, the latest first."""

    sha256: str
    bytes: int
    prediction_ids: list[UUID]


@dataclass(frozen=True)
class UploadShard:
    """Some uploads: a shard. It has their bytes, so that nobody else needs to reach the request log, or its password.

    Attributes:
        name: the sha256 of the first one.
        contents: the bytes of each; none of one that is gone.
    """

    name: str
    contents: Sequence[bytes]

    @property
    def images(self) -> int:
        """Returns how many uploads it has."""
        return len(self.contents)


@dataclass(frozen=True)
class ModelAnswers:
    """What a model says of the readable uploads of a shard.

    Attributes:
        probabilities: `(n, C)`, by the model's own classes.
        unknown: `(n,)`, whether each image is unknown to it; None: it has no rule for that.
        cpu_seconds: CPU time that the answers took.
    """

    probabilities: NDArray[np.float32]
    unknown: NDArray[np.bool_] | None
    cpu_seconds: float


@dataclass
class _Side:
    """One of the two models, and what it has answered."""

    model: PublishedModel
    facts: BundleMetadata
    folder: Path
    class_names: Sequence[str]
    """The challenger's, by whose order both are compared."""
    probabilities: list[NDArray[np.float32]] = field(default_factory=list[NDArray[np.float32]])
    unknown: list[NDArray[np.bool_]] = field(default_factory=list[NDArray[np.bool_]])
    cpu_seconds: float = 0.0

    def take(self, answers: ModelAnswers) -> None:
        columns = [self.facts.class_names.index(name) for name in self.class_names]
        self.probabilities.append(answers.probabilities[:, columns])
        if answers.unknown is not None:
            self.unknown.append(answers.unknown)
        self.cpu_seconds += answers.cpu_seconds

    def decisions(self) -> NDArray[np.bool_]:
        """Returns `(N, C)`: what it decides, by its own thresholds."""
        facts = self.facts
        threshold = facts.threshold
        if isinstance(threshold, tuple):
            threshold = tuple(threshold[facts.class_names.index(name)] for name in self.class_names)
        return predicted_flags(np.concatenate(self.probabilities), facts.classifier_type, threshold)

    def confidences(self) -> NDArray[np.float64]:
        """Returns `(N,)`: the largest probability of each image."""
        return np.concatenate(self.probabilities).max(axis=1).astype(np.float64)

    def unknown_rate(self) -> float | None:
        return float(np.concatenate(self.unknown).mean()) if self.unknown else None


def replay_challenger(
    challenger: ModelIdentity,
    champion: ModelIdentity,
    config: ExperimentConfig,
    *,
    engine: Engine,
    storage: CentralStorage,
    home: Path,
    directory: Path,
    compute: ComputeEngine | None = None,
) -> Replay:
    """Lets a published challenger answer the last logged uploads of the version in production, and judges it.

    A champion that cannot be asked refuses the challenger, in words, as in the gate: it does not stand aside.

    Args:
        challenger: a published version, which wants the place.
        champion: the version in production, see `champion.champion_of`.
        config: `deploy.replay` has the limits; `evaluate` says how accuracies are compared.
        engine: of the request log.
        storage: central storage.
        home: downloads are kept in `home/cache`.
        directory: where the page goes, `replay.html`.
        compute: who decodes and answers; None: processes of this machine.

    Raises:
        BundleNotFoundError, CorruptBundleError: the challenger cannot be loaded.
        DatabaseUnavailableError, SchemaMismatchError, StorageError: see there.
    """
    limits = config.deploy.replay
    uploads, not_kept = _last_uploads(engine, champion, limits.max_requests)
    replay = Replay(model=challenger, champion=champion, directory=directory, not_kept=not_kept)
    if not uploads:
        return replay.model_copy(update={"reasons": (f"{champion.version} has answered no request that can be read",)})
    new = _side(challenger, storage, home)
    try:
        old = _side(champion, storage, home, new.class_names)
        problem = class_difference(old.facts, new.class_names, new.facts.classifier_type)
    except (BundleNotFoundError, CorruptBundleError) as err:
        problem, old = f"its bundle does not answer. {err}", None
    if old is None or problem:
        reasons = (f"{champion.version} in production cannot be compared with: {problem}",)
        return replay.model_copy(update={"passed": False, "reasons": reasons})
    answered, unreadable = _answer(engine, uploads, old, new, compute)
    replay = replay.model_copy(update={"unreadable": tuple(map(str, unreadable))})
    if not answered:
        return replay.model_copy(update={"reasons": ("no logged upload can be read (any more)",)})
    replay = _judged(_measured(replay, engine, answered, old, new, config.evaluate), limits, config.evaluate)
    _write_page(replay, engine, new.model.load().preprocessing.sample_bits)
    return replay


def _last_uploads(engine: Engine, champion: ModelIdentity, count: int) -> tuple[list[_Upload], int]:
    """Returns the uploads that it was asked about last, the latest first, and how many requests have none any more."""
    table = predictions.c
    latest = (
        select(table.prediction_id, table.image_sha256, stored_images.c.bytes)
        .outerjoin(stored_images, stored_images.c.sha256 == table.image_sha256)
        .where(table.model_name == champion.model_name, table.model_version == champion.version, is_request())
        .order_by(table.created_on.desc(), table.prediction_id)
        .limit(count * _ROWS_PER_UPLOAD)
    )
    found: dict[str, _Upload] = {}
    not_kept = 0
    with engine.connect() as connection:
        for prediction_id, sha256, size in connection.execute(latest):
            if sha256 is None:
                not_kept += 1
            elif sha256 in found:
                found[sha256].prediction_ids.append(prediction_id)
            elif len(found) < count:
                found[sha256] = _Upload(sha256, size or 0, [prediction_id])
    return list(found.values()), not_kept


def _side(model: ModelIdentity, storage: CentralStorage, home: Path, class_names: Sequence[str] = ()) -> _Side:
    folder, facts = patiently(str(model), fetch, storage, model.model_name, model.version, cache=home / "cache")
    published = PublishedModel(storage.url, model.model_name, model.version, home, "cache")
    published.load()  # Refused here, if at all.
    return _Side(published, facts, folder, class_names or facts.class_names)


def _answer(
    engine: Engine, uploads: Sequence[_Upload], old: _Side, new: _Side, compute: ComputeEngine | None
) -> tuple[list[_Upload], list[UUID]]:
    """Lets both answer, shard by shard; returns the uploads that they have answered, and requests of the rest."""
    answered: list[_Upload] = []
    unreadable: list[UUID] = []
    batches = list(_batches(uploads))
    shards = map_shards(
        partial(answer_uploads, old.model, new.model),
        (_with_contents(engine, batch) for batch in batches),
        engine=compute,
        title="Replay",
        total=len(uploads),
        alone_seconds=WORTH_SECONDS,
        salvage=_ONE_BY_ONE,
    )
    for batch, (_, (is_readable, answers)) in zip(batches, shards, strict=True):
        for upload, readable in zip(batch, is_readable, strict=True):
            if readable:
                answered.append(upload)
            else:
                unreadable.append(upload.prediction_ids[0])
        for side, by_it in zip((old, new), answers, strict=False):
            side.take(by_it)
    return answered, unreadable


def _batches(uploads: Sequence[_Upload]) -> Iterator[list[_Upload]]:
    """Yields the uploads of each shard, in order."""
    batch: list[_Upload] = []
    for upload in uploads:
        is_full = sum(one.bytes for one in batch) + upload.bytes > _BATCH_BYTES or len(batch) == _BATCH
        if batch and is_full:
            yield batch
            batch = []
        batch.append(upload)
    yield batch


def _with_contents(engine: Engine, uploads: Sequence[_Upload]) -> UploadShard:
    contents = read_images(engine, [upload.sha256 for upload in uploads])
    # One may have been deleted a moment ago.
    return UploadShard(uploads[0].sha256, [contents.get(upload.sha256, b"") for upload in uploads])


def answer_uploads(
    old: PublishedModel, new: PublishedModel, shard: UploadShard
) -> tuple[list[bool], list[ModelAnswers]]:
    """Returns which uploads of a shard can be read, and what both models say of those; nothing if there are none."""
    models = old.load(), new.load()
    is_same = models[0].metadata.preprocessing_hash == models[1].metadata.preprocessing_hash
    batches: tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]] = ([], [])
    is_readable: list[bool] = []
    for content in shard.contents:
        try:
            pixels = _pixels(models[1], content)
            seen = pixels if is_same else _pixels(models[0], content)
        except ImageError:
            is_readable.append(False)
            continue
        batches[0].append(seen)
        batches[1].append(pixels)
        is_readable.append(True)
    if not batches[0]:
        return is_readable, []
    return is_readable, [_answers(model, np.stack(batch)) for model, batch in zip(models, batches, strict=True)]


def _joined(parts: Sequence[tuple[list[bool], list[ModelAnswers]]]) -> tuple[list[bool], list[ModelAnswers]]:
    """Returns what several calls of `answer_uploads` have returned as one."""
    answers = [
        ModelAnswers(
            np.concatenate([one.probabilities for one in by_it]),
            None
            if by_it[0].unknown is None
            else np.concatenate([one.unknown for one in by_it if one.unknown is not None]),
            sum(one.cpu_seconds for one in by_it),
        )
        for by_it in zip(*(answers for _, answers in parts if answers), strict=True)
    ]
    return [one for is_readable, _ in parts for one in is_readable], answers


_ONE_BY_ONE: Salvage[UploadShard, tuple[list[bool], list[ModelAnswers]]] = Salvage(
    divide=lambda shard: (UploadShard(hashlib.sha256(one).hexdigest(), [one]) for one in shard.contents),
    join=_joined,
    lost=lambda upload, why: ([False], []),
)


def _pixels(model: LoadedModel, content: bytes) -> NDArray[np.uint8]:
    limit = images.MAX_LOCAL_PIXELS
    return images.preprocess(content, model.metadata.image_size, max_pixels=limit, preprocessing=model.preprocessing)


def _answers(model: LoadedModel, batch: NDArray[np.uint8]) -> ModelAnswers:
    before = time.process_time()
    answer = model.predict_batch(batch)
    seconds = time.process_time() - before
    unknown = None if model.unknown is None else model.unknown.score(answer.features) > 1.0
    return ModelAnswers(answer.probabilities, unknown, seconds)


def _measured(
    replay: Replay, engine: Engine, uploads: Sequence[_Upload], old: _Side, new: _Side, evaluate: EvaluateConfig
) -> Replay:
    before, after = old.decisions(), new.decisions()
    is_changed = (before != after).any(axis=1)
    stated = read_feedback(engine, [one for upload in uploads for one in upload.prediction_ids])
    truth = [next((stated[one] for one in upload.prediction_ids if one in stated), None) for upload in uploads]
    confidence = old.confidences(), new.confidences()
    answers = [label_texts(flags, new.class_names) for flags in (before, after)]
    # The surest new answers first: what people would be told with conviction.
    order = sorted(np.flatnonzero(is_changed).tolist(), key=lambda at: -confidence[1][at])
    changed = [
        ChangedAnswer(
            prediction_id=str(uploads[at].prediction_ids[0]),
            image_sha256=uploads[at].sha256,
            old=answers[0][at],
            old_confidence=float(confidence[0][at]),
            new=answers[1][at],
            new_confidence=float(confidence[1][at]),
            stated=truth[at],
        )
        for at in order[:_SHOWN]
    ]
    figures = {
        "replayed": len(uploads),
        "agreed": int((~is_changed).sum()),
        "changed": tuple(changed),
        "labelled": sum(label is not None for label in truth),
        "comparison": _compared(replay, uploads, truth, old, new, evaluate),
        "confidence": float(confidence[1].mean()),
        "champion_confidence": float(confidence[0].mean()),
        "unknown_rate": new.unknown_rate(),
        "champion_unknown_rate": old.unknown_rate(),
        "cpu_ms": 1000 * new.cpu_seconds / len(uploads),
        "champion_cpu_ms": 1000 * old.cpu_seconds / len(uploads),
    }
    return replay.model_copy(update=figures)


def _compared(
    replay: Replay,
    uploads: Sequence[_Upload],
    truth: Sequence[str | None],
    old: _Side,
    new: _Side,
    evaluate: EvaluateConfig,
) -> Comparison | None:
    """Compares the two on labelled uploads that neither has learned; None without any."""
    sha256 = [upload.sha256 for upload in uploads]
    learned = [images_seen(side.folder / TRAINED_ON, sha256) for side in (old, new)]
    is_fresh = np.array([label is not None for label in truth])
    for seen in learned:
        is_fresh &= True if seen is None else ~seen
    if not is_fresh.any():
        return None
    labels = [label for label, fresh in zip(truth, is_fresh, strict=True) if fresh and label is not None]
    return compare(
        label_targets(labels, tuple(new.class_names)),
        new.decisions()[is_fresh],
        old.decisions()[is_fresh],
        evaluate,
        new.class_names,
        replay.champion.version if replay.champion else "",
    )


def _judged(replay: Replay, limits: ReplayConfig, evaluate: EvaluateConfig) -> Replay:
    failed: list[str] = []
    satisfied: list[str] = []
    compared = replay.comparison
    if compared is not None:
        words = (
            f"of {compared.images} labelled uploads that neither was trained on, {compared.accuracy:.4f} are right "
            f"against {compared.champion_accuracy:.4f} ({compared.only_champion_right} only by the one in production, "
            f"{compared.only_challenger_right} only by the new one, exact McNemar p {compared.p_value:.2g})"
        )
        (failed if compared.outcome == "worse" else satisfied).append(words)
    is_better = compared is not None and compared.low > 0
    _, agreement = wilson(replay.agreed, replay.replayed) or (0.0, 1.0)
    words = f"{replay.agreed} of {replay.replayed} answers stay as they are"
    if agreement >= limits.min_agreement:
        satisfied.append(f"{words}; min_agreement is {limits.min_agreement:g}")
    elif is_better:
        satisfied.append(
            f"{words}, fewer than min_agreement {limits.min_agreement:g}, but labels show that it is better"
        )
    else:
        failed.append(
            f"{words}, fewer than min_agreement {limits.min_agreement:g}, and no labels show that it is better"
        )
    if replay.unknown_rate is not None and replay.champion_unknown_rate is not None:
        low, _ = wilson(round(replay.unknown_rate * replay.replayed), replay.replayed) or (0.0, 1.0)
        words = f"{replay.unknown_rate:.1%} are unknown to it, {replay.champion_unknown_rate:.1%} to that in production"
        is_beyond = low > replay.champion_unknown_rate + limits.max_unknown_increase
        (failed if is_beyond else satisfied).append(f"{words}; max_unknown_increase is {limits.max_unknown_increase:g}")
    ratio = replay.cost_ratio
    if limits.max_cost_ratio is not None and ratio is not None and ratio > limits.max_cost_ratio:
        failed.append(f"an answer costs {ratio:.2f} times the CPU time; max_cost_ratio is {limits.max_cost_ratio:g}")
    if replay.unreadable:
        named = ", ".join(replay.unreadable[:_NAMED])
        satisfied.append(f"{len(replay.unreadable)} uploads are gone or do not decode, such as of {named}")
    return replay.model_copy(update={"passed": not failed, "reasons": tuple(failed or satisfied)})


def _write_page(replay: Replay, engine: Engine, sample_bits: int | None) -> None:
    contents = read_images(engine, [one.image_sha256 for one in replay.changed])
    pictures = {sha256: picture(content, _PICTURE_PX, sample_bits) for sha256, content in contents.items()}
    replay.directory.mkdir(parents=True, exist_ok=True)
    page = render("deployment/replay.html", title=f"Replay of {replay.model}", replay=replay, pictures=pictures)
    with whole_file(replay.page_path) as partial:
        partial.write_text(page, encoding="utf-8")
