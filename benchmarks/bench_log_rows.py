"""The request log with many rows: a window, a month of retention, and what a partition by month would make of it.

The rows of a year are simulated in the database itself, with vectors as a small network has them; then a second part
comes, several times as large, so that what grows with the table is told from what grows with the window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, text

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.installation import isolated_settings, scratch_folder
from benchmarks.options import Options
from cv_platform.config import MonitorConfig
from cv_platform.database.connection import make_engine
from cv_platform.monitoring.window import WindowBounds, read_window
from cv_platform.records import ModelIdentity

FIRST, ALL = 200_000, 1_000_000
DAYS, WINDOW_DAYS, MONTH_DAYS = 365, 7, 30
END = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = ModelIdentity(model_name="simulated", version="20250101T000000Z-00000001")
MOST_GROWTH = 1.5
"""Of the time for each row of the window, when the table grows fivefold."""
_COLUMNS = (
    "prediction_id, model_name, model_version, predicted_class, prediction_json, uae_feats, bbsd_feats, features, "
    "properties, image_sha256, created_on, logged_on"
)
_ROWS = """
INSERT INTO {table} ({columns})
SELECT gen_random_uuid(), '{name}', '{version}', 'class ' || mod(n, 10), '{{"class 0": 0.1}}'::jsonb,
    array_fill(n::real, ARRAY[32]), array_fill(0.1::real, ARRAY[10]), array_fill(n::real, ARRAY[128]),
    array_fill(1::real, ARRAY[7]), NULL, moment, moment
FROM (
    SELECT n, timestamptz '{end}' - interval '1 day' * ({days} * (n - {start} + 0.5) / {count}) AS moment
    FROM generate_series({start}, {start} + {count} - 1) AS n
) AS simulated
"""
"""Their times are spread evenly over the year before `END`."""


def run(options: Options) -> Report:
    """Measures on two sizes of the table, then compares a month's deletion with the dropping of its partition."""
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate
    from cv_platform.database.retention import delete_expired

    clock = Stopwatch()
    found: dict[str, float] = {}
    with (
        scratch_folder("bench-log-rows") as scratch,
        database_url(isolated_settings(scratch / "home", scratch / "configs")) as url,
    ):
        migrate(url)
        engine = make_engine(url)
        per_row = list[float]()
        for start, count in ((0, FIRST), (FIRST, ALL - FIRST)):
            seconds = _timed(lambda start=start, count=count: _simulate(engine, "predictions", start, count))
            options.say(f"{start + count:,} rows, {seconds:.0f} s")
            found[f"seconds to write {count:,} rows"] = seconds
            times = [_timed(lambda: _window(engine)) for _ in range(options.rounds)]
            inside = (start + count) * WINDOW_DAYS / DAYS
            per_row.append(1e6 * min(times) / inside)
            found[f"seconds of a window of {inside:,.0f} among {start + count:,} rows"] = min(times)
        found["bytes of a row, with its indexes"] = _bytes(engine, "predictions") / ALL
        _partition(engine)
        month = timedelta(days=DAYS - MONTH_DAYS)
        keep = {"log_retention_days": month.days, "image_retention_days": None, "windows": {}}
        found["seconds to delete a month"] = _timed(lambda: delete_expired(engine, now=END, **keep))
        found["seconds to drop its partition"] = _timed(lambda: _execute(engine, "DROP TABLE by_month_00"))
        engine.dispose()
    growth = per_row[1] / per_row[0]
    return Report(
        name="log-rows",
        title="The request log with many rows",
        unit="row",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(("psycopg2-binary",)),
        settings={"rows": ALL, "first": FIRST, "days": DAYS, "window_days": WINDOW_DAYS},
        observations={},
        ratios=[],
        checks=[
            Check(
                what="time of a window for each of its rows, when the table grows fivefold",
                expected=f"≤ {MOST_GROWTH:g} times",
                received=f"{growth:.2f}",
                held=growth <= MOST_GROWTH,
            )
        ],
        notes=[f"{name}: {value:,.3g}" for name, value in found.items()],
    )


def _simulate(engine: Engine, table: str, start: int, count: int) -> None:
    values = {"name": MODEL.model_name, "version": MODEL.version, "end": END.isoformat(), "days": DAYS}
    _execute(engine, _ROWS.format(table=table, columns=_COLUMNS, start=start, count=count, **values))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"VACUUM ANALYZE {table}"))


def _window(engine: Engine) -> None:
    window = read_window(
        engine, MODEL, WindowBounds(END - timedelta(days=WINDOW_DAYS), END, "answered"), MonitorConfig(max_samples=1000)
    )
    assert window.requests > 0


def _partition(engine: Engine) -> None:
    """Makes a copy of the rows' oldest month as a partition of a table of its own."""
    first = END - timedelta(days=DAYS)
    bounds = f"FROM ('{first.isoformat()}') TO ('{(first + timedelta(days=MONTH_DAYS)).isoformat()}')"
    _execute(engine, "CREATE TABLE by_month (LIKE predictions) PARTITION BY RANGE (created_on)")
    _execute(engine, "CREATE INDEX ON by_month (model_name, model_version, created_on)")
    _execute(engine, f"CREATE TABLE by_month_00 PARTITION OF by_month FOR VALUES {bounds}")
    until = (first + timedelta(days=MONTH_DAYS)).isoformat()
    _execute(engine, f"INSERT INTO by_month SELECT * FROM predictions WHERE created_on < '{until}'")


def _bytes(engine: Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.execute(text(f"SELECT pg_total_relation_size('{table}')")).scalar_one())


def _execute(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
