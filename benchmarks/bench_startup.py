"""`make up`: seconds until everything answers, and the memory of all its processes once they are idle.

Before: MLflow's server with its job execution, helpers for language models that nothing here uses. After: as the
platform starts it. Both in turns, on one installation with a deployed model that has been started before.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

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
from benchmarks.installation import (
    isolated_environment,
    isolated_settings,
    quick_experiment,
    scratch_folder,
    write_config,
)
from benchmarks.options import REPOSITORY, Options
from benchmarks.servers import process_memory_bytes, process_tree, process_tree_cpu_seconds
from benchmarks.untrained import deploy_untrained
from cv_platform.database.cluster import Cluster
from cv_platform.errors import ServiceError
from cv_platform.local.http import free_port, wait_for_http
from cv_platform.local.leftovers import leftover_pids, program_mark
from cv_platform.local.programs import programs
from cv_platform.settings import Settings

BEFORE, AFTER = "with MLflow's jobs", "as it is"
MOST_SECONDS = 45.0
MOST_MIB = 1600e6 / 2**20
IDLE_CORES = 0.3
IDLE_SECONDS = 5.0
SETTLE_SECONDS = 120.0
LIBRARIES = ("mlflow", "dagster", "evidently", "bentoml")


def run(options: Options) -> Report:
    """Starts and stops the whole stack twice per round."""
    clock = Stopwatch()
    with scratch_folder("bench-startup") as scratch:
        configs = scratch / "configs"
        ports = {f"{name}_port": free_port() for name in ("service", "dagster", "mlflow", "evidently")}
        settings = isolated_settings(scratch / "home", configs, **ports)
        environment = isolated_environment(settings, database_url="")
        environment.pop("DATABASE_URL", None)
        environment |= {f"CV_{name.upper()}": str(port) for name, port in ports.items()}
        experiment = quick_experiment("startup")
        write_config(experiment, configs)
        height = experiment.model.input_size.h
        deploy_untrained(
            settings,
            environment,
            scratch / "export",
            name=experiment.name,
            architecture=experiment.model.architecture,
            side_px=height,
            runtime="onnx",
        )
        switched = {BEFORE: "true", AFTER: "false"}
        observations = measure_interleaved(
            [
                Alternative(
                    name,
                    _started(settings, {**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": value}, name, options.say),
                )
                for name, value in switched.items()
            ],
            rounds=options.rounds,
            warm_up=1,  # Makes the databases.
        )
    quantities = ("ready_seconds", "idle_mib", "processes", "cpu_us_per_unit")
    ratios = [compare(observations, BEFORE, AFTER, quantity, seed=options.seed) for quantity in quantities]
    return Report(
        name="startup",
        title="`make up` to all healthy, and its memory when idle, with a deployed model",
        unit="start",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"rounds": options.rounds, "seed": options.seed, "service_workers": settings.service_workers},
        observations=observations,
        ratios=[ratio for ratio in ratios if ratio is not None],
        checks=judge(observations[AFTER]),
        notes=["idle_mib is the PSS of all processes, PostgreSQL's included, once they use less than 0.3 of a core"],
    )


def judge(after: list[Observation]) -> list[Check]:
    """Compares the medians with what is promised."""
    checks: list[Check] = []
    for what, quantity, most, unit in (
        ("`make up` to all healthy", "ready_seconds", MOST_SECONDS, "s"),
        ("memory of all processes when idle", "idle_mib", MOST_MIB, "MiB"),
    ):
        values = sorted(value for one in after if (value := one.metrics.get(quantity)) is not None)
        if not values:
            continue  # macOS tells no PSS.
        median = values[len(values) // 2]
        checks.append(
            Check(
                what=what,
                expected=f"≤ {most:,.0f} {unit}",
                received=f"{median:,.1f} {unit} ({values[0]:,.1f}–{values[-1]:,.1f}, {len(values)} rounds)",
                held=median <= most,
            )
        )
    return checks


def _started(
    settings: Settings, environment: Mapping[str, str], name: str, say: Callable[[str], None]
) -> Callable[[], Observation]:
    def measure() -> Observation:
        begin = time.perf_counter()
        try:
            _command(environment, "up", settings.home)
            wait_for_http(f"http://127.0.0.1:{settings.service_port}/readyz", seconds=SETTLE_SECONDS)
            ready_seconds = time.perf_counter() - begin
            cpu_seconds = _settle(settings)
            memory = [process_memory_bytes(process.pid) for process in stack_processes(settings)]
        finally:
            _command(environment, "down", settings.home)
        metrics = {"ready_seconds": ready_seconds, "processes": float(len(memory))}
        if known := [size for size in memory if size]:
            metrics["idle_mib"] = sum(known) / 2**20
        say(f"  {name}: " + ", ".join(f"{quantity} {value:,.0f}" for quantity, value in metrics.items()))
        return Observation(units=1, wall_seconds=ready_seconds, cpu_seconds=cpu_seconds, metrics=metrics)

    return measure


def stack_processes(settings: Settings) -> list[psutil.Process]:
    """Lists all processes of the running stack: supervisord's, PostgreSQL's, and what carries a program's mark."""
    roots = {int((settings.home / "run" / "supervisord.pid").read_text())}
    for program in programs(settings):
        roots.update(leftover_pids(program_mark(settings.home, program.name)))
    if (postmaster := Cluster(settings.home).postmaster()) is not None:
        roots.add(postmaster.pid)
    return list({process.pid: process for root in roots for process in process_tree(root)}.values())


def _settle(settings: Settings) -> float:
    """Waits until the stack is idle, and returns the CPU time that it has used by then."""
    deadline = time.monotonic() + SETTLE_SECONDS
    root = int((settings.home / "run" / "supervisord.pid").read_text())
    used = process_tree_cpu_seconds(root)
    while True:
        time.sleep(IDLE_SECONDS)
        before, used = used, process_tree_cpu_seconds(root)
        if used - before < IDLE_CORES * IDLE_SECONDS:
            return used
        if time.monotonic() > deadline:
            raise ServiceError(
                f"Expected a stack that is idle within {SETTLE_SECONDS:.0f} s. Received: one that used "
                f"{(used - before) / IDLE_SECONDS:.1f} cores. Run this on a machine with nothing else to do."
            )


def _command(environment: Mapping[str, str], command: str, home: Path) -> None:
    log = home.parent / f"{command}.log"
    with log.open("w", encoding="utf-8") as file:
        result = subprocess.run(
            [sys.executable, "-m", "cv_platform.cli", command],
            env=dict(environment),
            cwd=REPOSITORY,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if result.returncode != 0:
        raise ServiceError(
            f"`cv-platform {command}` failed in {REPOSITORY}:\n{log.read_text(errors='replace')[-3000:]}"
        )
