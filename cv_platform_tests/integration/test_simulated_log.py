"""The simulated request log of `benchmarks log-rows`, on the server that it is filled on and on the platform's own."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, func, inspect, select, text

from benchmarks import simulated_log
from benchmarks.installation import scratch_folder
from benchmarks.simulated_log import END, MODEL, fill, loading_server, moment_before
from cv_platform.config import MonitorConfig
from cv_platform.database.connection import make_engine
from cv_platform.database.embedded import embedded_database
from cv_platform.database.migrate import migrate
from cv_platform.database.schema import images, metadata, predictions
from cv_platform.errors import DiskSpaceError
from cv_platform.monitoring.window import WindowBounds, read_window

ROWS, WIDTHS = 2_000, (2, 2, 3)


@pytest.fixture(scope="module")
def filled() -> Iterator[Engine]:
    with scratch_folder("test-simulated-log") as folder:
        with loading_server(folder) as url:
            migrate(url)
            engine = make_engine(url)
            with engine.connect() as connection:
                assert connection.execute(text("SHOW wal_level")).scalar() == "minimal"
            fill(engine, ROWS, WIDTHS, folder, print)
            engine.dispose()
        with embedded_database(folder) as url:
            engine = make_engine(url)
            yield engine
            engine.dispose()


def test_leaves_the_tables_of_the_migrations_on_a_server_with_the_platform_s_settings(filled: Engine) -> None:
    with filled.connect() as connection:
        assert connection.execute(text("SHOW wal_level")).scalar() == "replica"
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        found = inspect(connection)
        for table in (predictions, images):  # Which alembic does not compare.
            assert found.get_pk_constraint(table.name)["constrained_columns"] == [c.name for c in table.primary_key]
        rest = text("SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND NOT convalidated")
        assert connection.execute(rest).scalar() == 0


def test_every_tenth_row_has_an_upload_of_its_own_and_all_have_their_own_numbers(filled: Engine) -> None:
    p = predictions.c
    with filled.connect() as connection:
        rows = connection.execute(select(predictions).order_by(p.created_on)).all()
        joined = select(func.count(), func.sum(images.c.bytes)).join_from(
            predictions, images, (p.image_sha256 == images.c.sha256) & (p.created_on == images.c.created_on)
        )
        assert connection.execute(joined).one() == (ROWS // 10, 9 * ROWS // 10)
        assert connection.execute(select(func.count()).select_from(images)).scalar() == ROWS // 10
    assert [row.image_sha256 is not None for row in rows] == [at % 10 == 0 for at in range(ROWS)]
    assert len({row.prediction_id for row in rows}) == len({row.image_sha256 for row in rows if row.image_sha256}) * 10
    for name, size in {"uae_feats": 2, "bbsd_feats": 2, "features": 3, "properties": 7}.items():
        numbers = np.array([getattr(row, name) for row in rows])
        assert numbers.shape == (ROWS, size)
        assert np.all((numbers >= 0) & (numbers < 1))
        assert len(np.unique(numbers)) > 0.99 * numbers.size
    assert rows[0].prediction_json == {"0": 0.01, "1": 0.02}
    assert all(row.logged_on == row.created_on for row in rows)
    steps = {after.created_on - row.created_on for row, after in pairwise(rows)}
    assert steps == {timedelta(days=365) / 100_000_000}


def test_a_window_has_as_many_rows_as_it_was_asked_to_begin_before(filled: Engine) -> None:
    for by in ("answered", "logged"):
        window = read_window(filled, MODEL, WindowBounds(moment_before(350), END, by), MonitorConfig(max_samples=100))
        assert (window.requests, window.late, window.repeats, window.unusable) == (350, 0, 0, 0)
        assert window.rows["created_on"].min() >= END - timedelta(seconds=350 * 0.3154)


def test_a_disk_that_fills_up_is_refused_in_words_and_leaves_no_row(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulated_log, "SPARE_BYTES", 10**18)
    with pytest.raises(DiskSpaceError, match=r"GB free at .* for simulated rows"):
        fill(engine, ROWS, WIDTHS, tmp_path, print)
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(images)).scalar() == 0
        assert len(inspect(connection).get_indexes("predictions")) == len(predictions.indexes)
