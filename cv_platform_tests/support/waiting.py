"""Waiting for an event, bounded: no test waits for a fixed time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

WAIT_SECONDS = 120.0
"""Long, as it is spent only by what never happens."""


def wait_until(
    condition: Callable[[], object],
    *,
    seconds: float = WAIT_SECONDS,
    process: subprocess.Popen[bytes] | subprocess.Popen[str] | None = None,
) -> None:
    """Returns once the condition holds; until then `process`, where there is one, has to live."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            # What it wrote to a file its test can read.
            written = process.communicate()[1] or "nothing on its standard error"
            raise AssertionError(f"The process ended with {process.returncode} before it happened: {written!r}")
        assert time.monotonic() < deadline, f"It did not happen in {seconds:g} s."
        time.sleep(0.02)
