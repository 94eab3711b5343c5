"""The schema's own consistency; `integration/test_migrations.py` compares it with a real database."""

from __future__ import annotations

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import DateTime

from cv_platform.database.migrate import alembic_config, require_revision
from cv_platform.database.schema import SCHEMA_REVISION, api_log, metadata, predictions
from cv_platform.errors import SchemaMismatchError


def test_the_written_revision_is_alembics_only_head() -> None:
    assert ScriptDirectory.from_config(alembic_config()).get_heads() == [SCHEMA_REVISION]


def test_every_time_has_a_time_zone() -> None:
    kinds = [column.type for table in metadata.tables.values() for column in table.columns]
    times = [kind for kind in kinds if isinstance(kind, DateTime)]
    assert len(times) == 13
    assert all(kind.timezone for kind in times)


def test_the_originals_columns_keep_their_names() -> None:
    request = {"request_method", "request_url", "response_status_code", "response_message", "timespan", "created_on"}
    assert request | {"prediction_id"} <= set(api_log.columns.keys())
    prediction = {"prediction_id", "model_name", "prediction_json", "uae_feats", "bbsd_feats", "raw_hm", "created_on"}
    assert prediction <= set(predictions.columns.keys())


@pytest.mark.parametrize(
    ("revision", "says"),
    [(None, "a database without tables. Run: cv-platform migrate"), ("9999", "9999. The database is newer: upgrade")],
)
def test_a_wrong_revision_says_what_to_do(revision: str | None, says: str) -> None:
    with pytest.raises(SchemaMismatchError, match=says):
        require_revision(revision)


def test_the_right_revision_passes() -> None:
    require_revision(SCHEMA_REVISION)
