"""ONNX Runtime against TensorFlow: the same network, exported for each, served by one worker and called in process.

In each round both services are started, asked and stopped, one after the other, so that neither shares memory or cores
with the other. What BentoML itself takes is in both sides of every number. Starts find their modules compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from benchmarks.harness import (
    Alternative,
    Check,
    Observation,
    Ratio,
    Report,
    Stopwatch,
    compare,
    in_process,
    machine_line,
    measure_interleaved,
)
from benchmarks.installation import ORIGINAL_ARCHITECTURE, isolated_environment, isolated_settings, scratch_folder
from benchmarks.options import Options
from benchmarks.servers import process_memory_bytes, process_tree_memory_bytes, under_load
from benchmarks.services import platform_service, worker_pids
from benchmarks.untrained import deploy_untrained
from benchmarks.uploads import write_uploads
from cv_platform.serving.model.runtime import LoadedModel, load_bundle
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

RUNTIMES: tuple[Literal["onnx", "tensorflow"], ...] = ("onnx", "tensorflow")
UPLOADS = 16
LOAD_SECONDS = 3.0
MINIMUM_REQUESTS = 200
CALLS = 300
MOST_MEMORY = 0.3
MOST_START = 0.3
MOST_LATENCY = 0.65
LIBRARIES = ("onnxruntime", "tensorflow", "keras", "bentoml", "numpy")


@dataclass(frozen=True)
class _Installation:
    settings: Settings
    environment: dict[str, str]
    scratch: Path


def run(options: Options) -> Report:
    """Runs the comparison on the original's network with seeded random weights: speed does not depend on them."""
    clock = Stopwatch()
    side = int(ORIGINAL_ARCHITECTURE["input_size"]["h"])
    with scratch_folder("bench-runtime") as scratch:
        images = write_uploads(options.uploads, scratch / "uploads", count=UPLOADS, seed=options.seed)
        installations = {runtime: _deployed(scratch / runtime, runtime, side) for runtime in RUNTIMES}
        observations = measure_interleaved(
            [Alternative(f"{name}, served", _served(place, images)) for name, place in installations.items()],
            rounds=options.rounds,
            warm_up=1,  # The first start compiles every module, which is more than half of it.
            say=options.say,
        )
        # Last: no TensorFlow of ours should lie beside a measured server.
        models = {runtime: _loaded(place) for runtime, place in installations.items()}
        pixels = np.random.default_rng(options.seed).integers(0, 256, (UPLOADS, side, side, 3), dtype=np.uint8)
        observations |= measure_interleaved(
            [Alternative(f"{name}, in process", _called(model, pixels)) for name, model in models.items()],
            rounds=options.rounds,
            say=options.say,
        )
    ratios, checks = _judge(observations, options.seed)
    return Report(
        name="runtime",
        title=f"ONNX Runtime against TensorFlow, small_cnn at {side}×{side} px, 1 worker, 1 request in flight",
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"height_px": side, "width_px": side, "rounds": options.rounds, "seed": options.seed, "calls": CALLS},
        observations=observations,
        ratios=ratios,
        checks=checks,
        notes=[
            "worker_mib is the PSS of the process that predicts, tree_mib that of the whole service",
            "worker_ready_seconds begin when BentoML starts that process, ready_seconds with BentoML's own command",
        ],
    )


def _deployed(scratch: Path, runtime: Literal["onnx", "tensorflow"], side: int) -> _Installation:
    scratch.mkdir(mode=0o711)
    settings = isolated_settings(scratch / "home", scratch / "configs", service_workers=1)
    environment = isolated_environment(settings, database_url="")
    environment.pop("DATABASE_URL", None)  # Both services only spool.
    # Modules are read as bytecode, as in the images, whatever this machine has of it, and is told of it.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(scratch / "bytecode")
    architecture = str(ORIGINAL_ARCHITECTURE["architecture"])
    deploy_untrained(
        settings,
        environment,
        scratch / "export",
        name=f"runtime_{runtime}",
        architecture=architecture,
        side_px=side,
        runtime=runtime,
    )
    return _Installation(settings, environment, scratch)


def _served(place: _Installation, images: Sequence[Path]) -> Callable[[], Observation]:
    def measure() -> Observation:
        begin = time.perf_counter()
        with platform_service(place.settings, place.environment, place.scratch) as server:
            ready_seconds = time.perf_counter() - begin
            (worker,) = map(psutil.Process, worker_pids(server.pid))
            # The kernel tells its own start in whole seconds: each is wrong by a part of one, their difference is not.
            worker_seconds = ready_seconds - (worker.create_time() - psutil.Process(server.pid).create_time())
            loaded = under_load(
                server, images, concurrency=1, seconds=LOAD_SECONDS, minimum_requests=MINIMUM_REQUESTS
            )()
            worker_bytes = process_memory_bytes(worker.pid)
            tree_bytes = process_tree_memory_bytes(server.pid)
        further = {"ready_seconds": ready_seconds, "worker_ready_seconds": worker_seconds}
        if worker_bytes and tree_bytes:
            further |= {"worker_mib": worker_bytes / 2**20, "tree_mib": tree_bytes / 2**20}
        return loaded.model_copy(update={"metrics": {**loaded.metrics, **further}})

    return measure


def _loaded(place: _Installation) -> LoadedModel:
    storage = CentralStorage(place.settings.storage_url)
    pointer = storage.read_pointer(place.settings.service_name)
    assert pointer is not None
    return load_bundle(storage, pointer.model_name, pointer.version, cache=place.scratch / "cache", threads=1)


def _called(model: LoadedModel, pixels: np.ndarray) -> Callable[[], Observation]:
    def work() -> int:
        for call in range(CALLS):
            model.predict(pixels[call % len(pixels)])
        return CALLS

    return in_process(work)


def _judge(observations: dict[str, list[Observation]], seed: int) -> tuple[list[Ratio], list[Check]]:
    promises = (
        ("memory of a worker", "served", "worker_mib", MOST_MEMORY),
        ("start of a worker to ready", "served", "worker_ready_seconds", MOST_START),
        ("start of BentoML to ready", "served", "ready_seconds", None),
        ("latency over HTTP, p50", "served", "p50_ms", None),
        ("latency of the combined call", "in process", "wall_us_per_unit", MOST_LATENCY),
        ("CPU time of the combined call", "in process", "cpu_us_per_unit", None),
    )
    ratios: list[Ratio] = []
    checks: list[Check] = []
    for what, place, quantity, most in promises:
        ratio = compare(observations, f"onnx, {place}", f"tensorflow, {place}", quantity, seed=seed)
        if ratio is None:
            continue
        ratios.append(ratio)
        checks.append(
            Check(
                what=f"{what}, ONNX Runtime / TensorFlow",
                expected="to be stated" if most is None else f"≤ {most:g}",
                received=f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f}, {ratio.rounds} rounds)",
                held=most is None or ratio.median <= most,
            )
        )
    return ratios, checks
