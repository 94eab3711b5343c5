"""What is observed while a request is answered: its id for every log line, and the seconds of its stages.

The observation travels in a context variable, so that neither a route nor the code below it has to hand it on; threads
that work for a request run in a copy of its context (`Admission.compute`). Outside of a request nothing is noted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import UUID

# For names alone: the log format, which every process of the service begins with, needs this module.
if TYPE_CHECKING:
    from cv_platform.serving.telemetry.metrics import ServingMetrics, Stage
    from cv_platform.serving.telemetry.tracing import RequestSpan


@dataclass
class RequestFacts:
    """What is known of one request while it is answered.

    Attributes:
        message: of the refusal, if it is one.
        is_logged: whether nobody else needs to log it.
        model_version: of the model that answers.
        client: by which API key, as `Guard.name_of` tells it.
        tag: where the client says that the image is from.
        network: of the client, as `Guard.network_of` tells it.
    """

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    created_on: datetime = field(default_factory=lambda: datetime.now(UTC))
    message: str = ""
    is_logged: bool = False
    model_version: str | None = None
    client: str | None = None
    tag: str | None = None
    network: str | None = None
    prediction_ids: list[str] = field(default_factory=list[str])

    def seconds(self) -> float:
        """Returns the seconds since the request arrived."""
        return time.perf_counter() - self.started


@dataclass(frozen=True, slots=True)
class Observation:
    """Where what happens in one request is noted."""

    facts: RequestFacts
    metrics: ServingMetrics
    span: RequestSpan | None


_current: ContextVar[Observation | None] = ContextVar("cv_platform_observation", default=None)


def observe(observation: Observation) -> Token[Observation | None]:
    """Makes this the observation of what follows in this context."""
    return _current.set(observation)


def end_observation(token: Token[Observation | None]) -> None:
    """Ends what `observe` has begun."""
    _current.reset(token)


def current_observation() -> Observation | None:
    """Returns the observation of the request that is answered here; None outside of one."""
    return _current.get()


def note_stage(stage: Stage, started: float, *, failed: bool = False) -> None:
    """Notes that a stage has ended; `started` is what `time.perf_counter` said at its beginning."""
    observation = _current.get()
    if observation is None:
        return
    seconds = time.perf_counter() - started
    observation.metrics.stage_ended(stage, seconds)
    if observation.span is not None:
        observation.span.stage(stage, seconds, failed=failed)


def note_prediction(
    prediction_id: UUID,
    model_name: str,
    version: str,
    classes: Sequence[str],
    confidence: float,
    *,
    is_unknown: bool = False,
) -> None:
    """Notes what a model has answered; see `ServingMetrics.predicted`."""
    observation = _current.get()
    if observation is not None:
        observation.facts.prediction_ids.append(str(prediction_id))
        observation.metrics.predicted(model_name, version, classes, confidence, is_unknown=is_unknown)


class staged:
    """Notes the seconds of a block as a stage of the request: `with staged("decode"): …`."""

    __slots__ = ("_stage", "_started")

    def __init__(self, stage: Stage) -> None:
        self._stage: Stage = stage
        self._started = 0.0

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        note_stage(self._stage, self._started, failed=kind is not None)
