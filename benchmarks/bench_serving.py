"""`make bench-serving`: what the service promises of its speed, each promise with its number.

Four comparisons, each of alternatives that take turns: the original's replica against the service (`bench_predict`),
the service against decoding and the combined call alone (`ceiling`), the service with its request log against one
without (`unlogged_service`), and the drainer against a bare COPY (`bench_drain`). Networks have random weights where
nothing was trained: the speed does not depend on what was learnt. `bench_runtime` compares the runtimes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from sqlalchemy import create_engine, text

from benchmarks import bench_drain, bench_predict
from benchmarks.ceiling import CeilingPlan, in_process_ceiling
from benchmarks.harness import (
    Alternative,
    Check,
    Observation,
    Ratio,
    Report,
    Stopwatch,
    compare,
    machine_line,
    measure_interleaved,
)
from benchmarks.installation import isolated_environment, isolated_settings, scratch_folder
from benchmarks.options import Options
from benchmarks.servers import all_under_load, under_load
from benchmarks.services import SERVICE, platform_service
from benchmarks.untrained import deploy_untrained
from benchmarks.uploads import write_uploads
from cv_platform.errors import ServiceError
from cv_platform.serving.capacity.limits import ServingLimits
from cv_platform.settings import Settings

UNLOGGED = "benchmarks.unlogged_service:ImageClassifier"
NETWORKS = {"resnet50": 224, "small_cnn": 50}
"""Architecture to the side of its input in pixels."""
CEILING_CONCURRENCY = 4
CEILING_SECONDS = 6.0
LOG_LOADS = ((1, 3.0, 50), (8, 3.0, 50))
"""(requests in flight, seconds, at least so many requests) with the log and without."""
LOG_STARTS = 3
"""Starts of both services for each round."""
LEAST_RATIO = {1: 100.0, 8: 150.0}
"""Requests in flight to how many times as many requests per second as the replica answers."""
MOST_TAIL = 3.0
LEAST_SHARE = 0.9
"""Of the ceiling, for the large network."""
LEAST_SMALL_SHARE = 0.3
"""Of the ceiling, for the small network, whose call takes less time than drawing its explanation."""
MOST_LOGGING = 1.1


def run(options: Options) -> Report:
    """Takes all measurements and judges them.

    Raises:
        CvPlatformError: a server did not start or refused requests, or rows are missing.
    """
    clock = Stopwatch()
    options.say("against the replica …")
    report = bench_predict.run(options)
    observations = {name: list(found) for name, found in report.observations.items()}
    ratios, notes = list(report.ratios), list(report.notes)
    checks = _checks_against_replica(report)
    with scratch_folder("bench-serving") as scratch:
        for part in (_against_ceiling, _log_on_and_off):
            found, compared, judged = part(options, scratch)
            observations |= found
            ratios += compared
            checks += judged
    options.say("the drainer …")
    drained = bench_drain.run(options)
    observations |= drained.observations
    ratios += drained.ratios
    checks += drained.checks
    notes.append("resnet50 and the networks behind the ceiling and the log's cost have random weights")
    return Report(
        name="serving",
        title="The service's promises of speed, as `make up` starts it; 320×240 JPEG, explained",
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(bench_predict.LIBRARIES),
        settings={**report.settings, "drained_rows": bench_drain.ROWS, "ceiling_concurrency": CEILING_CONCURRENCY},
        observations=observations,
        ratios=ratios,
        checks=checks,
        notes=notes,
    )


Part = tuple[dict[str, list[Observation]], list[Ratio], list[Check]]


def _checks_against_replica(report: Report) -> list[Check]:
    checks: list[Check] = []
    for concurrency, least in LEAST_RATIO.items():
        ratio = next(
            ratio
            for ratio in report.ratios
            if ratio.quantity == "units_per_second" and ratio.numerator == f"platform, c={concurrency}"
        )
        checks.append(
            Check(
                what=f"requests per second against the original's replica, c={concurrency}",
                expected=f"≥ {least:g}×",
                received=interval(ratio),
                held=ratio.median >= least,
            )
        )
    tails = [found.metrics["p99_ms"] / found.metrics["p50_ms"] for found in report.observations["platform, c=8"]]
    tail = statistics.median(tails)
    checks.append(
        Check(
            what="p99 / p50, c=8",
            expected=f"≤ {MOST_TAIL:g}",
            received=f"{tail:.2f} ({min(tails):.2f}–{max(tails):.2f}, {len(tails)} rounds)",
            held=tail <= MOST_TAIL,
        )
    )
    return checks


def _against_ceiling(options: Options, scratch: Path) -> Part:
    """The service at four requests in flight against the better of two ways to call the model without it."""
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    observations: dict[str, list[Observation]] = {}
    ratios: list[Ratio] = []
    checks: list[Check] = []
    images = write_uploads(options.uploads, scratch / "uploads", count=bench_predict.UPLOADS, seed=options.seed)
    for architecture, side_px in NETWORKS.items():
        settings, place = _installation(scratch, architecture)
        with database_url(settings) as url, ExitStack() as stack:
            migrate(url)
            environment = isolated_environment(settings, database_url=url)
            options.say(f"publishing {architecture} …")
            version = deploy_untrained(
                settings, environment, place / "export", name="ceiling", architecture=architecture, side_px=side_px
            )[0]
            server = stack.enter_context(platform_service(settings, environment, place))
            service = f"{architecture}, service, c={CEILING_CONCURRENCY}"
            plan = ceiling_plan(settings, place, ("ceiling_classifier", version), images, CEILING_SECONDS)
            ways = {
                f"{architecture}, {name}": in_process_ceiling(plan.model_copy(update={"callers": callers}), environment)
                for name, callers in ceiling_callers(settings).items()
            }
            load = under_load(
                server,
                images,
                concurrency=CEILING_CONCURRENCY,
                seconds=CEILING_SECONDS,
                minimum_requests=8,
            )
            alternatives = [Alternative(service, load), *(Alternative(name, measure) for name, measure in ways.items())]
            found = measure_interleaved(alternatives, rounds=options.rounds, say=options.say)
        best = fastest(found, ways)
        ratio = compare(found, service, best, "units_per_second", seed=options.seed)
        assert ratio is not None
        observations |= found
        ratios.append(ratio)
        least = LEAST_SHARE if architecture == "resnet50" else LEAST_SMALL_SHARE
        checks.append(
            Check(
                what=f"{architecture} at {side_px} px, c={CEILING_CONCURRENCY}: share of {best.partition(', ')[2]}",
                expected=f"≥ {least:g}",
                received=interval(ratio),
                held=ratio.median >= least,
            )
        )
    return observations, ratios, checks


def ceiling_plan(
    settings: Settings, place: Path, model: tuple[str, str], images: Sequence[Path], seconds: float
) -> CeilingPlan:
    """Returns the plan of a ceiling by one caller for a model, given as name and version; `place` receives it."""
    return CeilingPlan(
        storage_url=settings.storage_url,
        model_name=model[0],
        version=model[1],
        cache=place / "cache",
        images=list(images),
        callers=1,
        model_threads=ServingLimits.of(settings).model_threads,
        seconds=seconds,
    )


def ceiling_callers(settings: Settings) -> dict[str, int]:
    """Returns, by name, from how many threads the model is called: as many as a worker's, and one for each request."""
    callers = sorted({ServingLimits.of(settings).predict_threads, CEILING_CONCURRENCY})
    return {f"in process, {count} callers": count for count in callers}


def fastest(found: Mapping[str, Sequence[Observation]], names: Iterable[str]) -> str:
    """Returns the alternative with the most units per second, in the median."""
    return max(names, key=lambda name: statistics.median(o.units / o.wall_seconds for o in found[name]))


def _log_on_and_off(options: Options, scratch: Path) -> Part:
    """Two services of the same model, one of which keeps no log."""
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    images = write_uploads(options.uploads, scratch / "uploads", count=bench_predict.UPLOADS, seed=options.seed)
    logged = _installation(scratch, "logged")[0]
    homes = {"log on": logged, "log off": _installation(scratch, "unlogged")[0]}
    observations: dict[str, list[Observation]] = {}
    with database_url(logged) as url:
        migrate(url)
        environments = {name: isolated_environment(home, database_url=url) for name, home in homes.items()}
        for name, home in homes.items():
            deploy_untrained(
                home,
                environments[name],
                home.home.parent / "export",
                name=_model_of(name).removesuffix("_classifier"),
                architecture="small_cnn",
                side_px=NETWORKS["small_cnn"],
            )
        answered = dict.fromkeys(homes, 0)

        # New processes each round: what one of them has by chance, such as its memory's layout, no repetition averages.
        for _ in range(LOG_STARTS * options.rounds):
            with ExitStack() as stack:
                servers = {
                    name: stack.enter_context(
                        platform_service(
                            home,
                            environments[name],
                            home.home.parent,
                            name=name.replace(" ", "-"),
                            service=SERVICE if name == "log on" else UNLOGGED,
                        )
                    )
                    for name, home in homes.items()
                }
                found = measure_interleaved(
                    all_under_load(servers, images, LOG_LOADS, answered),
                    rounds=1,
                    say=options.say,
                )
                _require_log_of(url, answered)
            for name, taken in found.items():
                observations.setdefault(name, []).extend(taken)
    ratios: list[Ratio] = []
    checks: list[Check] = []
    for concurrency, _, _ in LOG_LOADS:
        ratio = compare(
            observations, f"log on, c={concurrency}", f"log off, c={concurrency}", "p50_ms", seed=options.seed
        )
        assert ratio is not None
        ratios.append(ratio)
        checks.append(
            Check(
                what=f"p50 with the request log against without, c={concurrency}",
                expected=f"≤ {MOST_LOGGING:g}",
                received=interval(ratio),
                held=ratio.median <= MOST_LOGGING,
            )
        )
    return observations, ratios, checks


def _installation(scratch: Path, name: str) -> tuple[Settings, Path]:
    """Returns settings of an installation in a folder of its own, and that folder."""
    place = scratch / name
    place.mkdir(exist_ok=True)
    return isolated_settings(place / "home", place / "configs"), place


def _require_log_of(url: str, answered: Mapping[str, int]) -> None:
    """Raises ServiceError unless one service has logged each of its answers and the other none."""
    expected = {_model_of("log on"): answered["log on"]}
    engine = create_engine(url)
    deadline = time.monotonic() + bench_predict.DRAIN_SECONDS
    try:
        while True:
            with engine.connect() as connection:
                found = connection.execute(text("SELECT model_name, count(*) FROM predictions GROUP BY model_name"))
                rows = {name: int(count) for name, count in found}
            if rows == expected:
                return
            if time.monotonic() > deadline:
                raise ServiceError(f"Expected the rows {expected} in the request log. Received: {rows}.")
            time.sleep(0.5)
    finally:
        engine.dispose()


def _model_of(name: str) -> str:
    return f"{name.replace(' ', '_')}_classifier"


def interval(ratio: Ratio) -> str:
    """Returns a ratio in words, with its range."""
    return f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f}, {ratio.rounds} rounds)"
