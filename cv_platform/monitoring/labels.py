"""What people said of the images in the log, as labels: one answer per upload, with who gave it, and what has none.

An upload may have been sent several times, and several people may have said what it shows. The labellers' word (who
have keys of their own) goes before that of clients; among them the majority counts, and where there is none, nothing
does. Of clients the latest statement counts, as everywhere: they correct themselves and each other.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Engine, select

from cv_platform.config import ModelConfig
from cv_platform.database.schema import deletions, feedback, predictions
from cv_platform.predictions import LABEL_SEPARATOR, LABELLER, NONE_OF_THESE

_IDS_PER_QUERY = 1000


@dataclass(frozen=True)
class LabelledUpload:
    """An upload with what it shows.

    Attributes:
        sha256: of the upload.
        prediction_id: of the first answer on it that is in the log.
        labels: class names, sorted.
        source: who said so.
        stated_on: when.
        received_on: when the upload came.
        model_version: which answered then.
        predicted_class: what it answered.
    """

    sha256: str
    prediction_id: UUID
    labels: tuple[str, ...]
    source: str
    stated_on: datetime
    received_on: datetime
    model_version: str
    predicted_class: str


@dataclass(frozen=True)
class CollectedLabels:
    """The labels in the log.

    Attributes:
        uploads: in the order in which they came.
        left_out: prediction ids of the statements that gave none, by reason.
    """

    uploads: tuple[LabelledUpload, ...]
    left_out: dict[str, list[str]]


def collect_labels(engine: Engine, model: ModelConfig, *, without: Collection[str] = ()) -> CollectedLabels:
    """Reads what was said of the answers of a model, whichever version gave them.

    Args:
        engine: of the request log.
        model: whose answers, and which classes there are.
        without: sources whose statements do not count.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    said = feedback.c
    answer = predictions.c
    statements = (
        select(
            *(said.prediction_id, said.true_class, said.source, said.created_on.label("stated_on"), said.id),
            *(answer.image_sha256, answer.created_on.label("received_on"), answer.model_version),
            *(answer.predicted_class, answer.model_name),
        )
        .join(predictions, answer.prediction_id == said.prediction_id, isouter=True)
        .where(answer.model_name.is_(None) | (answer.model_name == model.model_name))
        .distinct(said.prediction_id, said.source)
        .order_by(said.prediction_id, said.source, said.created_on.desc(), said.id.desc())
    )
    left_out: dict[str, list[str]] = defaultdict(list)
    by_upload: dict[str, list[Any]] = defaultdict(list)
    with engine.connect() as connection:
        for row in connection.execute(statements):
            if row.source in without:
                left_out[f"of {row.source}, which was to be left out"].append(str(row.prediction_id))
            elif row.model_name is None:
                left_out["on predictions that the log does not have"].append(str(row.prediction_id))
            elif row.image_sha256 is None:
                left_out["on uploads that the log does not keep (any more)"].append(str(row.prediction_id))
            else:
                by_upload[row.image_sha256].append(row)
    uploads: list[LabelledUpload] = []
    for sha256, rows in by_upload.items():
        first = min(rows, key=lambda row: (row.received_on, row.prediction_id))
        chosen = _agreed(rows)
        labels = None if chosen is None else _labels(chosen.true_class, model)
        if chosen is None:
            left_out["that labellers disagree about"].append(str(first.prediction_id))
        elif chosen.true_class == NONE_OF_THESE and model.classifier_type == "multi-class":
            left_out["that show none of the classes"].append(str(first.prediction_id))
        elif labels is None:
            left_out["with classes that model.classes does not name"].append(str(first.prediction_id))
        else:
            uploads.append(
                LabelledUpload(
                    sha256,
                    first.prediction_id,
                    labels,
                    chosen.source,
                    chosen.stated_on,
                    first.received_on,
                    first.model_version,
                    first.predicted_class,
                )
            )
    uploads.sort(key=lambda upload: (upload.received_on, upload.sha256))
    return CollectedLabels(tuple(uploads), dict(left_out))


def fates(engine: Engine, ids: Sequence[UUID]) -> dict[UUID, str]:
    """Returns what has become of predictions: `deleted`, `kept` with their upload, or `expired`."""
    found = dict.fromkeys(ids, "expired")
    with engine.connect() as connection:
        for start in range(0, len(ids), _IDS_PER_QUERY):
            part = list(ids[start : start + _IDS_PER_QUERY])
            has_upload = predictions.c.prediction_id.in_(part) & predictions.c.image_sha256.is_not(None)
            kept = select(predictions.c.prediction_id).where(has_upload)
            found |= dict.fromkeys(connection.execute(kept).scalars(), "kept")
            gone = select(deletions.c.prediction_id).where(deletions.c.prediction_id.in_(part))
            found |= dict.fromkeys(connection.execute(gone).scalars(), "deleted")
    return found


def _agreed(rows: Sequence[Any]) -> Any | None:
    """Returns the statement that counts of those on one upload; None where labellers are divided."""
    by_time = sorted(rows, key=lambda row: (row.stated_on, row.id))
    latest = {row.source: row for row in by_time}  # Of each source; the order is that of its first statement.
    experts = [row for source, row in latest.items() if source.startswith(LABELLER)]
    if not experts:
        return by_time[-1]
    votes = Counter(row.true_class for row in experts).most_common(2)
    if len(votes) == 2 and votes[0][1] == votes[1][1]:
        return None
    return max((row for row in experts if row.true_class == votes[0][0]), key=lambda row: (row.stated_on, row.id))


def _labels(true_class: str, model: ModelConfig) -> tuple[str, ...] | None:
    """Returns the class names that a statement means; None where there is no such class."""
    if model.classifier_type == "multi-class" or true_class in model.classes:
        names = (true_class,)
    else:
        names = tuple(sorted(name for name in true_class.split(LABEL_SEPARATOR) if name))
    return names if set(names) <= set(model.classes) else None
