"""The most that this machine gives for one image: decoding and the combined call, with no service around them.

`python -m benchmarks.ceiling` reads a `CeilingPlan` as JSON from standard input and writes an `Observation` to standard
output: a process of its own, as a worker is.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.harness import Observation, Record
from benchmarks.options import REPOSITORY
from cv_platform.images import decode, resize
from cv_platform.serving.machine import bound_opencv
from cv_platform.serving.model.runtime import load_bundle
from cv_platform.storage import CentralStorage

_START_SECONDS = 240.0


class CeilingPlan(Record):
    """What is called, how often at a time, for how long."""

    storage_url: str
    model_name: str
    version: str
    cache: Path
    images: list[Path]
    """Files, decoded in turn."""
    callers: int
    """Threads that call."""
    model_threads: int | None
    """Threads of one call, as a worker has them; None leaves it to the framework."""
    seconds: float


def in_process_ceiling(plan: CeilingPlan, environment: Mapping[str, str]) -> Callable[[], Observation]:
    """Returns a measurement of `plan`, in a process that is new each time."""

    def measure() -> Observation:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.ceiling"],
            input=plan.model_dump_json(),
            env=dict(environment),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=plan.seconds + _START_SECONDS,
        )
        return Observation.model_validate_json(done.stdout.splitlines()[-1])

    return measure


def run(plan: CeilingPlan) -> Observation:
    """Decodes, resizes and predicts from `plan.callers` threads of this process."""
    bound_opencv(plan.model_threads)
    model = load_bundle(
        CentralStorage(plan.storage_url), plan.model_name, plan.version, cache=plan.cache, threads=plan.model_threads
    )
    uploads = [path.read_bytes() for path in plan.images]
    for upload in uploads:
        model.predict(resize(decode(upload), model.metadata.image_size))
    numbers = itertools.count()
    begin, begin_cpu = time.perf_counter(), time.process_time()

    def call() -> None:
        while time.perf_counter() - begin < plan.seconds:
            upload = uploads[next(numbers) % len(uploads)]
            model.predict(resize(decode(upload), model.metadata.image_size))

    threads = [threading.Thread(target=call) for _ in range(plan.callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Observation(
        units=next(numbers),
        wall_seconds=time.perf_counter() - begin,
        cpu_seconds=time.process_time() - begin_cpu,
    )


if __name__ == "__main__":
    sys.stdout.write("\n" + run(CeilingPlan.model_validate_json(sys.stdin.read())).model_dump_json())
