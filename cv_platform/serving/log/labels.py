"""What labellers are asked and what they say, in the database: the queue, labels, and how far two of them agree.

A label is feedback on its prediction, with the source `labeller:NAME`, which no client can claim. Unlike a client's it
is written at once, as the queue is in the database, too: who labels sees at once what is left, and can take it back.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

from cv_platform.predictions import LABELLER
from cv_platform.serving.log.deletion import DELETION_LOCK

if TYPE_CHECKING:
    from sqlalchemy import Engine

Mode = Literal["queue", "second", "review"]
"""What is asked: the labelling queue; what one other labeller has labelled; the latest answers of low confidence."""
_MOST_REVIEWED = 1000
"""Latest answers among which those of the lowest confidence are looked for."""
_MOST_COMPARED = 20_000
"""Latest labels that the agreement is of."""


@dataclass(frozen=True)
class Task:
    """An image to be labelled: the prediction, why it is asked for, and the model's proposal with its probability."""

    prediction_id: UUID
    reason: str
    proposal: str
    confidence: float | None

    def fields(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return {**asdict(self), "prediction_id": str(self.prediction_id)}


@dataclass(frozen=True)
class Agreement:
    """How far two labellers agree on the images that both have labelled.

    Attributes:
        first, second: who.
        images: that both labelled.
        agreed: of them, those with the same label.
        kappa: Cohen's (1960): agreement beyond chance, 1 at most; None where chance alone makes them agree.
    """

    first: str
    second: str
    images: int
    agreed: int
    kappa: float | None


def tasks(engine: Engine, labeller: str, mode: Mode, *, model_name: str, limit: int) -> tuple[list[Task], int]:
    """Returns the next images for a labeller, and how many there are in all (of `review`: among the latest).

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    from sqlalchemy import func, literal, select

    from cv_platform.database.schema import feedback, labeling_items, predictions

    said = feedback.alias()
    of_labellers = (
        select(said.c.prediction_id)
        .where((said.c.prediction_id == predictions.c.prediction_id) & said.c.source.startswith(LABELLER))
        .correlate(predictions)
    )
    usable = (predictions.c.model_name == model_name) & predictions.c.image_sha256.is_not(None)
    columns = [predictions.c.prediction_id, predictions.c.predicted_class, predictions.c.prediction_json]
    if mode == "queue":
        has_skipped = labeling_items.c.skipped_by.contains([labeller])
        wanted = (
            select(*columns, labeling_items.c.reason)
            .join(labeling_items, labeling_items.c.prediction_id == predictions.c.prediction_id)
            .where(usable & ~of_labellers.exists() & ~has_skipped)
            .order_by(labeling_items.c.window_end_utc, labeling_items.c.place)
        )
    elif mode == "second":
        mine = of_labellers.where(said.c.source == LABELLER + labeller).exists()
        sources = select(func.count(said.c.source.distinct())).where(
            (said.c.prediction_id == predictions.c.prediction_id) & said.c.source.startswith(LABELLER)
        )
        wanted = (
            select(*columns, literal("second opinion").label("reason"))
            .where(
                usable
                & predictions.c.prediction_id.in_(
                    select(feedback.c.prediction_id).where(feedback.c.source.startswith(LABELLER))
                )
                & ~mine
                & (sources.correlate(predictions).scalar_subquery() == 1)
            )
            .order_by(predictions.c.created_on, predictions.c.prediction_id)
        )
    else:
        latest = select(predictions).where(usable).order_by(predictions.c.created_on.desc()).limit(_MOST_REVIEWED)
        recent = latest.subquery()
        confidence = select(func.max(func.unnest(recent.c.bbsd_feats).column_valued("share"))).scalar_subquery()
        labelled = select(said.c.id).where(
            (said.c.prediction_id == recent.c.prediction_id) & said.c.source.startswith(LABELLER)
        )
        wanted = (
            select(
                recent.c.prediction_id,
                recent.c.predicted_class,
                recent.c.prediction_json,
                literal("low confidence").label("reason"),
            )
            .where(~labelled.correlate(recent).exists())
            .order_by(confidence, recent.c.prediction_id)
        )
    with engine.connect() as connection:
        count = connection.execute(select(func.count()).select_from(wanted.order_by(None).subquery())).scalar_one()
        rows = connection.execute(wanted.limit(limit)).all()
    found = [
        Task(row.prediction_id, row.reason, row.predicted_class, max(row.prediction_json.values(), default=None))
        for row in rows
    ]
    return found, int(count)


def add_label(engine: Engine, prediction_id: UUID, labeller: str, true_class: str) -> bool:
    """Keeps what a labeller says; False where the prediction is not in the database (any more).

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    from sqlalchemy import func, insert, select

    from cv_platform.database.schema import feedback, predictions

    with engine.begin() as connection:
        # As who drains: a deletion comes before this, or finds it.
        connection.execute(select(func.pg_advisory_xact_lock_shared(DELETION_LOCK)))
        known = select(predictions.c.prediction_id).where(predictions.c.prediction_id == prediction_id)
        if connection.execute(known).first() is None:
            return False
        values = {
            "entry_id": uuid4(),
            "prediction_id": prediction_id,
            "true_class": true_class,
            "source": LABELLER + labeller,
        }
        connection.execute(insert(feedback).values(**values))
        return True


def withdraw_label(engine: Engine, prediction_id: UUID, labeller: str) -> bool:
    """Takes the latest label of a labeller on a prediction back; what it replaced counts again.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    from sqlalchemy import delete, func, select

    from cv_platform.database.schema import feedback

    own = (feedback.c.prediction_id == prediction_id) & (feedback.c.source == LABELLER + labeller)
    latest = select(func.max(feedback.c.id)).where(own).scalar_subquery()
    with engine.begin() as connection:
        return connection.execute(delete(feedback).where(feedback.c.id == latest)).rowcount > 0


def skip(engine: Engine, prediction_id: UUID, labeller: str) -> bool:
    """Notes that a labeller would not say what an image of the queue shows; returns whether it is one.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    from sqlalchemy import func, update

    from cv_platform.database.schema import labeling_items

    skipped = func.array_append(func.array_remove(labeling_items.c.skipped_by, labeller), labeller)
    noted = update(labeling_items).where(labeling_items.c.prediction_id == prediction_id).values(skipped_by=skipped)
    with engine.begin() as connection:
        return connection.execute(noted).rowcount > 0


def agreement(engine: Engine) -> tuple[dict[str, int], list[Agreement]]:
    """Returns how many images each labeller has labelled, and how far each two of them agree.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    from sqlalchemy import select

    from cv_platform.database.schema import feedback

    latest_first = (
        select(feedback.c.prediction_id, feedback.c.source, feedback.c.true_class)
        .where(feedback.c.source.startswith(LABELLER))
        .order_by(feedback.c.id.desc())
        .limit(_MOST_COMPARED)
    )
    labels: dict[UUID, dict[str, str]] = defaultdict(dict)
    with engine.connect() as connection:
        for prediction_id, source, true_class in connection.execute(latest_first):
            labels[prediction_id].setdefault(source.removeprefix(LABELLER), true_class)
    counts = Counter(labeller for given in labels.values() for labeller in given)
    return dict(counts), agreements(labels.values())


def agreements(labels: Iterable[Mapping[str, str]]) -> list[Agreement]:
    """Returns the agreement of each two labellers, by what each said of each image."""
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for given in labels:
        for first, second in combinations(sorted(given), 2):
            pairs[first, second].append((given[first], given[second]))
    return [
        Agreement(first, second, len(said), sum(a == b for a, b in said), _kappa(said))
        for (first, second), said in sorted(pairs.items())
    ]


def _kappa(said: list[tuple[str, str]]) -> float | None:
    count = len(said)
    observed = sum(a == b for a, b in said) / count
    firsts, seconds = Counter(a for a, _ in said), Counter(b for _, b in said)
    by_chance = sum(firsts[name] * seconds[name] for name in firsts) / count**2
    return None if by_chance == 1.0 else (observed - by_chance) / (1.0 - by_chance)
