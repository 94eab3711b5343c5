"""A worker's part in a probation: it asks the challenger, counts, tells the others, and ends it when it is decided.

The production pointer names the challenger (`cv_platform.probation`). Whichever worker first finds that it is over
moves the pointer by compare-and-set, so that all agree, and so that it ends with nobody else running. A request that
the challenger fails is answered by the champion: no client sees a failing challenger.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar
from uuid import UUID

import numpy as np

from cv_platform.errors import CvPlatformError, ImageError, PointerMovedError
from cv_platform.probation import ArmTally, Probation, ShadowTally, Tally, WorkerTally
from cv_platform.serving.model.evidence import verdict
from cv_platform.serving.model.promotion import end_probation
from cv_platform.serving.model.runtime import LoadedModel, Prediction
from cv_platform.serving.model.shadow import Shadow, ShadowPlace
from cv_platform.storage import CentralStorage, ProductionPointer

logger = logging.getLogger(__name__)

_TELL_SECONDS = 2.0
_REMEMBERED = 64
"""Requests of the champion that say what is slow; fewer than a third of them do not."""
_SLOW_QUANTILE = 0.9
_HANGS_SECONDS = 30.0


class Answer(Protocol):
    """What a model made of a request, as far as it is counted."""

    @property
    def prediction(self) -> Prediction:
        """Its outputs."""
        ...

    @property
    def unknown_score(self) -> float | None:
        """Above 1 it is unknown; None where the model has no rule."""
        ...

    @property
    def predicted_classes(self) -> tuple[str, ...]:
        """What the client is told."""
        ...


_A = TypeVar("_A", bound=Answer)


class _Arm:
    """What one model did in this worker."""

    def __init__(self) -> None:
        self.tally = ArmTally()
        self.under_way: dict[object, float] = {}

    def hanging(self) -> int:
        return sum(time.monotonic() - began > _HANGS_SECONDS for began in tuple(self.under_way.values()))


class LiveProbation:
    """A probation in one worker, with its challenger loaded; safe to use from many threads.

    Args:
        probation: as the pointer names it.
        challenger: its model; None of a shadow alone, which answers nobody.
        shadow: is offered what the champion has answered; None: nobody is.

    Attributes:
        probation, challenger: the same.
    """

    def __init__(self, probation: Probation, challenger: LoadedModel | None, shadow: Shadow | None = None) -> None:
        self.probation, self.challenger, self._shadow = probation, challenger, shadow
        self._champion, self._challenger = _Arm(), _Arm()
        self._champion_seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._slow_seconds: float | None = None
        self._lock = threading.Lock()

    def ask(self, prediction_id: UUID, champion: LoadedModel, data: bytes, predict: Callable[[LoadedModel], _A]) -> _A:
        """Answers a request by the model that is drawn for it, and by the champion where the challenger fails.

        Args:
            prediction_id: of the request.
            champion: what answers otherwise.
            data: the upload.
            predict: asks a model.

        Raises:
            ImageError: the upload is no usable image, which is nobody's failure here.
        """
        challenger = self.challenger
        if challenger is not None and self.probation.draws(prediction_id):
            try:
                return self._measured(self._challenger, lambda: predict(challenger))
            except ImageError:
                raise
            # Whatever it meets: the champion answers.
            except Exception:
                logger.exception("%s %s fails on probation", self.probation.model_name, self.probation.version)
            return self._measured(self._champion, lambda: predict(champion))
        answer = self._measured(self._champion, lambda: predict(champion))
        if self._shadow is not None:
            self._shadow.offer(prediction_id, data, answer.predicted_classes, answer.unknown_score)
        return answer

    def close(self) -> None:
        """Ends its shadow; requests under way are answered."""
        if self._shadow is not None:
            self._shadow.close()

    def tally(self) -> Tally:
        """Returns what was counted so far."""
        with self._lock:
            arms = [
                arm.tally + ArmTally(asked=hanging, failed=hanging)
                for arm in (self._champion, self._challenger)
                for hanging in (arm.hanging(),)
            ]
        shadow = self._shadow.tally() if self._shadow else ShadowTally()
        return Tally(champion=arms[0], challenger=arms[1], shadow=shadow)

    def _measured(self, arm: _Arm, work: Callable[[], _A]) -> _A:
        key, began = object(), time.monotonic()
        arm.under_way[key] = began
        try:
            answer = work()
            is_sound = bool(np.isfinite(answer.prediction.probabilities).all())
            if not is_sound and arm is self._challenger:
                raise ArithmeticError("Expected probabilities. Received: what is no number.")
        except ImageError:
            raise
        except Exception:
            self._count(arm, failed=True)
            raise
        finally:
            arm.under_way.pop(key, None)
        seconds = time.monotonic() - began
        is_unknown = answer.unknown_score is not None and answer.unknown_score > 1
        self._count(arm, failed=not is_sound, unknown=is_unknown, seconds=seconds)
        return answer

    def _count(self, arm: _Arm, *, failed: bool = False, unknown: bool = False, seconds: float = 0.0) -> None:
        with self._lock:
            limit = self._slow_seconds
            if limit is not None and arm is self._challenger:
                limit *= self.probation.max_slowdown
            is_timed = limit is not None and not failed
            arm.tally += ArmTally(
                asked=1,
                failed=int(failed),
                unknown=int(unknown),
                timed=int(is_timed),
                slow=int(is_timed and limit is not None and seconds > limit),
                seconds=seconds,
            )
            if arm is self._champion and not failed:  # Afterwards: what is slow is known before it is asked.
                self._champion_seconds.append(seconds)
                if 3 * len(self._champion_seconds) >= _REMEMBERED:
                    self._slow_seconds = float(np.quantile(self._champion_seconds, _SLOW_QUANTILE))


@dataclass
class _Part:
    """This worker's part in one probation."""

    probation_id: str
    began: float
    watched_before: float
    live: LiveProbation | None = None
    load_error: str | None = None
    told: float = float("-inf")


class ProbationKeeper:
    """Follows the probations of one service for one worker; for the thread that follows the pointer.

    Args:
        storage: central storage.
        service: whose pointer.
        name: of this worker's process; never that of another one, of a former life either.
        load: loads a version.
        tell_seconds: between two tellings, after each of which it looks whether the probation is over.
        shadows: what a shadow needs; None: this worker asks none.
    """

    def __init__(
        self,
        storage: CentralStorage,
        service: str,
        name: str,
        load: Callable[[str, str], LoadedModel],
        *,
        tell_seconds: float = _TELL_SECONDS,
        shadows: ShadowPlace | None = None,
    ) -> None:
        self._storage, self._service, self._name, self._load = storage, service, name, load
        self._tell_seconds, self._shadows = tell_seconds, shadows
        self._part: _Part | None = None

    def current(self) -> LiveProbation | None:
        """Returns the probation whose challenger is ready; take it once per request."""
        part = self._part
        return part.live if part else None

    def challenger(self, model_name: str, version: str) -> LoadedModel | None:
        """Returns the challenger if it is this version and ready: who is promoted is not loaded again."""
        live = self.current()
        if live and (live.probation.model_name, live.probation.version) == (model_name, version):
            return live.challenger
        return None

    def follow(self, pointer: ProductionPointer | None) -> None:
        """Begins, tells, or leaves, as the pointer says.

        Raises:
            StorageError: it cannot tell, or look; the challenger goes on answering.
        """
        probation = pointer.probation if pointer else None
        if pointer is None or probation is None or not probation.is_running:
            self.close()
            return
        if self._part is None or self._part.probation_id != probation.probation_id:
            self.close()
            self._part = self._begin(probation)
        if time.monotonic() - self._part.told >= self._tell_seconds:
            self._tell(self._part)
            self._end_if_over(pointer, probation)
            self._part.told = time.monotonic()

    def close(self) -> None:
        """Takes no part any more."""
        part, self._part = self._part, None
        if part is not None and part.live is not None:
            part.live.close()

    def _begin(self, probation: Probation) -> _Part:
        watched = [tally.watched_seconds for tally in self._tallies(probation)]
        part = _Part(probation.probation_id, time.monotonic(), max(watched, default=0.0))
        name = f"{probation.model_name} {probation.version}"
        try:
            model = self._load(probation.model_name, probation.version) if probation.fraction else None
            shadow = Shadow(probation, self._shadows) if probation.is_shadow and self._shadows else None
            part.live = LiveProbation(probation, model, shadow)
        # As of a worker that cannot take up a version: the champion goes on, and the others hear of it.
        except Exception as err:
            part.load_error = str(err) or type(err).__name__
            log = logger.error if isinstance(err, CvPlatformError) else logger.exception
            log("%s cannot be tried out: %s", name, err)
        else:
            logger.info("%s is on probation, for %.3g of the requests", name, probation.fraction)
        return part

    def _tell(self, part: _Part) -> None:
        tally = WorkerTally(
            probation_id=part.probation_id,
            worker_id=self._name,
            load_error=part.load_error,
            watched_seconds=part.watched_before + time.monotonic() - part.began,
            tally=part.live.tally() if part.live else Tally(),
        )
        self._storage.write_tally(self._service, self._name, tally)

    def _end_if_over(self, pointer: ProductionPointer, probation: Probation) -> None:
        tallies = self._tallies(probation)
        total = sum((each.tally for each in tallies), Tally())
        watched = max((each.watched_seconds for each in tallies), default=0.0)
        error = next((each for each in tallies if each.load_error), None)
        if error is not None:
            state, reason = "returned", f"{error.worker_id} could not take it up: {error.load_error}"
        elif (against := verdict(probation, total)) is not None:
            state, reason = "returned", against
        else:
            answered = total.challenger.asked if probation.fraction else total.shadow.asked
            minutes = watched / 60
            is_enough = answered >= probation.min_requests
            if minutes >= probation.minutes and is_enough:
                state, reason = "promoted", f"nothing spoke against it in {minutes:.3g} minutes"
            elif minutes >= probation.give_up_minutes:
                state = "returned"
                reason = f"{answered} of at least {probation.min_requests} requests came in {minutes:.3g} minutes"
            else:
                return
        ended = probation.model_copy(update={"state": state, "reason": reason, "tally": total})
        try:
            end_probation(self._storage, self._service, pointer, ended)
        except PointerMovedError:  # By another worker, which has found the same, or by a person.
            logger.info("The probation of %s has ended meanwhile", probation.version)

    def _tallies(self, probation: Probation) -> list[WorkerTally]:
        return self._storage.read_tallies(self._service, probation.probation_id)
