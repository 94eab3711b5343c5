"""What a shadow says, in a table of its own: `shadow_answers`.

A row goes with its prediction, so that deletion and retention reach it; it is therefore written once the prediction is
there, which may take a while. It is no answer that anybody got: while the database is away, it is counted and gone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cv_platform.errors import CvPlatformError
from cv_platform.predictions import LABEL_SEPARATOR
from cv_platform.probation import ShadowAnswer

if TYPE_CHECKING:
    from sqlalchemy import Engine

logger = logging.getLogger(__name__)

_MAX_WAITING = 2000
"""Answers whose predictions are not in the database yet."""


class ShadowLog:
    """Writes the answers of one worker's shadow; for one thread.

    Args:
        database: returns an engine, or raises an error of the platform while there is none.
    """

    def __init__(self, database: Callable[[], Engine]) -> None:
        self._database = database
        self._waiting: list[ShadowAnswer] = []

    def write(self, answers: Sequence[ShadowAnswer]) -> int:
        """Writes those whose predictions are there, these and former ones; returns how many are lost for good."""
        from sqlalchemy import select
        from sqlalchemy.dialects.postgresql import insert
        from sqlalchemy.exc import SQLAlchemyError

        from cv_platform.database.schema import predictions, shadow_answers

        self._waiting += answers
        ids = [answer.prediction_id for answer in self._waiting]
        there = select(predictions.c.prediction_id).where(predictions.c.prediction_id.in_(ids))
        try:
            with self._database().begin() as connection:
                # The lock keeps those from being deleted before their rows are written.
                known = set(connection.execute(there.with_for_update(read=True, key_share=True)).scalars())
                rows = [_row(answer) for answer in self._waiting if answer.prediction_id in known]
                if rows:
                    connection.execute(insert(shadow_answers).on_conflict_do_nothing(), rows)
        except (CvPlatformError, SQLAlchemyError) as err:
            logger.debug("What a shadow said waits for the database: %s", err)
        else:
            self._waiting = [answer for answer in self._waiting if answer.prediction_id not in known]
        lost = max(0, len(self._waiting) - _MAX_WAITING)
        del self._waiting[:lost]
        return lost


def _row(answer: ShadowAnswer) -> dict[str, Any]:
    return {
        **answer.model_dump(exclude={"classes", "answered_on"}),
        "predicted_class": LABEL_SEPARATOR.join(answer.classes),
        "probabilities": list(answer.probabilities),
        "created_on": answer.answered_on,
    }
