"""The request log with many rows: what of a window and of a night of retention grows with the table.

One log has a million rows, another ten million, or as many as `--rows` says; both have 100 million a year (three a
second), so that a window, and what a night deletes, have as many rows in both. They are measured in turns. A row has
the vectors of a small network; in a log of more than ten million rows those of the smallest that there may be.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

from sqlalchemy import Engine, create_engine, make_url, text

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.installation import scratch_folder
from benchmarks.options import Options
from benchmarks.simulated_log import (
    END,
    MODEL,
    SPARE_BYTES,
    UPLOAD_EVERY,
    YEAR_ROWS,
    Widths,
    drop_from_memory,
    fill,
    loading_server,
    moment_before,
)
from cv_platform.config import MonitorConfig
from cv_platform.database.connection import make_engine
from cv_platform.database.embedded import embedded_database
from cv_platform.database.migrate import migrate
from cv_platform.database.retention import BATCH_ROWS, delete_expired
from cv_platform.errors import ConfigError
from cv_platform.files import require_free_space
from cv_platform.monitoring.window import WindowBounds, read_window

FIRST_ROWS, ROWS = 1_000_000, 10_000_000
SMALL, SMALLEST = (32, 10, 128), (2, 2, 3)
"""Widths of the vectors; the latter where there are more than `ROWS`."""
DAY_ROWS, WEEK_ROWS = YEAR_ROWS // 3650 * UPLOAD_EVERY, YEAR_ROWS * 7 // 365
WINDOWS = {"1.7 hours": 19_178, "a day": DAY_ROWS}
TURN_ROWS = 10 * BATCH_ROWS
SLICE = f"seconds of a slice of {BATCH_ROWS:,} rows that retention deletes"
NOTHING = "seconds of a night of retention that finds nothing too old"
DAY = f"seconds of a slice of {BATCH_ROWS:,} rows in a night that deletes a day's, {DAY_ROWS:,}"
MOST_GROWTH = 2.0
"""How many times as long a slice of as many rows may take, for each tenfold that the log grows."""
MOST_SECONDS = 1.0
"""The most that a window, a slice of retention or a night that finds nothing too old may take, in any table."""
_SORTING = 1.1
"""Disk space that is needed while rows and indexes are made, as a multiple of what they have in the end."""


def run(options: Options) -> Report:
    """Measures two sizes of the log in turns, then drops a day as a partition for comparison.

    Raises:
        ConfigError: `--rows` is too small.
        DiskSpaceError: the larger one does not fit on the disk.
    """
    clock = Stopwatch()
    sizes = (FIRST_ROWS, options.rows or ROWS)
    if sizes[1] <= FIRST_ROWS or sizes[1] % UPLOAD_EVERY:
        raise ConfigError(f"Expected --rows of more than {FIRST_ROWS:,}, in tens. Received: {sizes[1]:,}.")
    widths = SMALL if sizes[1] <= ROWS else SMALLEST
    notes: list[str] = []
    with scratch_folder("bench-log-rows") as scratch:
        home = scratch / "home"
        with loading_server(home) as url:
            each = _made(url, FIRST_ROWS, widths, home, options, notes)
            needed = round(_SORTING * each * sizes[1])
            notes.append(f"GB of disk for {sizes[1]:,} rows: {needed / 1e9:,.3g}, and {SPARE_BYTES / 1e9:g} to spare")
            purpose = f"{sizes[1]:,} simulated rows of {each:,.0f} bytes with their indexes"
            require_free_space(home, needed, purpose=purpose, spare_bytes=SPARE_BYTES)
            _made(url, sizes[1], widths, home, options, notes)
        drop_from_memory(home)
        with embedded_database(home) as url:  # Again, with the platform's own settings.
            engines = [make_engine(_named(url, rows)) for rows in sizes]
            cold = _timed(partial(_window, engines[1], "logged", DAY_ROWS))
            notes.append(f"seconds of the first window of a day, when all is read from the disk: {cold:.3g}")
            costs = _measured(dict(zip(sizes, engines, strict=True)), options)
            week = _timed(partial(_window, engines[1], "answered", min(WEEK_ROWS, sizes[1] // 2)))
            notes.append(f"seconds of a window of {min(WEEK_ROWS, sizes[1] // 2):,} rows: {week:.3g}")
            notes.append(f"seconds to drop a partition of a day: {_drop_partition(engines[1]):,.3g}")
            for engine in engines:
                engine.dispose()
    slices = math.ceil(DAY_ROWS / BATCH_ROWS)
    notes.append(f"seconds of a night that deletes a day's rows by {slices} slices: {costs[DAY][1] * slices:,.3g}")
    for name, of_sizes in costs.items():
        notes += [f"{name}, among {rows:,} rows: {one:,.3g}" for rows, one in zip(sizes, of_sizes, strict=True)]
    return Report(
        name="log-rows",
        title="The request log with many rows",
        unit="row",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(("psycopg2-binary",)),
        settings={"rows": sizes[1], "first": sizes[0], "rows_a_year": YEAR_ROWS, "floats": sum(widths) + 7},
        observations={},
        ratios=[],
        checks=_checks(costs, sizes),
        notes=notes,
    )


def _checks(costs: Mapping[str, Sequence[float]], sizes: tuple[int, int]) -> list[Check]:
    most = max(MOST_GROWTH, MOST_GROWTH ** math.log10(sizes[1] / sizes[0]))
    growth = [
        Check(
            what=f"{name}, when the log grows from {sizes[0]:,} to {sizes[1]:,} rows",
            expected=f"≤ {most:.3g} times",
            received=f"{second / first:.2f}",
            held=second <= most * first,
        )
        for name, (first, second) in costs.items()
    ]
    return growth + [
        Check(
            what=f"{name}, among {sizes[1]:,} rows",
            expected=f"≤ {MOST_SECONDS:g}",
            received=f"{second:.3f}",
            held=second <= MOST_SECONDS,
        )
        for name, (_, second) in costs.items()
    ]


def _measured(engines: Mapping[int, Engine], options: Options) -> dict[str, list[float]]:
    """Returns by name the median seconds in each log."""
    costs = {
        f"seconds of a window by {by} ({name}, {rows:,} rows)": _in_turns(
            [partial(_window, engine, by, rows) for engine in engines.values()], options.rounds
        )
        for by in ("answered", "logged")
        for name, rows in WINDOWS.items()
    }
    options.say("windows were read")
    # Each night has as many others to delete.
    turns = options.rounds + 1
    nights = [iter(range(rows - TURN_ROWS, 0, -TURN_ROWS)) for rows in engines]
    slices = [
        partial(lambda engine, of_one: _night(engine, next(of_one), TURN_ROWS), engine, of_one)
        for engine, of_one in zip(engines.values(), nights, strict=True)
    ]
    costs[SLICE] = [one * BATCH_ROWS / TURN_ROWS for one in _in_turns(slices, options.rounds)]
    nothing = [partial(_night, engine, 2 * rows, 0) for rows, engine in engines.items()]
    costs[NOTHING] = _in_turns(nothing, options.rounds)
    options.say("slices were deleted")
    days = [partial(_night, engine, rows - turns * TURN_ROWS - DAY_ROWS, DAY_ROWS) for rows, engine in engines.items()]
    costs[DAY] = [_timed(day) * BATCH_ROWS / DAY_ROWS for day in days]
    return costs


def _in_turns(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Returns the median seconds of each, after one that is not counted."""
    for work in works:
        work()
    times = [[_timed(work) for work in works] for _ in range(rounds)]
    return [statistics.median(of_one) for of_one in zip(*times, strict=True)]


def _made(url: str, rows: int, widths: Widths, home: Path, options: Options, notes: list[str]) -> float:
    """Makes a database of so many rows on the server of `url`, and returns what each takes of the disk, in bytes."""
    of_rows = _named(url, rows)
    with create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {make_url(of_rows).database}")
    migrate(of_rows)
    engine = make_engine(of_rows)
    seconds = _timed(lambda: fill(engine, rows, widths, home, options.say))
    with engine.connect() as connection:
        sizes = text("SELECT pg_database_size(current_database()), pg_total_relation_size('predictions')")
        whole, of_predictions = connection.execute(sizes).one()
    engine.dispose()
    notes.append(f"seconds to make {rows:,} rows with their indexes: {seconds:,.0f}")
    notes.append(f"bytes of each of {rows:,} rows, with indexes: {of_predictions / rows:,.0f}")
    notes.append(f"the same with `images`: {whole / rows:,.0f}")
    return whole / rows


def _named(url: str, rows: int) -> str:
    return make_url(url).set(database=f"rows_{rows}").render_as_string(hide_password=False)


def _night(engine: Engine, keep: int, gone: int) -> None:
    """Lets retention delete all but the last `keep` rows, which are to be `gone` ones."""
    days = 1
    now = moment_before(keep) + timedelta(days=days)
    found = delete_expired(engine, now=now, log_retention_days=days, image_retention_days=None, windows={})
    assert (found.predictions, found.images) == (gone, gone // UPLOAD_EVERY), found


def _window(engine: Engine, by: Literal["answered", "logged"], rows: int) -> None:
    window = read_window(engine, MODEL, WindowBounds(moment_before(rows), END, by), MonitorConfig(max_samples=1000))
    assert window.sample is not None
    assert (window.requests, window.repeats, len(window.sample)) == (rows, 0, 1000), window


def _drop_partition(engine: Engine) -> float:
    """Makes a copy of a day's rows as a partition of a table of its own, and returns how long it takes to drop it."""
    first = moment_before(DAY_ROWS)
    bounds = f"FROM ('{first.isoformat()}') TO ('{END.isoformat()}')"
    for statement in (
        "CREATE TABLE by_day (LIKE predictions) PARTITION BY RANGE (created_on)",
        "CREATE INDEX ON by_day (model_name, model_version, created_on)",
        f"CREATE TABLE by_day_00 PARTITION OF by_day FOR VALUES {bounds}",
        f"INSERT INTO by_day SELECT * FROM predictions WHERE created_on >= '{first.isoformat()}' "
        f"AND model_name = '{MODEL.model_name}' AND model_version = '{MODEL.version}'",
    ):
        _execute(engine, statement)
    return _timed(lambda: _execute(engine, "DROP TABLE by_day_00"))


def _execute(engine: Engine, statement: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
