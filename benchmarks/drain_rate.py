"""How fast the request log brings entries without images to PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import numpy as np

from benchmarks.harness import Observation
from cv_platform.errors import ServiceError
from cv_platform.serving.log.drainer import Drainer
from cv_platform.serving.log.entry import LogEntry
from cv_platform.serving.log.spool import Spool

ROWS = 20_000
_CLASSES = tuple(f"class_{number}" for number in range(10))
_APPENDED_TOGETHER = 1_000
_DRAIN_SECONDS = 120.0


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
            entries = _entries(rows)
            for start in range(0, rows, _APPENDED_TOGETHER):
                for future in [spool.submit(entry) for entry in entries[start : start + _APPENDED_TOGETHER]]:
                    future.result(_DRAIN_SECONDS)
            drainer = Drainer(spool, url, adopt=False)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            drainer.start()
            is_drained = drainer.wait_until_drained(_DRAIN_SECONDS)
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
            status = drainer.status()
            drainer.close()
        finally:
            spool.close()
        if not is_drained or status.drained_rows != rows:
            raise ServiceError(f"Expected {rows} rows in {_DRAIN_SECONDS:.0f} s. Received: {status}.")
        return Observation(units=rows, wall_seconds=seconds, cpu_seconds=cpu_seconds)

    return measure


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
