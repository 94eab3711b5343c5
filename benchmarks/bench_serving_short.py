"""`make bench-serving SHORT=1`: the same promises of the service's speed as `bench_serving`, in a few minutes.

One small network with random weights is served three times, by the original's replica, by the service, and by a service
without its log; these, the combined call in process, the drainer and a bare COPY take turns in one run. Beside what the
clock says stand the ratios of CPU time, which other work on the machine changes least. Against the log's cost and the
large network, `bench_serving` measures for longer, and each process anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from benchmarks import bench_predict
from benchmarks.bench_drain import COPY, DRAIN, bare_copying, draining
from benchmarks.bench_drain import LEAST_SHARE as LEAST_DRAINED
from benchmarks.bench_serving import (
    LEAST_RATIO,
    LEAST_SMALL_SHARE,
    MOST_LOGGING,
    NETWORKS,
    UNLOGGED,
    ceiling_callers,
    ceiling_plan,
    fastest,
    interval,
)
from benchmarks.ceiling import in_process_ceiling
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
from benchmarks.servers import all_under_load
from benchmarks.services import original_replica, platform_service
from benchmarks.untrained import deploy_untrained
from benchmarks.uploads import write_uploads
from cv_platform.storage import CentralStorage

ROUNDS = 3
SECONDS = 2.0
ORIGINAL_LOADS = ((1, 1.0, 4), (8, 1.0, 8))
LOADS = tuple((concurrency, SECONDS, 40) for concurrency in (1, 4, 8))
UNLOGGED_LOADS = tuple((concurrency, SECONDS, 40) for concurrency in (1, 8))
ROWS = 20_000


def run(options: Options) -> Report:
    """Takes all measurements in turns and judges them.

    Raises:
        CvPlatformError: a server did not start or refused requests.
    """
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    clock = Stopwatch()
    rounds = min(options.rounds, ROUNDS)
    with scratch_folder("bench-short") as place, ExitStack() as stack:
        settings = isolated_settings(place / "home", place / "configs")
        images = write_uploads(options.uploads, place / "uploads", count=bench_predict.UPLOADS, seed=options.seed)
        url = stack.enter_context(database_url(settings))
        migrate(url)
        environment = isolated_environment(settings, database_url=url)
        options.say("publishing the network …")
        network = {"architecture": "small_cnn", "side_px": NETWORKS["small_cnn"]}
        (version,) = deploy_untrained(settings, environment, place / "export", name="short", **network)
        model = "short_classifier", version
        bundle, metadata = CentralStorage(settings.storage_url).fetch_bundle(*model, place / "cache")
        original = stack.enter_context(original_replica(bundle, metadata, url, environment, place))
        platform = stack.enter_context(platform_service(settings, environment, place))
        unlogged = stack.enter_context(
            platform_service(settings, environment, place, name="unlogged", service=UNLOGGED)
        )
        plan = ceiling_plan(settings, place, model, images, SECONDS)
        ways = ceiling_callers(settings)
        answered: dict[str, int] = {"original": 0, "platform": 0, "unlogged": 0}
        alternatives = [
            *all_under_load({"original": original}, images, ORIGINAL_LOADS, answered),
            *all_under_load({"platform": platform}, images, LOADS, answered),
            *all_under_load({"unlogged": unlogged}, images, UNLOGGED_LOADS, answered),
            *(
                Alternative(name, in_process_ceiling(plan.model_copy(update={"callers": callers}), environment))
                for name, callers in ways.items()
            ),
            Alternative(DRAIN, draining(url, place, ROWS)),
            Alternative(COPY, bare_copying(url, ROWS)),
        ]
        observations = measure_interleaved(alternatives, rounds=rounds, say=options.say)
    ratios, checks = _judge(observations, fastest(observations, ways), options.seed)
    return Report(
        name="serving-short",
        title="The service's promises of speed, in short, as `make up` starts it; small_cnn, 320×240 JPEG, explained",
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(bench_predict.LIBRARIES),
        settings={"rounds": rounds, "seconds": SECONDS, "drained_rows": ROWS, "seed": options.seed},
        observations=observations,
        ratios=ratios,
        checks=checks,
        notes=["the network has random weights", "one start of each server, so its luck with memory is in its numbers"],
    )


def _judge(observations: Mapping[str, Sequence[Observation]], best: str, seed: int) -> tuple[list[Ratio], list[Check]]:
    ratios: list[Ratio] = []
    checks: list[Check] = []

    def promise(what: str, above: str, below: str, quantity: str, *, least: float | None = None) -> None:
        if (ratio := compare(observations, above, below, quantity, seed=seed)) is None:
            return
        ratios.append(ratio)
        expected = f"≤ {MOST_LOGGING:g}" if least is None else f"≥ {least:g}"
        held = ratio.median <= MOST_LOGGING if least is None else ratio.median >= least
        checks.append(Check(what=what, expected=expected, received=interval(ratio), held=held))

    def state(above: str, below: str) -> None:
        ratio = compare(observations, above, below, "cpu_us_per_unit", seed=seed)
        ratios.extend([] if ratio is None else [ratio])

    for concurrency, least in LEAST_RATIO.items():
        c = f", c={concurrency}"
        promise(
            f"requests against the original's replica{c}",
            "platform" + c,
            "original" + c,
            "units_per_second",
            least=least,
        )
        state("original" + c, "platform" + c)
    promise(f"share of {best}, c=4", "platform, c=4", best, "units_per_second", least=LEAST_SMALL_SHARE)
    state(best, "platform, c=4")
    for concurrency, _, _ in UNLOGGED_LOADS:
        c = f", c={concurrency}"
        promise(f"p50 with the request log against without{c}", "platform" + c, "unlogged" + c, "p50_ms")
        state("platform" + c, "unlogged" + c)
    promise("rows drained: share of a bare COPY", DRAIN, COPY, "units_per_second", least=LEAST_DRAINED)
    return ratios, checks
