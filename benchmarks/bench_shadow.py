"""What a shadow costs the champion's requests: the same service with and without one, in turns.

One small network with random weights is served as `make up` does it. Between rounds a second version of it becomes a
shadow (`deploy.shadow`), or stops being one; a round begins when every worker has its shadow's process, or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks import bench_predict
from benchmarks.bench_serving import NETWORKS, interval
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
from benchmarks.installation import isolated_environment, isolated_settings, scratch_folder
from benchmarks.options import Options
from benchmarks.servers import Server, process_tree, under_load
from benchmarks.services import platform_service, worker_pids
from benchmarks.untrained import deploy_untrained
from benchmarks.uploads import write_uploads
from cv_platform.audit import Note
from cv_platform.config import CanaryConfig
from cv_platform.errors import ServiceError
from cv_platform.serving.model.promotion import PROMOTION_LOCK, Claim, Promoter, end_probation
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

MOST_SLOWDOWN = 1.05
SECONDS, LEAST_REQUESTS = 3.0, 100
IN_FLIGHT = (1, 4)
_TERMS = CanaryConfig(minutes=1e4, give_up_minutes=1e5)
"""It goes on for longer than it is measured."""
_LONGEST_WAIT_SECONDS = 60.0
_PROGRAM = "cv_platform.serving.model.shadow"


class _Switch:
    """Gives a running service a shadow, or takes it away, and waits until its workers have done so."""

    def __init__(self, settings: Settings, server: Server, model: tuple[str, str], wake: Callable[[], object]) -> None:
        self._storage, self._service = CentralStorage(settings.storage_url), settings.service_name
        cache = settings.home / "cache"
        self._promoter = Promoter(self._storage, self._service, cache, lock=cache / PROMOTION_LOCK)
        self._server, self._model, self._wake = server, model, wake
        self.answered = 0

    def to(self, is_on: bool) -> None:
        """Switches it, unless it is so already."""
        workers = len(worker_pids(self._server.pid))
        if is_on and not self._shadows():
            name, version = self._model
            note = Note("a benchmark")
            self._promoter.begin_probation(name, version, _TERMS, is_shadow=True, claim=Claim("shadow"), note=note)
        pointer = self._storage.read_pointer(self._service)
        if not is_on and pointer and pointer.probation and pointer.probation.is_running:
            tallies = self._storage.read_tallies(self._service, pointer.probation.probation_id)
            self.answered += sum(one.tally.shadow.asked - one.tally.shadow.failed for one in tallies)
            ended = pointer.probation.model_copy(update={"state": "returned", "reason": "measured"})
            end_probation(self._storage, self._service, pointer, ended)
        deadline, wanted = time.monotonic() + _LONGEST_WAIT_SECONDS, workers if is_on else 0
        while (found := self._shadows()) != wanted:
            if is_on:
                self._wake()  # A worker starts the process for the first image that it is to see.
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"Expected {wanted} shadows within {_LONGEST_WAIT_SECONDS:g} s. Received: {found}. See the "
                    "service's log."
                )
            time.sleep(0.05)

    def _shadows(self) -> int:
        found = 0
        for process in process_tree(self._server.pid):
            with suppress(psutil.NoSuchProcess):
                found += _PROGRAM in process.cmdline()
        return found


def run(options: Options) -> Report:
    """Measures the champion's answers in turns and judges their median.

    Raises:
        CvPlatformError: the service did not start or refused requests.
    """
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    clock = Stopwatch()
    with scratch_folder("bench-shadow") as place:
        settings = isolated_settings(place / "home", place / "configs")
        images = write_uploads(options.uploads, place / "uploads", count=bench_predict.UPLOADS, seed=options.seed)
        with database_url(settings) as url:
            migrate(url)
            environment = isolated_environment(settings, database_url=url)
            options.say("publishing two versions of the network …")
            network = {"architecture": "small_cnn", "side_px": NETWORKS["small_cnn"]}
            versions = deploy_untrained(settings, environment, place / "export", name="shadow", versions=2, **network)
            with platform_service(settings, environment, place) as server:
                wake = under_load(server, images, concurrency=4, seconds=0.2, minimum_requests=8)
                switch = _Switch(settings, server, ("shadow_classifier", versions[1]), wake)
                alternatives = [
                    Alternative(_name(is_on, flying), _measuring(switch, server, images, is_on=is_on, flying=flying))
                    for flying in IN_FLIGHT
                    for is_on in (False, True)
                ]
                observations = measure_interleaved(alternatives, rounds=options.rounds, say=options.say)
                switch.to(is_on=False)
    ratios = [
        ratio
        for flying in IN_FLIGHT
        if (ratio := compare(observations, _name(True, flying), _name(False, flying), "p50_ms", seed=options.seed))
    ]
    checks = [
        Check(
            what=f"p50 with a shadow against without, c={flying}",
            expected=f"≤ {MOST_SLOWDOWN:g}",
            received=interval(ratio),
            held=ratio.median <= MOST_SLOWDOWN,
        )
        for flying, ratio in zip(IN_FLIGHT, ratios, strict=True)
    ]
    asked = f"{switch.answered}"
    checks.append(Check(what="images that it answered meanwhile", expected="≥ 1", received=asked, held=asked != "0"))
    return Report(
        name="shadow",
        title="The champion's answers beside a shadow; small_cnn, 320×240 JPEG, explained",
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(bench_predict.LIBRARIES),
        settings={"rounds": options.rounds, "seconds": SECONDS, "seed": options.seed},
        observations=observations,
        ratios=ratios,
        checks=checks,
        notes=["both versions have random weights; the shadow's process takes what cores have to spare"],
    )


def _name(is_on: bool, flying: int) -> str:
    return f"{'with a shadow' if is_on else 'alone'}, c={flying}"


def _measuring(
    switch: _Switch, server: Server, images: list[Path], *, is_on: bool, flying: int
) -> Callable[[], Observation]:
    load = under_load(server, images, concurrency=flying, seconds=SECONDS, minimum_requests=LEAST_REQUESTS)

    def measure() -> Observation:
        switch.to(is_on)
        return load()

    return measure
