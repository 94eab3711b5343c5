"""The service as the stack starts it, for tests that look at it from outside."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cv_platform.local.environment import REPOSITORY
from cv_platform.local.http import free_port, wait_for_http
from cv_platform.local.programs import service_command


@contextmanager
def serving(home: Path, variables: Mapping[str, str]) -> Iterator[int]:
    """Serves from `home`, without a model, and yields the port; the output is in `home/service.log`."""
    port, log = free_port(), home / "service.log"
    environment = {
        **os.environ,
        "CV_HOME": str(home),
        "CV_STORAGE": str(home / "storage"),
        "BENTOML_HOME": str(home / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        **variables,
    }
    with log.open("w") as output:
        process = subprocess.Popen(service_command(port), env=environment, cwd=REPOSITORY, stdout=output, stderr=output)
    try:
        wait_for_http(f"http://127.0.0.1:{port}/livez", seconds=120, alive=lambda: process.poll() is None)
        yield port
    except Exception as err:
        err.add_note(log.read_text(errors="replace")[-4000:])
        raise
    finally:
        process.terminate()
        process.wait(timeout=60)
