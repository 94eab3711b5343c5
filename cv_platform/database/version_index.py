"""Questions that the index of model, version and time answers, whatever the size of the log.

They go version by version: without a version, PostgreSQL 17 finds no time in it, and reads all rows of the model.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import CTE, ColumnElement, Select, select, true, tuple_

from cv_platform.database.schema import is_request, predictions


def model_versions(model_name: str | None = None) -> CTE:
    """Returns the query of the versions that have predictions, of one model or all: model_name, model_version.

    It takes a step in the index for each; DISTINCT reads all of it.
    """
    name, version = predictions.c.model_name, predictions.c.model_version
    following = select(name, version).order_by(name, version).limit(1)
    if model_name is not None:
        following = following.where(name == model_name)
    found = following.cte("found", recursive=True)
    # With an equal name beside it, PostgreSQL begins a comparison of rows at the name's first one.
    is_later = tuple_(name, version) > tuple_(*found.c) if model_name is None else version > found.c.model_version
    after = following.where(is_later).correlate(found).lateral()
    return found.union_all(select(*after.c).select_from(found.join(after, true())))


def latest_requests(
    model_name: str, most: int, *columns: ColumnElement[Any], where: ColumnElement[bool] | None = None
) -> Select[Any]:
    """Returns the query of the requests of each version of a model that were answered last.

    Args:
        model_name: whose.
        most: requests of each version.
        columns: of `predictions`.
        where: a condition on `created_on`; another one has PostgreSQL look for such rows.
    """
    versions, table = model_versions(model_name), predictions.c
    latest = (
        select(*columns)
        .where(table.model_name == model_name, table.model_version == versions.c.model_version, is_request())
        .where(true() if where is None else where)
        .order_by(table.created_on.desc())
        .limit(most)
        .correlate(versions)
        .lateral()
    )
    return select(*latest.c).select_from(versions.join(latest, true()))
