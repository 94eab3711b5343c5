"""How long this machine may take. Time limits are set on one machine; another's pace is measured, and they follow it.

Only the limits of waiting belong here, never a measurement: what a benchmark reports is not scaled.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from functools import cache

from benchmarks.harness import available_cores
from cv_platform.errors import ServiceError

REFERENCE_SECONDS = 6.0
"""What `_seconds_of_work` is on two idle cores of a Xeon with AVX-512: 5 to 8 s, measured sixteen times."""
MOST = 4.0
"""A machine that is still slower has another trouble, which a limit is there to show."""
_ROUNDS = 3
_WORK = "import pandas, scipy.stats, sqlalchemy.orm, httpx"
"""Imports: what a start of containers and of Dagster's runs spends its time on, reading, unmarshalling, executing."""


@cache
def slowness() -> float:
    """Returns how many times longer than on the reference machine work takes here now, from 1 to `MOST`."""
    took = statistics.median(_seconds_of_work() for _ in range(_ROUNDS))
    return min(max(took / REFERENCE_SECONDS, 1.0), MOST)


def allowed(seconds: float) -> float:
    """Returns what a limit of so many seconds, set on the reference machine, comes to here."""
    return seconds * slowness()


def _seconds_of_work() -> float:
    """Returns the seconds until an interpreter per core, all started at once, has imported `_WORK`."""
    begin = time.monotonic()
    interpreters = [subprocess.Popen([sys.executable, "-c", _WORK]) for _ in range(available_cores())]
    if sum(interpreter.wait() for interpreter in interpreters):  # Waits for each, as any() would not.
        raise ServiceError(f"Expected an interpreter to run `{_WORK}`. Received: an error; run `make setup`.")
    return time.monotonic() - begin
