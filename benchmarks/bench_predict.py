"""POST /predict: a replica of the original's request path against the platform's service.

Both servers run at the same time, each with the processes that it starts by default (the original one, ours those of
`make up`). They hold the same trained model, get the same 320×240 JPEG files from the same load generator, explain
every prediction and log it to the same PostgreSQL; their measurements alternate. Rows are counted at the end: speed
that loses the log would be no speed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
from sqlalchemy import create_engine, text

from benchmarks import original_serving
from benchmarks.harness import (
    Observation,
    Ratio,
    Report,
    Stopwatch,
    compare,
    machine_line,
    measure_interleaved,
)
from benchmarks.installation import (
    deploy_by_graph,
    isolated_environment,
    isolated_settings,
    quick_experiment,
    scratch_folder,
    write_config,
)
from benchmarks.options import Options
from benchmarks.servers import Server, all_under_load, process_tree_memory_bytes
from benchmarks.services import original_replica, platform_service
from benchmarks.uploads import write_uploads
from cv_platform.errors import BundleNotFoundError, ServiceError
from cv_platform.settings import Settings
from cv_platform.storage import BundleMetadata, CentralStorage

UPLOADS = 16
LOADS = ((1, 5.0, 10), (8, 6.0, 16))
"""(requests in flight, seconds, at least so many requests) of each measurement."""
DRAIN_SECONDS = 60.0
LIBRARIES = ("tensorflow", "keras", "bentoml", "fastapi", "uvicorn", "pillow", "opencv-python-headless", "onnxruntime")


def run(options: Options) -> Report:
    """Runs the comparison on the model that `options.home` serves, or on the original's network, trained for it."""
    with scratch_folder("bench-predict") as folder:
        return _run(options, folder)


def _run(options: Options, scratch: Path) -> Report:
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    clock = Stopwatch()
    experiment = quick_experiment()
    configs = write_config(experiment, scratch / "configs")
    settings = isolated_settings(options.home or scratch / "home", configs)
    with database_url(settings) as url:
        migrate(url)
        environment = isolated_environment(settings, database_url=url)
        if options.home is None:
            deploy_by_graph(experiment, settings, environment, options.say)
        bundle, metadata = _production(settings, scratch)
        images = write_uploads(options.uploads, scratch / "uploads", count=UPLOADS, seed=options.seed)
        answers = {"original": 0, "platform": 0}
        rows_before = _rows(url, metadata)
        with (
            original_replica(bundle, metadata, url, environment, scratch) as original,
            platform_service(settings, environment, scratch) as platform,
        ):
            servers = {"original": original, "platform": platform}
            observations = measure_interleaved(
                all_under_load(servers, images, LOADS, answers),
                rounds=options.rounds,
                say=options.say,
            )
            memory = {name: process_tree_memory_bytes(server.pid) for name, server in servers.items()}
            rows = _rows_after_draining(url, metadata, rows_before, answers, platform)
    notes = [
        f"rows in PostgreSQL per answer with status 200: original {rows['original']} of {answers['original']}, "
        f"platform {rows['platform']} of {answers['platform']}"
    ]
    known = {name: used / 2**20 for name, used in memory.items() if used is not None}
    if known:
        notes.append("memory (PSS): " + ", ".join(f"{name} {used:.0f} MiB" for name, used in known.items()))
    notes += [_tail(name, observations[name]) for name in observations]
    network = metadata.effective_config.get("model", {}).get("architecture", metadata.model_name)
    height, width = metadata.image_size
    return Report(
        name="predict",
        title=(
            f"POST /predict, {options.uploads} of 320×240 px, {network} at {height}×{width} px ({metadata.runtime}), "
            f"{settings.service_workers} workers, explained and logged"
        ),
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={
            "network": str(network),
            "height_px": height,
            "width_px": width,
            "runtime": metadata.runtime,
            "uploads": options.uploads,
            "loads": str(LOADS),
            "rounds": options.rounds,
            "seed": options.seed,
        },
        observations=observations,
        ratios=_ratios(observations, options.seed),
        notes=notes,
    )


def _ratios(observations: Mapping[str, Sequence[Observation]], seed: int) -> list[Ratio]:
    quantities = (
        ("platform", "original", "units_per_second"),
        ("original", "platform", "p50_ms"),
        ("original", "platform", "cpu_us_per_unit"),
    )
    ratios = [
        compare(observations, f"{above}, c={concurrency}", f"{below}, c={concurrency}", quantity, seed=seed)
        for concurrency, _, _ in LOADS
        for above, below, quantity in quantities
    ]
    return [ratio for ratio in ratios if ratio is not None]


def _production(settings: Settings, cache: Path) -> tuple[Path, BundleMetadata]:
    storage = CentralStorage(settings.storage_url)
    pointer = storage.read_pointer(settings.service_name)
    if pointer is None:
        raise BundleNotFoundError(
            f"Expected a deployed model in {settings.home}. Received: none. Run `make demo` there, or leave --home out."
        )
    return storage.fetch_bundle(pointer.model_name, pointer.version, cache)


def _rows(url: str, metadata: BundleMetadata) -> dict[str, int]:
    """Counts the logged predictions of both sides; a table that is not there yet has none."""
    engine = create_engine(url)
    try:
        with engine.connect() as connection:
            platform = text(
                "SELECT count(*) FROM predictions p JOIN api_log a USING (prediction_id) "
                "WHERE a.response_status_code = 200 AND p.model_version = :version"
            )
            found = {"platform": int(connection.execute(platform, {"version": metadata.version}).scalar_one())}
            table = f"{original_serving.SCHEMA}.predictions"
            there = connection.execute(text("SELECT to_regclass(:table)"), {"table": table}).scalar()
            found["original"] = (
                int(connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one()) if there else 0
            )
            return found
    finally:
        engine.dispose()


def _rows_after_draining(
    url: str, metadata: BundleMetadata, before: dict[str, int], answers: dict[str, int], platform: Server
) -> dict[str, int]:
    """Waits until every answer of the platform has its row and returns the new rows of both sides.

    Raises:
        ServiceError: rows are missing.
    """
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        after = _rows(url, metadata)
        rows = {name: after[name] - before[name] for name in after}
        if rows["platform"] == answers["platform"]:
            return rows
        if time.monotonic() > deadline:
            health = httpx.get(f"{platform.base_url}/health_check", timeout=10).text
            raise ServiceError(
                f"Expected a row for each of {answers['platform']} answers within {DRAIN_SECONDS:.0f} s. "
                f"Received: {rows['platform']}. The service says: {health[:500]}"
            )
        time.sleep(0.5)


def _tail(name: str, observations: list[Observation]) -> str:
    shares = sorted(o.metrics["p99_ms"] / o.metrics["p50_ms"] for o in observations)
    return f"{name}: p99 / p50 = {shares[len(shares) // 2]:.1f}"
