"""Uploads of the request log, and what people said that they show."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Engine, select

from cv_platform.database.schema import feedback, images

_IDS_PER_QUERY = 1000


def read_images(engine: Engine, sha256s: Sequence[str]) -> dict[str, bytes]:
    """Returns the uploads with these hashes, as far as they were kept.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    if not sha256s:
        return {}
    wanted = select(images.c.sha256, images.c.content).where(images.c.sha256.in_(sorted(set(sha256s))))
    with engine.connect() as connection:
        return {row.sha256: bytes(row.content) for row in connection.execute(wanted)}


def read_feedback(engine: Engine, prediction_ids: Sequence[UUID]) -> dict[UUID, str]:
    """Returns the latest stated true class of each prediction that has one.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    stated: dict[UUID, str] = {}
    with engine.connect() as connection:
        for start in range(0, len(prediction_ids), _IDS_PER_QUERY):
            ids = list(prediction_ids[start : start + _IDS_PER_QUERY])
            latest_last = (
                select(feedback.c.prediction_id, feedback.c.true_class)
                .where(feedback.c.prediction_id.in_(ids))
                .order_by(feedback.c.created_on, feedback.c.id)
            )
            stated.update((row.prediction_id, row.true_class) for row in connection.execute(latest_last))
    return stated
