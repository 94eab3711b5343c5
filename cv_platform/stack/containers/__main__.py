"""`python3 -m cv_platform.stack.containers …`: the commands behind `make secrets` and `make stack-…`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from cv_platform.errors import CvPlatformError, ServiceError
from cv_platform.stack.containers import engine
from cv_platform.stack.containers.env_file import PASSWORD, make_secrets, read_env
from cv_platform.stack.containers.preflight import PORTS, preflight
from cv_platform.stack.containers.roll import roll

START_SECONDS = 600.0
MAX_RESTARTS = 3
"""While the stack starts: a container that ends more often will not become healthy by waiting."""
_IMAGES = {"dagster-code": "the platform's image", "service": "the service's image"}
_PAGES = (
    ("SERVICE_PORT", "Service: web page, /predict, /docs"),
    ("DAGSTER_PORT", "Dagster: the graph, runs, schedules (login)"),
    ("MLFLOW_PORT", "MLflow: runs, metrics, models (login)"),
    ("EVIDENTLY_PORT", "Evidently: drift over time (login)"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; errors are shown without a traceback."""
    parser = argparse.ArgumentParser(prog="python3 -m cv_platform.stack.containers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function, text in (
        ("secrets", _secrets, "write docker/.env with random passwords; what it has stays"),
        ("preflight", _preflight, "say what keeps the stack from starting; starts nothing"),
        ("build", _build, "build the images"),
        ("up", _up, "check, start everything and wait until it is healthy"),
        ("down", _down, "stop everything and remove the containers; the volumes stay"),
        ("roll", _roll, "replace the service's replicas one by one, without a failed request"),
        ("status", _status, "show the containers, and what they use"),
    ):
        commands.add_parser(name, help=text, description=text).set_defaults(command=function)
    try:
        return parser.parse_args(arguments).command()
    except CvPlatformError as err:
        sys.stderr.write(f"error: {err}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def say(text: str) -> None:
    """Shows a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _secrets() -> int:
    if not engine.ENV_FILE.exists():
        _refuse_lost_secrets()
    made = make_secrets(engine.EXAMPLE, engine.ENV_FILE)
    say(f"{engine.ENV_FILE}: {'made ' + ', '.join(made) if made else 'complete, nothing changed'} (mode 600)")
    return 0


def _refuse_lost_secrets() -> None:
    """Refuses new passwords for a database that has others: nothing could connect to it."""
    try:
        found = [n for n in engine.volumes(engine.project_name({})) if n.endswith("_postgres")]
    except ServiceError:
        return  # No engine: nothing to lose yet.
    if found:
        raise ServiceError(
            f"Expected the {engine.ENV_FILE} that the volume {found[0]} was made with: PostgreSQL keeps its passwords. "
            "Received: no such file. Put it back (a backup holds it), or remove the volumes with all that is in them: "
            "docker compose -p cv-platform down --volumes"
        )


def _preflight() -> int:
    problems = preflight()
    for problem in problems:
        sys.stderr.write(f"- {problem}\n")
    if problems:
        sys.stderr.write(f"error: {len(problems)} thing(s) to mend; nothing was started.\n")
        return 1
    say("Everything is ready.")
    return 0


def _build() -> int:
    if not engine.ENV_FILE.exists():
        _secrets()
    revision = subprocess.run(
        ["git", "-C", str(engine.REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    for service, text in _IMAGES.items():  # One after the other: both at once need twice the memory.
        say(f"Building {text}")
        engine.compose("build", "--build-arg", f"REVISION={revision or 'unknown'}", service)
    return 0


def _up() -> int:
    if not engine.ENV_FILE.exists():
        _secrets()
    if _preflight():
        return 1
    began = time.monotonic()
    values = read_env(engine.ENV_FILE)
    project = engine.project_name(values)
    try:
        engine.compose("up", "--detach", "--remove-orphans")
        _wait_until_well(project)
    except ServiceError as err:
        raise ServiceError(f"{err}\n{_what_is_lost(project)}") from err
    say(f"Everything is healthy after {time.monotonic() - began:.0f} s.")
    address = values.get("BIND_ADDRESS") or "127.0.0.1"
    for name, text in _PAGES:
        say(f"  http://{address}:{values.get(name) or PORTS[name]:<6} {text}")
    say(f"Login: {values.get('STACK_USER') or 'admin'}, and the value of {PASSWORD} in {engine.ENV_FILE}.")
    return 0


def _wait_until_well(project: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        waiting = [c for c in engine.containers(project) if not c.is_well]
        if not waiting:
            return
        lost = [c for c in waiting if c.is_lost or engine.restarts(c) >= MAX_RESTARTS]
        if lost or time.monotonic() > deadline:
            raise ServiceError(
                "Expected every container to be healthy. Received: "
                + "; ".join(f"{c.name}: {c.status}" for c in lost or waiting)
            )
        time.sleep(1.0)


def _what_is_lost(project: str) -> str:
    lost = [c for c in engine.containers(project) if not c.is_well and (c.is_lost or engine.restarts(c))]
    return "\n".join(f"The end of the log of {c.name}:\n{engine.last_lines(c)}" for c in lost)


def _down() -> int:
    engine.compose("down")
    say("Stopped. The volumes stay; `make stack-up` goes on from there.")
    return 0


def _roll() -> int:
    problems = preflight()
    if problems:
        raise ServiceError("\n".join(problems))
    began = time.monotonic()
    count = roll(engine.project_name(read_env(engine.ENV_FILE)), say)
    say(f"Replaced {count} replica(s) in {time.monotonic() - began:.0f} s.")
    return 0


def _status() -> int:
    values = read_env(engine.ENV_FILE) if engine.ENV_FILE.exists() else {}
    found = engine.containers(engine.project_name(values))
    if not found:
        say("Not running. `make stack-up` starts it.")
        return 3
    running = [c.id for c in found if c.state == "running"]
    fields = "{{.ID}}\t{{.MemUsage}}\t{{.CPUPerc}}"
    usage = engine.docker("stats", "--no-stream", "--no-trunc", "--format", fields, *running) if running else ""
    used = {line.split("\t")[0]: line.split("\t")[1:] for line in usage.splitlines()}
    for container in found:
        memory, cpu = used.get(container.id, ["", ""])
        say(f"{container.name:<36} {container.status:<34} {memory:<22} {cpu}")
    return 0 if all(c.is_well for c in found) else 1


if __name__ == "__main__":
    sys.exit(main())
