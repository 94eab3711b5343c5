"""What labellers are asked and what they say, in the database: the queue, labels, and how far two of them agree.

A label is feedback on its prediction, with the source `labeller:NAME`, which no client can claim. Unlike a client's it
is written at once, as the queue is in the database, too: who labels sees at once what is left, and can take it back.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

from cv_platform.predictions import LABELLER
from cv_platform.serving.log.deletion import DELETION_LOCK
from cv_platform.storage import BundleMetadata

if TYPE_CHECKING:
    from sqlalchemy import Engine

Mode = Literal["queue", "second", "review"]
"""What is asked: the labelling queue; what one other labeller has labelled; the latest answers of low confidence."""
_MOST_REVIEWED = 1000
"""Latest answers among which those of the lowest confidence are looked for."""
_MOST_ROWS = 10 * _MOST_REVIEWED
"""Latest answers of each version among which those are looked for: one in ten has its upload, if they are sampled."""
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


@dataclass(frozen=True)
class Wish:
    """Which images somebody wants to be asked about.

    Attributes:
        labeller: who.
        model: whose answers.
        passed: predictions that this is not about, as they have been passed over; only the queue itself keeps those.
    """

    labeller: str
    model: BundleMetadata
    passed: Sequence[UUID] = ()


def tasks(engine: Engine, wish: Wish, mode: Mode, *, limit: int) -> tuple[list[Task], int]:
    """Returns the next images for a labeller, and how many there are in all (of `review`: among the latest).

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    from sqlalchemy import func, select

    from cv_platform.database.schema import predictions

    columns = predictions.c
    usable = (columns.model_name == wish.model.model_name) & columns.image_sha256.is_not(None)
    shown = select(columns.prediction_id, columns.predicted_class, columns.prediction_json)
    ask = {"queue": _queued, "second": _labelled_by_one_other, "review": _unsure}[mode]
    wanted = ask(shown.where(usable & columns.prediction_id.not_in(wish.passed)), wish)
    with engine.connect() as connection:
        count = connection.execute(select(func.count()).select_from(wanted.order_by(None).subquery())).scalar_one()
        rows = connection.execute(wanted.limit(limit)).all()
    found = [
        Task(row.prediction_id, row.reason, row.predicted_class, max(row.prediction_json.values(), default=None))
        for row in rows
    ]
    return found, int(count)


def _labels() -> Any:
    """Returns the sources of the labels of a row of `predictions`, as SQL."""
    from sqlalchemy import select

    from cv_platform.database.schema import feedback, predictions

    of_it = (feedback.c.prediction_id == predictions.c.prediction_id) & feedback.c.source.startswith(LABELLER)
    return select(feedback.c.source).where(of_it).correlate(predictions)


def _queued(shown: Any, wish: Wish) -> Any:
    from cv_platform.database.schema import labeling_items, predictions

    item = labeling_items.c
    return (
        shown.add_columns(item.reason)
        .join(labeling_items, item.prediction_id == predictions.c.prediction_id)
        .where(~_labels().exists() & ~item.skipped_by.contains([wish.labeller]))
        .order_by(item.window_end_utc, item.place)
    )


def _labelled_by_one_other(shown: Any, wish: Wish) -> Any:
    from sqlalchemy import func, literal, select

    from cv_platform.database.schema import feedback, predictions

    answer, said = predictions.c, feedback.c
    labelled = select(said.prediction_id).where(said.source.startswith(LABELLER))
    people = _labels().with_only_columns(func.count(said.source.distinct())).scalar_subquery()
    is_mine = _labels().where(said.source == LABELLER + wish.labeller).exists()
    return (
        shown.add_columns(literal("second opinion").label("reason"))
        .where(answer.prediction_id.in_(labelled) & ~is_mine & (people == 1))
        .order_by(answer.created_on, answer.prediction_id)
    )


def _unsure(shown: Any, wish: Wish) -> Any:
    from sqlalchemy import func, literal, select

    from cv_platform.database.schema import predictions
    from cv_platform.database.version_index import latest_requests

    answer = predictions.c
    columns = (answer.prediction_id, answer.image_sha256, answer.created_on)
    rows = latest_requests(wish.model.model_name, _MOST_ROWS, *columns).subquery()
    kept = select(rows.c.prediction_id).where(rows.c.image_sha256.is_not(None))
    kept = kept.where(rows.c.prediction_id.not_in(wish.passed))
    latest = kept.order_by(rows.c.created_on.desc()).limit(_MOST_REVIEWED)
    share = func.unnest(answer.bbsd_feats).column_valued("share")
    # Of several labels the least certain decides: none of them is what an image mostly shows.
    sure = func.min(func.abs(share - 0.5)) if wish.model.classifier_type == "multi-label" else func.max(share)
    return (
        shown.add_columns(literal("low confidence").label("reason"))
        .where(answer.prediction_id.in_(latest) & ~_labels().exists())
        .order_by(select(sure).scalar_subquery(), answer.prediction_id)
    )


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
