"""The request log with many rows: what of a window and of a night of retention grows with the table.

Rows are simulated in the database itself, at a million a year, with vectors as a small network has them; every tenth
has an upload of its own, of a few bytes. One log has a year of them, another ten years: a window, and a slice that
retention deletes, have as many rows in both, and are measured in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Literal

from sqlalchemy import Engine, create_engine, make_url, text

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.installation import isolated_settings, scratch_folder
from benchmarks.options import Options
from cv_platform.config import MonitorConfig
from cv_platform.database.connection import make_engine
from cv_platform.database.retention import BATCH_ROWS, delete_expired
from cv_platform.monitoring.window import WindowBounds, read_window
from cv_platform.records import ModelIdentity

YEAR_ROWS, SIZES = 1_000_000, (1_000_000, 10_000_000)
WINDOW_DAYS, MONTH_DAYS = 7, 30
WINDOW = f"{WINDOW_DAYS} days, {YEAR_ROWS * WINDOW_DAYS // 365:,} rows"
MONTH = f"{MONTH_DAYS} days, {YEAR_ROWS * MONTH_DAYS // 365:,} rows"
END = datetime(2026, 1, 1, tzinfo=UTC)
MODEL = ModelIdentity(model_name="simulated", version="20250101T000000Z-00000001")
SLICE = f"seconds of a slice of {BATCH_ROWS:,} rows that retention deletes"
NIGHT = "seconds of a night of retention that finds nothing too old"
MOST_GROWTH = 2.0
"""Of what has as many rows as before, when the log grows tenfold."""
MOST_SECONDS = 1.0
"""Of a window, of a slice of retention, and of a night that finds nothing too old, whatever the size of the table."""
_UPLOAD = "CASE WHEN mod(n, 10) = 0 THEN encode(sha256(n::text::bytea), 'hex') END"
_COLUMNS = (
    "prediction_id, model_name, model_version, predicted_class, prediction_json, uae_feats, bbsd_feats, features, "
    "properties, image_sha256, created_on, logged_on"
)
_SIMULATED = """
SELECT n, timestamptz '{end}' - interval '1 day' * (365 * (n + 0.5) / {year}) AS moment
FROM generate_series({start}, {stop} - 1) AS n
"""
"""Their times are spread evenly over the years before `END`."""
_IMAGES = """
INSERT INTO images (sha256, content, bytes, media_type, created_on)
SELECT {upload}, 'simulated'::bytea, 9, 'image/jpeg', moment FROM ({simulated}) AS simulated WHERE mod(n, 10) = 0
"""
_ROWS = """
INSERT INTO predictions ({columns})
SELECT gen_random_uuid(), '{name}', '{version}', 'class ' || mod(n, 10), '{{"class 0": 0.1}}'::jsonb,
    array_fill(n::real, ARRAY[32]), array_fill(0.1::real, ARRAY[10]), array_fill(n::real, ARRAY[128]),
    array_fill(1::real, ARRAY[7]), {upload}, moment, moment
FROM ({simulated}) AS simulated
"""


def run(options: Options) -> Report:
    """Measures two sizes of the log in turns, then drops a month as a partition for comparison."""
    from cv_platform.database.connection import database_url

    clock = Stopwatch()
    notes: list[str] = []
    with (
        scratch_folder("bench-log-rows") as scratch,
        database_url(isolated_settings(scratch / "home", scratch / "configs")) as url,
    ):
        engines = [_log(url, rows, options, notes) for rows in SIZES]
        costs = {
            f"seconds of a window by {by} ({WINDOW})": _in_turns(
                [partial(_window, engine, by) for engine in engines], options.rounds
            )
            for by in ("answered", "logged")
        }
        # Each night has another three days to delete.
        nights = [
            [partial(_night, engine, 365 * rows // YEAR_ROWS - 3 * turn) for turn in range(options.rounds + 2)]
            for engine, rows in zip(engines, SIZES, strict=True)
        ]
        nights = [iter(of_one) for of_one in nights]
        seconds = _in_turns([lambda of_one=of_one: next(of_one)() for of_one in nights], options.rounds)
        costs[SLICE] = [one / (3 * YEAR_ROWS / 365 / BATCH_ROWS) for one in seconds]
        costs[NIGHT] = _in_turns([partial(_night, engine, 36_500) for engine in engines], options.rounds)
        notes.append(f"seconds to drop a partition of {MONTH}: {_drop_partition(engines[-1]):,.3g}")
        for engine in engines:
            engine.dispose()
    for name, of_sizes in costs.items():
        notes += [f"{name}, among {rows:,} rows: {one:,.3g}" for rows, one in zip(SIZES, of_sizes, strict=True)]
    checks = [
        Check(
            what=f"{name}, when the log grows tenfold",
            expected=f"≤ {MOST_GROWTH:g} times",
            received=f"{of_sizes[1] / of_sizes[0]:.2f}",
            held=of_sizes[1] <= MOST_GROWTH * of_sizes[0],
        )
        for name, of_sizes in costs.items()
    ]
    checks += [
        Check(
            what=f"{name}, among {SIZES[1]:,} rows",
            expected=f"≤ {MOST_SECONDS:g}",
            received=f"{of_sizes[1]:.3f}",
            held=of_sizes[1] <= MOST_SECONDS,
        )
        for name, of_sizes in costs.items()
    ]
    return Report(
        name="log-rows",
        title="The request log with many rows",
        unit="row",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(("psycopg2-binary",)),
        settings={"rows": SIZES[1], "first": SIZES[0], "rows_a_year": YEAR_ROWS, "window_days": WINDOW_DAYS},
        observations={},
        ratios=[],
        checks=checks,
        notes=notes,
    )


def _in_turns(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Returns the median seconds of each, after one that is not counted."""
    for work in works:
        work()
    times = [[_timed(work) for work in works] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def _log(url: str, rows: int, options: Options, notes: list[str]) -> Engine:
    """Makes a database of so many rows on the server of `url`."""
    from cv_platform.database.migrate import migrate

    name = f"rows_{rows}"
    with create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    of_rows = make_url(url).set(database=name).render_as_string(hide_password=False)
    migrate(of_rows)
    engine = make_engine(of_rows)
    seconds = _timed(lambda: simulate(engine, 0, rows))
    options.say(f"{rows:,} rows, {seconds:.0f} s")
    notes.append(f"microseconds to write each of {rows:,} rows: {1e6 * seconds / rows:,.3g}")
    notes.append(f"bytes of each of {rows:,} rows, with indexes: {_bytes(engine, 'predictions') / rows:,.0f}")
    return engine


def simulate(engine: Engine, have: int, rows: int) -> None:
    """Writes the rows from `have` on."""
    simulated = _SIMULATED.format(end=END.isoformat(), year=YEAR_ROWS, start=have, stop=rows)
    values = {"columns": _COLUMNS, "upload": _UPLOAD, "simulated": simulated}
    _execute(engine, _IMAGES.format(**values))
    _execute(engine, _ROWS.format(name=MODEL.model_name, version=MODEL.version, **values))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))


def _night(engine: Engine, days: int) -> None:
    delete_expired(engine, now=END, log_retention_days=days, image_retention_days=None, windows={})


def _window(engine: Engine, by: Literal["answered", "logged"]) -> None:
    window = read_window(
        engine, MODEL, WindowBounds(END - timedelta(days=WINDOW_DAYS), END, by), MonitorConfig(max_samples=1000)
    )
    assert window.requests > 0


def _drop_partition(engine: Engine) -> float:
    """Makes a copy of a month's rows as a partition of a table of its own, and returns how long it takes to drop it."""
    first = END - timedelta(days=MONTH_DAYS)
    _execute(engine, "CREATE TABLE by_month (LIKE predictions) PARTITION BY RANGE (created_on)")
    _execute(engine, "CREATE INDEX ON by_month (model_name, model_version, created_on)")
    bounds = f"FROM ('{first.isoformat()}') TO ('{END.isoformat()}')"
    _execute(engine, f"CREATE TABLE by_month_00 PARTITION OF by_month FOR VALUES {bounds}")
    _execute(engine, f"INSERT INTO by_month SELECT * FROM predictions WHERE created_on >= '{first.isoformat()}'")
    return _timed(lambda: _execute(engine, "DROP TABLE by_month_00"))


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
