"""The current window: the requests of one model version between two moments in UTC, a seeded sample if they are many.

Bounds are half-open, [start, end), so that two adjacent windows share no row and lose none: on `created_on`, when a
request was answered, or on `logged_on`, when it reached the database. By the latter, a row that an outage has kept in a
spool is in the window in which it came, and counted there as late; a window that is over never changes.

The sample is drawn by a hash of the prediction's id, so that every request of the window has the same chance, the quiet
night's as the busy hour's, and a retry reads the same rows. The tests take requests as independent of each other: of an
upload that was sent again and again, the first request stands for all, unless `monitor.repeats` says otherwise. Where
uploads are not kept, equal pixel statistics to the last bit tell that it is the same.

Only the columns that the report needs are read; `database.uploads` fetches the few images that are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import pandas as pd
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Select,
    Text,
    case,
    cast,
    func,
    literal_column,
    select,
    text,
    true,
)

from cv_platform.config import ExperimentConfig, MonitorConfig
from cv_platform.database.schema import is_request, predictions
from cv_platform.database.version_index import latest_requests
from cv_platform.drift.sample import DriftSample, Float32Matrix
from cv_platform.drift.slices import SLICE_COLUMNS
from cv_platform.errors import ConfigError
from cv_platform.predictions import BBSD_FEATS, FEATURES, PROPERTIES, UAE_FEATS
from cv_platform.records import ModelIdentity

_VECTORS = {BBSD_FEATS: "bbsd", FEATURES: "features", UAE_FEATS: "uae", PROPERTIES: "properties"}
_more_memory = text(
    "SELECT set_config('work_mem', '64MB', true) "
    "WHERE pg_size_bytes(current_setting('work_mem')) < pg_size_bytes('64MB')"
)
"""Gives each of PostgreSQL's processes memory to sort some 600,000 requests, unless it has more, or takes files."""
_more_processes = text("SET LOCAL parallel_tuple_cost = 0")
"""Has several of them read and sort: PostgreSQL takes handing rows over for dearer than it is where they are short."""
_CANDIDATES = 4
"""How many requests, as a multiple of the sample, are expected where it is looked for; more repeats than that, and
it is looked for once more."""
_ROW_COLUMNS = ("prediction_id", "created_on", "predicted_class", "image_sha256", *SLICE_COLUMNS)
_place: ColumnElement[str] = literal_column("predictions.ctid")
"""Where a row lies, which holds for one snapshot: https://www.postgresql.org/docs/17/ddl-system-columns.html"""


@dataclass(frozen=True)
class WindowBounds:
    """Which requests: those with start ≤ time < end, in UTC, by the time that they were answered or logged at."""

    start: datetime
    end: datetime
    by: Literal["answered", "logged"] = "answered"

    def holds(self) -> ColumnElement[bool]:
        """Returns the SQL condition on `predictions`."""
        answered = (predictions.c.created_on >= self.start) & (predictions.c.created_on < self.end)
        if self.by == "answered":
            return answered
        # Null of rows from before the column was there. Not `coalesce`, which no index serves.
        logged = (predictions.c.logged_on >= self.start) & (predictions.c.logged_on < self.end)
        return logged | (predictions.c.logged_on.is_(None) & answered)

    def is_late(self) -> ColumnElement[bool]:
        """Returns the SQL condition for rows of the window that were answered before it."""
        return predictions.c.created_on < self.start

    @contextmanager
    def snapshot(self, engine: Engine) -> Iterator[Connection]:
        """Opens a view of the log that does not change, with all rows of the window, if that is over.

        Raises:
            DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
        """
        with engine.connect() as connection:
            if self.by == "logged":
                with connection.begin():  # Waits for what is being written, whose time is given already.
                    connection.execute(text("LOCK TABLE predictions IN SHARE MODE"))
        # One snapshot: rows that arrive meanwhile must not be counted and then not read.
        with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
            yield connection


@dataclass(frozen=True, eq=False)
class Window:
    """The requests of one model version in [start, end).

    Attributes:
        sample: the usable rows; None where there is none.
        rows: a row per row of `sample`, in order of time: prediction_id, created_on, predicted_class, image_sha256,
            and the columns of `SLICE_COLUMNS`.
        requests: answered requests in the window, read or not.
        late: of them, those that were answered before it.
        repeats: of them, those whose upload had been sent in the window before.
        is_sampled: not all were read that might have been, because there are more than the limit.
        unusable: rows read but left out: an embedding is not finite, or has another width than the others.
        others: requests in the window beside `requests`, which other versions of the model answered.
    """

    sample: DriftSample | None
    rows: pd.DataFrame
    requests: int
    late: int
    repeats: int
    is_sampled: bool
    unusable: int
    others: int = 0


def parse_utc(text: str) -> datetime:
    """Reads an ISO 8601 time with its zone, such as `2026-01-31T06:00:00Z`, and returns it in UTC.

    Raises:
        ConfigError: it is no such time, or has no zone.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as err:
        raise ConfigError(f"Expected an ISO 8601 time such as 2026-01-31T06:00:00Z. Received: {text!r}.") from err
    return require_utc(moment)


def require_utc(moment: datetime) -> datetime:
    """Returns an aware time in UTC.

    Raises:
        ConfigError: the time has no zone: local times compared as UTC have shifted windows unnoticed.
    """
    if moment.utcoffset() is None:
        raise ConfigError(f"Expected a time with its zone. Received: {moment.isoformat()}. Append Z for UTC.")
    return moment.astimezone(UTC)


def default_window(now: datetime, days: float) -> tuple[datetime, datetime]:
    """Returns the last `days` until `now`, in UTC.

    Raises:
        ConfigError: `now` has no zone.
    """
    end = require_utc(now)
    return end - timedelta(days=days), end


def window_bounds(monitor: MonitorConfig, now: datetime) -> WindowBounds:
    """Returns the configured bounds; a missing end is `now`, a missing start lies `window_days` before the end.

    Raises:
        ConfigError: the start is not before the end, or a time has no zone.
    """
    end = require_utc(now) if monitor.window_end_utc is None else parse_utc(monitor.window_end_utc)
    start, _ = default_window(end, monitor.window_days)
    if monitor.window_start_utc is not None:
        start = parse_utc(monitor.window_start_utc)
    if start >= end:
        raise ConfigError(
            f"Expected monitor.window_start_utc before monitor.window_end_utc. Received: {start.isoformat()} and "
            f"{end.isoformat()}."
        )
    return WindowBounds(start, end, monitor.window_by)


def monitored_since(experiments: Iterable[ExperimentConfig], now: datetime) -> dict[str, datetime]:
    """Returns by experiment where the window begins that its monitor judges now, or its schedule at its next tick.

    After missed ticks that window begins where the last one ended, which is not held: else a schedule that is stopped
    would keep uploads from being deleted for good.

    Raises:
        ConfigError: see `window_bounds`.
    """
    return {
        config.name: min(window_bounds(config.monitor, now).start, now - config.monitor.period)
        for config in experiments
    }


def read_window(engine: Engine, model: ModelIdentity, bounds: WindowBounds, monitor: MonitorConfig) -> Window:
    """Reads the answered requests of one model version in the window, `monitor.max_samples` of them at most.

    Args:
        engine: of the request log.
        model: whose requests.
        bounds: of the window.
        monitor: `repeats`, `max_samples`, and the `seed` of the sample.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    with bounds.snapshot(engine) as connection:
        connection.execute(_more_memory)
        connection.execute(_more_processes)
        requests, late, others = (int(count) for count in connection.execute(_counts(model, bounds)).one())
        pictures, table = _read(connection, model, bounds, monitor, requests)
    sample, kept = _sample(table)
    return Window(
        sample=sample,
        rows=table.loc[kept, list(_ROW_COLUMNS)].reset_index(drop=True),
        requests=requests,
        late=late,
        repeats=requests - pictures,
        is_sampled=(pictures if monitor.repeats == "once" else requests) > monitor.max_samples,
        unusable=len(table) - int(kept.sum()),
        others=others,
    )


def _counts(model: ModelIdentity, bounds: WindowBounds) -> Select:
    """Returns the query of `requests`, `late` and `others` of a `Window`."""
    own = predictions.c.model_version == model.version
    counts = [func.count().filter(own), func.count().filter(own & bounds.is_late()), func.count().filter(~own)]
    return select(*counts).where(predictions.c.model_name == model.model_name, bounds.holds(), is_request())


def _read(
    connection: Connection, model: ModelIdentity, bounds: WindowBounds, monitor: MonitorConfig, requests: int
) -> tuple[int, pd.DataFrame]:
    """Returns how many pictures a window of so many requests has, and the rows that its sample is made of."""
    pictures, records = 0, []
    share = min(1.0, _CANDIDATES * monitor.max_samples / max(requests, 1))
    while requests:
        found = [tuple(row) for row in connection.execute(_pictures_and_rows(model, bounds, monitor, share))]
        pictures, records = int(found[0][0]), [row[1:] for row in found if row[1] is not None]
        if len(records) >= min(monitor.max_samples, pictures if monitor.repeats == "once" else requests):
            break
        # Most are repeats. Of pictures the number is known now.
        share = min(1.0, _CANDIDATES * max(share, monitor.max_samples / pictures))
    return pictures, pd.DataFrame(records, columns=pd.Index([*_ROW_COLUMNS, *_VECTORS]))


def _pictures_and_rows(model: ModelIdentity, bounds: WindowBounds, monitor: MonitorConfig, share: float) -> Select:
    """Returns the query of how many pictures there are, and beside it, in each row, one of the sample, or nulls.

    The sample are the requests with the smallest draws. They are looked for among the lowest `share` of all draws; of
    the other requests only those that tell pictures from each other are kept, and of these no place.
    """
    sha256 = predictions.c.image_sha256
    statistics = case((sha256.is_(None), predictions.c.properties))
    # What is equal by 64 bits is the same picture: of two million, any two that are not have a chance of 1e-7.
    picture = func.coalesce(func.hashtextextended(sha256, 0), func.hash_array_extended(statistics, 0))
    draw = func.hashtextextended(cast(predictions.c.prediction_id, Text), monitor.seed)
    place = case((draw <= int(share * 2**64) - 2**63 - 1, _place))
    # Of each few bytes, as all of them are sorted, and handed from process to process.
    one_of = (picture,) if monitor.repeats == "once" else (picture, place)
    kept = (
        select(picture.label("picture"), draw.label("draw"), place.label("place"))
        .where(
            (predictions.c.model_name == model.model_name)
            & (predictions.c.model_version == model.version)
            & bounds.holds()
            & is_request()
        )
        .distinct(*one_of)
        .order_by(*one_of, predictions.c.created_on, draw)
        .subquery("kept")
    )
    lists = [func.array_agg(column).filter(kept.c.place.is_not(None)) for column in (kept.c.place, kept.c.draw)]
    found = select(
        func.count(kept.c.picture.distinct()).label("pictures"), lists[0].label("places"), lists[1].label("draws")
    )
    found = found.select_from(kept).cte("found")
    candidate = func.unnest(found.c.places, found.c.draws).table_valued("place", "draw").render_derived()
    chosen = select(candidate.c.place).select_from(found).join(candidate, true()).order_by(candidate.c.draw)
    # By their place in this snapshot: the index of ids would have to be read at another page for each.
    is_chosen = _place == func.any(func.array(chosen.limit(monitor.max_samples).scalar_subquery()))
    columns = [predictions.c[name] for name in (*_ROW_COLUMNS, *_VECTORS)]
    rows = select(found.c.pictures, *columns).select_from(found.outerjoin(predictions, is_chosen))
    return rows.order_by(predictions.c.created_on, predictions.c.prediction_id)


def count_requests(engine: Engine, *, model_name: str, after: datetime | None = None, most: int) -> int:
    """Counts the logged requests of a model that were answered after a moment, by an index; stops at `most`.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    answered = predictions.c.created_on
    rows = latest_requests(model_name, most, answered, where=None if after is None else answered > after)
    with engine.connect() as connection:
        counted = select(func.count()).select_from(rows.limit(most).subquery())
        return int(connection.execute(counted).scalar_one())


def last_request(engine: Engine, *, model_name: str) -> datetime | None:
    """Returns when the last logged request of a model was answered, by an index; None without any.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    latest = latest_requests(model_name, 1, predictions.c.created_on).subquery()
    with engine.connect() as connection:
        return connection.execute(select(func.max(latest.c.created_on))).scalar_one()


def estimate_rows(engine: Engine, *, model_name: str) -> int:
    """Returns about how many predictions of a model PostgreSQL takes the log to have, by its last ANALYZE.

    Raises:
        DatabaseUnavailableError, SchemaMismatchError: see `database.connection.make_engine`.
    """
    explain = text("EXPLAIN (FORMAT JSON) SELECT FROM predictions WHERE model_name = :model_name")
    with engine.connect() as connection:
        ((plan,),) = connection.execute(explain, {"model_name": model_name}).scalars()
    return int(plan["Plan"]["Plan Rows"])


def _sample(table: pd.DataFrame) -> tuple[DriftSample | None, np.ndarray]:
    """Returns the sample of the usable rows, and `(N,)` bool: which those are."""
    usable = np.ones(len(table), dtype=bool)
    if table.empty:
        return None, usable
    for column in _VECTORS:
        widths = table[column].map(len)
        # One version has one width; anything else is a row that another program wrote.
        usable &= (widths == widths.mode().iloc[0]).to_numpy() & (widths > 0).to_numpy()
    chosen = table.loc[usable]
    if chosen.empty:
        return None, usable
    sample, finite = DriftSample.from_rows({attribute: _matrix(chosen[name]) for name, attribute in _VECTORS.items()})
    usable[np.flatnonzero(usable)[~finite]] = False
    return (sample if len(sample) else None), usable


def _matrix(vectors: pd.Series) -> Float32Matrix:
    """Returns `(N, d)` float32; PostgreSQL's NULL inside an array becomes NaN."""
    rows: list[list[Any]] = vectors.tolist()
    return np.array([[math.nan if value is None else value for value in row] for row in rows], dtype=np.float32)
