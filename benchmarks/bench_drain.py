"""How fast the request log brings entries without images to PostgreSQL, beside a bare COPY of the same rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import numpy as np

from benchmarks.harness import (
    Alternative,
    Check,
    Observation,
    Report,
    Stopwatch,
    compare,
    machine_line,
    measure_interleaved,
)
from benchmarks.installation import isolated_settings, scratch_folder
from benchmarks.options import Options
from cv_platform.database.binary_copy import CopyStream, row_encoder, written_columns
from cv_platform.database.connection import make_engine
from cv_platform.database.schema import api_log, predictions
from cv_platform.errors import ServiceError
from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.entry import LogEntry, encode
from cv_platform.serving.log.spool import Spool, SpoolRow
from cv_platform.serving.log.tables import decoded_rows

ROWS = 60_000
LEAST_SHARE = 0.7
DRAIN, COPY = "drain, rows", "bare COPY, rows"
_CLASSES = tuple(f"class_{number}" for number in range(10))
_APPENDED_TOGETHER = 1_000
_DRAIN_SECONDS = 120.0
_LEAST_SECONDS = 10e-6
"""Of a row; the depth is not asked for while there is certainly one, as the answer takes time from the drainer."""


def run(options: Options) -> Report:
    """Drains and copies in turns, into one database of its own."""
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    clock = Stopwatch()
    with (
        scratch_folder("bench-drain") as scratch,
        database_url(isolated_settings(scratch / "home", scratch / "configs")) as url,
    ):
        migrate(url)
        ways = [Alternative(DRAIN, draining(url, scratch)), Alternative(COPY, bare_copying(url))]
        observations = measure_interleaved(ways, rounds=options.rounds, say=options.say)
    share = compare(observations, DRAIN, COPY, "units_per_second", seed=options.seed)
    assert share is not None
    check = Check(
        what="rows per second from the spool to PostgreSQL, without images: share of a bare COPY",
        expected=f"≥ {LEAST_SHARE:g}",
        received=f"{share.median:.2f} ({share.low:.2f}–{share.high:.2f}, {share.rounds} rounds)",
        held=share.median >= LEAST_SHARE,
    )
    return Report(
        name="drain",
        title="The request log's way to PostgreSQL",
        unit="row",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(("psycopg2-binary", "numpy")),
        settings={"rows": ROWS},
        observations=observations,
        ratios=[share],
        checks=[check],
    )


def draining(url: str, folder: Path, rows: int = ROWS) -> Callable[[], Observation]:
    """Returns a measurement: a spool with `rows` predictions is filled, then emptied into the database, which counts.

    Args:
        url: of a migrated database.
        folder: for the spools, one a measurement.
        rows: predictions, each of which becomes a row in `api_log` and one in `predictions`.

    Raises:
        ServiceError: when the measurement is taken, the spool is not empty in time.
    """

    def measure() -> Observation:
        spool = Spool(folder / f"drain-{uuid4().hex}")
        try:
            _fill(spool, rows)
            drainer = Drainer(spool, url, adopt=False)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            drainer.start()
            while (depth := drainer.status().depth) and time.perf_counter() - begin < _DRAIN_SECONDS:
                time.sleep(0.01 + depth * _LEAST_SECONDS)
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
            status = drainer.status()
            drainer.close()
        finally:
            spool.close()
        if status.drained_rows != rows:
            raise ServiceError(f"Expected {rows} rows in {_DRAIN_SECONDS:.0f} s. Received: {status}.")
        return Observation(units=rows, wall_seconds=seconds, cpu_seconds=cpu_seconds)

    return measure


def bare_copying(url: str, rows: int = ROWS) -> Callable[[], Observation]:
    """Returns a measurement: as many predictions go to the same tables by one COPY each, in one transaction.

    Their bytes are made before: nothing is left that another way of writing these rows could do without.

    Args:
        url: of a migrated database.
        rows: predictions, as of `draining`.
    """

    def measure() -> Observation:
        values = list(decoded_rows(SpoolRow(0, *entry[:-1], None, 0) for entry in map(encode, _entries(rows))))
        streams = [
            (table.name, written_columns(table), CopyStream(map(row_encoder(table, written_columns(table)), values)))
            for table in (predictions, api_log)
        ]
        made = [(name, columns, BytesIO(stream.read())) for name, columns, stream in streams]
        engine = make_engine(url)
        with closing(engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for name, columns, content in made:
                cursor.copy_expert(f"COPY {name} ({', '.join(columns)}) FROM STDIN WITH (FORMAT binary)", content)
            connection.commit()
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        engine.dispose()
        return Observation(units=rows, wall_seconds=seconds, cpu_seconds=cpu_seconds)

    return measure


def _fill(spool: Spool, rows: int) -> None:
    entries = _entries(rows)  # Not kept: the collector of garbage would go over them again and again.
    for start in range(0, rows, _APPENDED_TOGETHER):
        for future in [spool.submit(entry) for entry in entries[start : start + _APPENDED_TOGETHER]]:
            future.result(_DRAIN_SECONDS)


def _entries(count: int) -> list[LogEntry]:
    """Makes predictions of the sizes that a small network leaves."""
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(len(_CLASSES)), size=count).astype(np.float32)
    return [
        LogEntry(
            request_method="POST",
            request_url="/predict",
            response_status_code=200,
            response_message="ok",
            timespan=0.01,
            model_name="drain_classifier",
            model_version="20260131T060000Z-00000000",
            prediction_id=uuid4(),
            predicted_class=_CLASSES[int(row.argmax())],
            prediction_json=dict(zip(_CLASSES, row.tolist(), strict=True)),
            uae_feats=random.standard_normal(128).astype(np.float32),
            bbsd_feats=row,
            features=random.standard_normal(64).astype(np.float32),
            properties=random.standard_normal(7).astype(np.float32),
            raw_hm=random.random((6, 6), dtype=np.float32),
        )
        for row in probabilities
    ]
