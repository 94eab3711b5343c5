"""Plays the phases in their order and prints a line for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.installation import scratch_folder
from benchmarks.servers import Server
from cv_platform.database.cluster import Cluster
from cv_platform.errors import CvPlatformError
from trials.findings import Findings
from trials.options import Options
from trials.soak.database import lose_the_database
from trials.soak.disk import fill_the_disk
from trials.soak.hostile import send_hostile_uploads
from trials.soak.kills import kill_everything, kill_one_worker
from trials.soak.stage import Scale, Stage, home_of
from trials.soak.storage_faults import break_storage
from trials.soak.swaps import swap_under_load

LIBRARIES = ("bentoml", "uvicorn", "onnxruntime", "tensorflow", "opencv-python-headless", "pillow")
_RUNNING: dict[str, tuple[str, Callable[[Stage, Server, Scale], Findings]]] = {
    "a": ("swaps under load", swap_under_load),
    "b": ("SIGKILL of one worker", kill_one_worker),
    "c": ("PostgreSQL away", lose_the_database),
}
"""Phases on one running service, which must survive all of them."""
_STARTING: dict[str, tuple[str, Callable[[Stage, Scale], Findings]]] = {
    "d": ("SIGKILL of the whole service", kill_everything),
    "e": ("unusable bundles, storage away", lambda stage, _: break_storage(stage)),
    "f": ("full disk", lambda stage, _: fill_the_disk(stage)),
    "g": ("hostile uploads", send_hostile_uploads),
}
"""Phases that start the service themselves."""


def run(options: Options) -> Report:
    """Plays `options.phases` at `options.scale`; the report's checks are the phases.

    Raises:
        CvPlatformError: the stage itself could not be set up.
    """
    from cv_platform.database.connection import make_engine
    from cv_platform.database.embedded import embedded_database
    from cv_platform.database.migrate import migrate

    clock = Stopwatch()
    checks: list[Check] = []
    with scratch_folder("soak") as folder, embedded_database(home_of(folder)) as url:
        migrate(url)
        engine = make_engine(url)
        options.say("publishing the models …")
        stage = Stage(folder, Cluster(home_of(folder)), engine, url, seed=options.seed, keep=options.output)
        scale = Scale(options.scale)
        try:
            _play(stage, scale, options, checks)
        finally:
            engine.dispose()
    return Report(
        name="soak",
        title="The service under load while everything that it depends upon is changed, killed or full",
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"scale": options.scale, "phases": "".join(options.phases), "seed": options.seed},
        observations={},
        ratios=[],
        checks=checks,
    )


def _play(stage: Stage, scale: Scale, options: Options, checks: list[Check]) -> None:
    running = [phase for phase in _RUNNING if phase in options.phases]
    if running:
        with stage.service("soak") as server:
            for phase in running:
                title, play = _RUNNING[phase]
                checks.append(_judged(stage, phase, title, lambda play=play: play(stage, server, scale), options))
    for phase in (phase for phase in _STARTING if phase in options.phases):
        title, play = _STARTING[phase]
        checks.append(_judged(stage, phase, title, lambda play=play: play(stage, scale), options))


def _judged(stage: Stage, phase: str, title: str, play: Callable[[], Findings], options: Options) -> Check:
    begin = time.monotonic()
    what = f"{phase}. {title}"
    try:
        check = play().check(what)
    except CvPlatformError as err:
        check = Check(what=what, expected="this phase to be played to its end", received=str(err), held=False)
    options.say(f"{check} ({time.monotonic() - begin:.0f} s)")
    if not check.held:
        options.say(f"The service's logs are kept in {_keep_logs(stage, options.output / f'soak-{phase}-logs')}")
    return check


def _keep_logs(stage: Stage, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for log in stage.folder.glob("*.log"):
        (folder / log.name).write_bytes(log.read_bytes())
    return folder
