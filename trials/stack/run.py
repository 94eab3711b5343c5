"""Plays the phases in their order on a stack of its own, prints a line for each thing looked at, and tears down."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import REPOSITORY
from cv_platform.containers import engine
from cv_platform.containers.env_file import read_env
from cv_platform.errors import CvPlatformError, ServiceError
from trials.findings import Findings
from trials.options import Options
from trials.pace import allowed, slowness
from trials.stack.checkout import PROJECT, Checkout, remove_project
from trials.stack.experiment import predict_and_report, run_digits
from trials.stack.kills import kill_each, reboot
from trials.stack.monitoring import monitor
from trials.stack.on_ray import run_as_job, score_on_ray
from trials.stack.restore import destroy_and_restore
from trials.stack.rolling import roll_under_load
from trials.stack.run_isolation import resume_after_code_location, resume_in_containers
from trials.stack.scans import scan
from trials.stack.stage import Stage
from trials.stack.tls import speak_tls
from trials.stack.up import start

CHECKOUT = REPOSITORY / "build" / "stack-test"
ARTIFACTS = REPOSITORY / "test-artifacts" / "stack"
BUDGET_SECONDS = 1140.0
"""For all phases, on the machine of `trials.pace`; a minute of the twenty remains for tearing down."""


@dataclass(frozen=True)
class Phase:
    """A part of the proof."""

    title: str
    play: Callable[[Stage, Findings], None]
    seconds: float
    """It is broken off after so long, on the machine of `trials.pace`."""


PHASES: dict[str, Phase] = {
    "up": Phase("the core from empty volumes", start, 400),
    "digits": Phase("the digits experiment by GraphQL", run_digits, 600),
    "predict": Phase("predictions, and drift reports of them", predict_and_report, 420),
    "monitoring": Phase("targets, expressions, an alert", monitor, 420),
    "scans": Phase("ports, rights, default passwords, secrets", scan, 240),
    "kills": Phase("each container killed under load", kill_each, 600),
    "roll": Phase("rolling update under load", roll_under_load, 420),
    "tls": Phase("a certificate, renewed under load", speak_tls, 300),
    "reboot": Phase("everything killed at once, and a stop and start", reboot, 420),
    "restore": Phase("backup, everything destroyed, restored", destroy_and_restore, 480),
    "processes": Phase("a training resumed after its code location's death", resume_after_code_location, 480),
    "ray": Phase("scores by Ray on two workers, with the bytes of one process", score_on_ray, 600),
    "jobs": Phase("a run of Dagster as a job of Ray", run_as_job, 600),
    "containers": Phase("runs in containers: a training resumed after its own's death", resume_in_containers, 600),
}


def run(options: Options) -> Report:
    """Plays `options.phases`; the report's checks are what they looked at.

    A stack that `keep` left running is taken up again, unless the phase `up` is among them, which starts from nothing.

    Raises:
        CvPlatformError: no engine, or another such proof is running.
    """
    clock = Stopwatch()
    checks: list[Check] = []
    with _alone(), _stopped_politely():
        stage = Stage(Checkout(CHECKOUT), ARTIFACTS)
        try:
            options.say(f"limits × {slowness():.1f}, as this machine is slower than the one they were set on …")
            _prepare(stage, options)
            phases = _with_a_model(stage, set(options.phases))
            for name in (name for name in PHASES if name in phases):
                left = allowed(BUDGET_SECONDS) - clock.seconds
                checks += _judged(stage, name, min(allowed(PHASES[name].seconds), left), options)
                if name == "up" and not stage.is_well():
                    break  # The others would only say the same.
        finally:
            _finish(stage, options)
    version = engine.docker("version", "--format", "{{.Server.Version}}")
    return Report(
        name="stack",
        title="The stack in containers, proven on a real engine",
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=f"{machine_line(())}, Docker {version}",
        settings={"phases": ",".join(options.phases), "slowness": slowness()},
        observations={},
        ratios=[],
        checks=checks,
    )


def _prepare(stage: Stage, options: Options) -> None:
    if "up" in options.phases or not stage.checkout.env_file.exists() or not engine.volumes(PROJECT):
        remove_project()
        stage.checkout.make(_built_images())
    if "up" not in options.phases and not stage.is_well():
        options.say("starting …")
        try:
            stage.checkout.run("stack-up", stage.artifacts / "commands.log")
        except ServiceError as err:
            raise ServiceError(f"{err}\nThe containers' logs are kept in {stage.keep_logs('start')}") from err


def _with_a_model(stage: Stage, phases: set[str]) -> set[str]:
    """Returns the phases, and `digits` where others are to be played on a stack that serves no model yet."""
    if phases <= {"up", "digits", "jobs"} or ("up" not in phases and stage.health().get("model_version")):
        return phases
    return phases | {"digits"}


def _built_images() -> dict[str, str]:
    """Returns the images that the user's own docker/.env names: those are what `make stack-build` has built."""
    values = read_env(engine.ENV_FILE) if engine.ENV_FILE.exists() else {}
    return {name: value for name, value in values.items() if name.endswith("_IMAGE")}


def _finish(stage: Stage, options: Options) -> None:
    if options.keep:
        options.say(f"kept: docker compose -p {PROJECT} ps; settings in {stage.checkout.env_file}")
        return
    options.say("tearing down …")
    stage.checkout.remove()


def _judged(stage: Stage, name: str, seconds: float, options: Options) -> list[Check]:
    phase = PHASES[name]
    options.say(f"{name}: {phase.title} …")
    begin = time.monotonic()
    findings = Findings()
    try:
        with bounded(seconds, name):
            phase.play(stage, findings)
    except Exception as err:  # Whatever it is, the other phases are played, and all is torn down.
        what = str(err) if isinstance(err, CvPlatformError) else repr(err)
        findings.add("this phase to be played to its end", what, False)
    checks = findings.checks(name)
    for check in checks:
        options.say(f"  {check}")
    options.say(f"  {name}: {time.monotonic() - begin:.0f} s")
    if not findings.held:
        options.say(f"  The containers' logs are kept in {stage.keep_logs(name)}")
    return checks


@contextmanager
def bounded(seconds: float, what: str) -> Iterator[None]:
    """Breaks the block off after so many seconds, wherever it is.

    Raises:
        ServiceError: it was broken off, or there is no time left to begin.
    """
    if seconds <= 0:
        raise ServiceError(f"Expected time for {what} within {allowed(BUDGET_SECONDS):.0f} s. Received: none left.")

    def break_off(number: int, frame: object) -> None:
        raise ServiceError(f"Expected {what} to end within {seconds:.0f} s. Received: no end.")

    before = signal.signal(signal.SIGALRM, break_off)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _alone() -> Iterator[None]:
    path: Path = CHECKOUT.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise ServiceError(
                f"Expected to be the only `make stack-test` of {REPOSITORY}. Received: another."
            ) from err
        yield


@contextmanager
def _stopped_politely() -> Iterator[None]:
    """Makes SIGTERM end the block as Ctrl-C does, so that it tears down."""

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second one would break the tearing down off.
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
