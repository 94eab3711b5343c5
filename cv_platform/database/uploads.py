"""Uploads of the request log, what the encoder sees in them, and what people said that they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, select
from sqlalchemy.dialects.postgresql import insert

from cv_platform.database.schema import feedback, images, upload_vectors

_IDS_PER_QUERY = 1000
_VECTOR = np.dtype("<f2")


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


def read_vectors(engine: Engine, sha256s: Sequence[str], encoder: str) -> dict[str, NDArray[np.float16]]:
    """Returns the vectors of uploads as far as `keep_vectors` has kept them; empty of those that do not decode.

    Args:
        engine: of the request log.
        sha256s: of the uploads.
        encoder: its key.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    table = upload_vectors.c
    wanted = select(table.sha256, table.vector).where(
        table.sha256.in_(sorted(set(sha256s))) & (table.encoder == encoder)
    )
    with engine.connect() as connection:
        return {row.sha256: np.frombuffer(row.vector, _VECTOR) for row in connection.execute(wanted)}


def keep_vectors(engine: Engine, vectors: Mapping[str, NDArray[np.float16]], encoder: str) -> None:
    """Keeps vectors of uploads for as long as the uploads; those of one that was deleted meanwhile are not kept.

    Args:
        engine: of the request log.
        vectors: by sha256; empty: the upload does not decode.
        encoder: its key.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    with engine.begin() as connection:
        # Locked, so that a deletion waits, and finds the vector.
        alive = select(images.c.sha256).where(images.c.sha256.in_(sorted(vectors)))
        found = connection.execute(alive.with_for_update(read=True, key_share=True)).scalars().all()
        rows = [
            {"sha256": sha256, "encoder": encoder, "vector": vectors[sha256].astype(_VECTOR).tobytes()}
            for sha256 in found
        ]
        if rows:
            connection.execute(insert(upload_vectors).on_conflict_do_nothing(), rows)


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
