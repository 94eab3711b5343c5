"""A challenger on a service's live traffic, before it may take the champion's place: the records of it.

It answers a share of the requests (a canary), or is asked beside the champion (a shadow), or both. The `Probation` is a
part of the production pointer, so that it begins, ends and is superseded in one step with it (`storage`). Each worker
tells the others what it has seen in a file of its own (`WorkerTally`), and any of them may find that it is over
(`serving.model.probation`).
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Literal, Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

ProbationState = Literal["running", "promoted", "returned"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class _Sum(_Record):
    """Counts of workers, which add up."""

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields})


class ArmTally(_Sum):
    """What one of the two models did with the requests that it was asked.

    Attributes:
        asked: requests, those that failed too.
        failed: the model raised an error, hung, or gave what is no number.
        unknown: images that show nothing that the model has learned.
        timed: of those asked, when it was known what is slow (`slow`).
        slow: slower than nine of ten of the champion's last ones; for the challenger times `max_slowdown`.
        seconds: of all that did not fail, decoding included.
    """

    asked: int = 0
    failed: int = 0
    unknown: int = 0
    timed: int = 0
    slow: int = 0
    seconds: float = 0.0


class ShadowTally(_Sum):
    """What the challenger said of images that the champion had answered.

    Attributes:
        asked: images, those that failed too.
        failed: the challenger raised an error or gave what is no number.
        dropped: images that it was not asked about, as it was busy.
        agreed: both name the same classes.
        unknown_both, unknown_challenger, unknown_champion: unknown to both, or to one of them alone.
        unlogged: answers that are in no table, as the database was away.
        seconds: of all that did not fail.
    """

    asked: int = 0
    failed: int = 0
    dropped: int = 0
    agreed: int = 0
    unknown_both: int = 0
    unknown_challenger: int = 0
    unknown_champion: int = 0
    unlogged: int = 0
    seconds: float = 0.0


class Tally(_Record):
    """All that was counted."""

    champion: ArmTally = ArmTally()
    challenger: ArmTally = ArmTally()
    shadow: ShadowTally = ShadowTally()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            champion=self.champion + other.champion,
            challenger=self.challenger + other.challenger,
            shadow=self.shadow + other.shadow,
        )


class ShadowAnswer(_Record):
    """What a challenger says of an upload that the champion has answered; see the table `shadow_answers`."""

    prediction_id: UUID
    model_name: str
    model_version: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    unknown_score: float | None
    agrees: bool
    seconds: float
    answered_on: datetime


class Probation(_Record):
    """A challenger's probation: what `deploy.canary` and `deploy.shadow` ask for, and what became of it.

    Attributes:
        probation_id: 16 hex digits, fresh for each.
        fraction: share of the requests that the challenger answers; 0 for a shadow alone.
        minutes: of a running service, before it is promoted.
        min_requests: answered by the challenger, before it is promoted.
        give_up_minutes: of a running service, after which it is returned when `min_requests` have not come.
        alpha: chance, at most, to return a challenger that is within the limits.
        state: running; or how it ended.
        reason: of its end.
        tally: at its end.
    """

    probation_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    model_name: str
    version: str
    experiment: str | None = None
    fraction: float
    is_shadow: bool = False
    minutes: float
    min_requests: int
    give_up_minutes: float
    max_slowdown: float
    max_unknown_ratio: float
    alpha: float
    since_utc: datetime
    by: str = ""
    state: ProbationState = "running"
    reason: str = ""
    tally: Tally = Tally()

    @property
    def is_running(self) -> bool:
        """Whether nobody has ended it yet."""
        return self.state == "running"

    def draws(self, prediction_id: UUID) -> bool:
        """Says whether the challenger answers a prediction: a hash of both ids, so that the log can tell it again."""
        digest = hashlib.sha256(f"{self.probation_id}:{prediction_id}".encode()).digest()
        return int.from_bytes(digest[:8]) < self.fraction * 2**64

    @property
    def figures(self) -> list[dict[str, str]]:
        """Champion and challenger beside each other, in words: a row for each and for how it was asked; empty: not yet.

        A shadow is asked about images that the champion has answered, in spare time: its seconds are no client's.
        """
        rows = [
            _row(who, arm.asked, arm.failed, arm.unknown, arm.seconds, {"slow": f"{arm.slow} of {arm.timed}"})
            for who, arm in (("champion", self.tally.champion), ("challenger, canary", self.tally.challenger))
            if arm.asked
        ]
        shadow = self.tally.shadow
        if shadow.asked or shadow.dropped:
            answered = shadow.asked - shadow.failed
            compared = {
                "same answer": _share(shadow.agreed, answered),
                "changed": str(answered - shadow.agreed),
                "not asked": str(shadow.dropped),
            }
            unknown = shadow.unknown_both + shadow.unknown_challenger
            rows.append(_row("challenger, shadow", shadow.asked, shadow.failed, unknown, shadow.seconds, compared))
            unknown = shadow.unknown_both + shadow.unknown_champion
            rows.append({"model": "champion, on the shadow's images", "unknown": _share(unknown, answered)})
        names = dict.fromkeys(name for row in rows for name in row)
        return [{name: row.get(name, "") for name in names} for row in rows]

    def __str__(self) -> str:
        """Returns its numbers for people."""
        rows = [[f"{name} {said}" for name, said in row.items() if said and name != "model"] for row in self.figures]
        named = zip(self.figures, rows, strict=True)
        return "; ".join(f"{row['model']}: {', '.join(said)}" for row, said in named) or "no requests"


def _row(who: str, asked: int, failed: int, unknown: int, seconds: float, more: dict[str, str]) -> dict[str, str]:
    answered = asked - failed
    mean = f"{1e3 * seconds / answered:.1f}" if answered else ""
    facts = {"answers": str(answered), "failed": _share(failed, asked), "unknown": _share(unknown, answered)}
    return {"model": who, **facts, "mean ms": mean, **more}


def _share(count: int, of: int) -> str:
    return f"{count / of:.1%} ({count})" if of else ""


class WorkerTally(_Record):
    """What one worker has seen of a probation, since it began to take part.

    Attributes:
        probation_id: which one.
        worker_id: of the worker.
        load_error: why it could not take up the challenger.
        watched_seconds: for how long a worker has run during the probation: this one and, before it started, those
            that had told. Time in which no service runs does not count; no clock is compared with another's.
    """

    probation_id: str
    worker_id: str
    load_error: str | None = None
    watched_seconds: float = 0.0
    tally: Tally = Tally()
