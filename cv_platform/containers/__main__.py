"""`python3 -m cv_platform.containers …`: the commands behind `make secrets` and `make stack-…`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cv_platform.containers import engine
from cv_platform.containers.backup import back_up
from cv_platform.containers.backup_contents import LEFT_OUT
from cv_platform.containers.certificate import (
    certificate_problems,
    has_tls,
    install,
    make_certificate,
    public_host,
    scheme,
)
from cv_platform.containers.env_file import PASSWORD, make_secrets, read_env
from cv_platform.containers.preflight import (
    GPU_PROFILE,
    PROFILE_OF_PORT,
    preflight,
    restoration_problems,
    warnings,
)
from cv_platform.containers.restore import give_up as give_up_restoration
from cv_platform.containers.restore import restore
from cv_platform.containers.roll import roll
from cv_platform.errors import CvPlatformError, ServiceError

START_SECONDS = 600.0
MAX_RESTARTS = 3
"""While the stack starts: a container that ends more often will not become healthy by waiting."""
_IMAGES = {"dagster-code": "the platform's image", "service": "the service's image"}
_IMAGES_OF_PROFILES = {
    "notebook": ("notebook", "JupyterLab's image"),  # On the platform's, so after it.
    GPU_PROFILE: ("dagster-code-gpu", "the platform's image with CUDA"),
}
_PAGES = (
    ("SERVICE_PORT", "Service: web page, /predict, /docs"),
    ("DAGSTER_PORT", "Dagster: the graph, runs, schedules (login)"),
    ("MLFLOW_PORT", "MLflow: runs, metrics, models (login)"),
    ("EVIDENTLY_PORT", "Evidently: drift over time (login)"),
    ("GRAFANA_PORT", "Grafana: dashboards (login)"),
    ("PROMETHEUS_PORT", "Prometheus: measurements and rules (login)"),
    ("ALERTMANAGER_PORT", "Alertmanager: alerts (login)"),
    ("JUPYTER_PORT", "JupyterLab, with the tour (login, then JUPYTER_PASSWORD)"),
    ("RAY_PORT", "Ray: nodes, tasks, jobs (login)"),
    ("PGADMIN_PORT", "pgAdmin: the databases (login, then PGADMIN_EMAIL and PGADMIN_PASSWORD)"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; errors are shown without a traceback."""
    parser = argparse.ArgumentParser(prog="python3 -m cv_platform.containers", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function, text in (
        ("secrets", _secrets, "write docker/.env with random passwords; what it has stays"),
        ("preflight", _preflight, "say what keeps the stack from starting; starts nothing"),
        ("build", _build, "build the images"),
        ("up", _up, "check, start everything and wait until it is healthy"),
        ("down", _down, "stop everything and remove the containers; the volumes stay"),
        ("roll", _roll, "replace the service's replicas one by one, without a failed request"),
        ("certificate", _certificate, "make a self-signed certificate, and name it in docker/.env"),
        ("reload", _reload, "let nginx take up a renewed certificate, without a failed request"),
        ("status", _status, "show the containers, and what they use"),
    ):
        commands.add_parser(name, help=text, description=text).set_defaults(command=function)
    backup = commands.add_parser("backup", help="write one verified archive of the running stack, while it works")
    backup.add_argument("--output", type=Path, default=Path("backups"), help="folder of the archive (default: backups)")
    backup.set_defaults(command=_backup)
    restoration = commands.add_parser(
        "restore", help="make the stopped stack what a backup holds; old volumes are kept"
    )
    what = restoration.add_mutually_exclusive_group(required=True)
    what.add_argument("file", type=Path, nargs="?", help="an archive of `backup`")
    what.add_argument("--give-up", action="store_true", help="clear away what a killed restoration has left")
    restoration.set_defaults(command=_restore)
    gc = commands.add_parser("gc", help="list what the stack does not need any more, and with --apply delete it")
    gc.add_argument("--apply", action="store_true", help="delete it")
    gc.set_defaults(command=_gc)
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options)
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
    """Refuses new passwords for a database that has others, or will have: nothing could connect to it."""
    if unfinished := restoration_problems():
        raise ServiceError(unfinished[0])
    try:
        found = [n for n in engine.volumes(engine.project_name({})) if "_postgres" in n]
    except ServiceError:
        return  # No engine: nothing to lose yet.
    if found:
        raise ServiceError(
            f"Expected the {engine.ENV_FILE} that the volume {found[0]} was made with: PostgreSQL keeps its passwords. "
            "Received: no such file. Put it back (a backup holds it), or remove the volumes with all that is in them: "
            f"docker compose -p {engine.project_name({})} down --volumes"
        )


def _preflight() -> int:
    problems = preflight()
    for problem in problems:
        sys.stderr.write(f"- {problem}\n")
    if problems:
        sys.stderr.write(f"error: {len(problems)} thing(s) to mend; nothing was started.\n")
        return 1
    for warning in warnings(read_env(engine.ENV_FILE)):
        sys.stderr.write(f"warning: {warning}\n")
    say("Everything is ready.")
    return 0


def _build() -> int:
    if not engine.ENV_FILE.exists():
        _secrets()
    # The commit in full, with `-dirty` behind it where files differ from it.
    describe = ["git", "-C", str(engine.REPOSITORY), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    revision = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    images = dict(_IMAGES)
    profiles = engine.profiles(read_env(engine.ENV_FILE))
    images.update(image for profile, image in _IMAGES_OF_PROFILES.items() if profile in profiles)
    for service, text in images.items():  # One after the other: both at once need twice the memory.
        say(f"Building {text}")
        engine.compose("build", "--build-arg", f"REVISION={revision}", service)
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
        if has_tls(values):
            # Made, and not started: it needs the certificate from its first moment on.
            engine.compose("up", "--no-start", "--no-deps", "nginx")
            install(engine.containers(project, "nginx")[0].id, values, engine.DOCKER)
        engine.compose("up", "--detach", "--remove-orphans")
        _wait_until_well(project)
    except ServiceError as err:
        raise ServiceError(f"{err}\n{_what_is_lost(project)}") from err
    say(f"Everything is healthy after {time.monotonic() - began:.0f} s.")
    profiles = engine.profiles(values)
    for name, text in _PAGES:
        if PROFILE_OF_PORT.get(name) in {None, *profiles}:
            say(f"  {scheme(values)}://{public_host(values)}:{engine.setting(values, name):<6} {text}")
    say(f"Login: {engine.setting(values, 'STACK_USER')}, and the value of {PASSWORD} in {engine.ENV_FILE}.")
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
    project = engine.project_name(read_env(engine.ENV_FILE) if engine.ENV_FILE.exists() else {})
    if engine.run_containers(project):
        # Compose leaves them, and with them its networks. The daemon first: it would go on with a run that is stopped.
        engine.compose("stop", "dagster-daemon")
        runs = engine.run_containers(project)
        engine.docker("stop", "--time", "60", *runs, seconds=150)
        engine.docker("rm", *runs)
    # Those of profiles that were on when they were started, too.
    engine.compose("--profile", "*", "down")
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


def _certificate() -> int:
    if not engine.ENV_FILE.exists():
        _secrets()
    made = make_certificate(engine.ENV_FILE, read_env(engine.ENV_FILE))
    say(f"{made}: self-signed, so browsers ask once. {engine.ENV_FILE} names it.")
    say("A running stack takes it up by `make stack-reload` when it speaks TLS already, else by `make stack-up`.")
    return 0


def _reload() -> int:
    values = read_env(engine.ENV_FILE)
    problems = certificate_problems(values, engine.DOCKER)
    if problems:
        raise ServiceError("\n".join(problems))
    running = [c for c in engine.containers(engine.project_name(values), "nginx") if c.state == "running"]
    if not running:
        raise ServiceError("Expected a running stack. Received: no nginx. Run: make stack-up")
    if has_tls(values):
        install(running[0].id, values, engine.DOCKER)
    engine.docker("exec", running[0].id, "/etc/nginx/stack/upstream.sh", "renew", seconds=120)
    say("nginx has read its configuration and certificate anew.")
    return 0


def _backup(output: Path) -> int:
    began = time.monotonic()
    path, contents = back_up(output, say)
    size = path.stat().st_size / 1e6
    say(f"{path}: {size:.1f} MB, read again and complete, after {time.monotonic() - began:.0f} s")
    say(f"  files: {', '.join(f'{volume} {count}' for volume, count in sorted(contents.files.items()))}")
    for database, rows in contents.rows.items():
        say(f"  {database}: {sum(rows.values())} rows in {len(rows)} tables")
    say(f"  not in it: {'; '.join([*contents.left_out, LEFT_OUT])}")
    say("It holds docker/.env with its passwords, and uploads (mode 600): keep it where nobody else reads it.")
    return 0


def _restore(file: Path | None, give_up: bool) -> int:
    if file is None:
        say("Cleared away." if give_up_restoration() else "There is no unfinished restoration.")
        return 0
    began = time.monotonic()
    restored = restore(file, say)
    created = f"{restored.manifest.created_utc:%Y-%m-%d %H:%M}"
    say(f"The stack is what {file} holds, of {created} UTC, after {time.monotonic() - began:.0f} s. Run: make stack-up")
    if restored.took_settings:
        say(f"{engine.ENV_FILE} is the backup's, with its passwords.")
    if restored.differing_settings:
        say(f"{engine.ENV_FILE} keeps its values of {', '.join(restored.differing_settings)}; the backup has others.")
    if restored.differing_configs:
        say(f"Not as in the backup, and left so: {', '.join(restored.differing_configs)}")
    for part in (*restored.contents.left_out, LEFT_OUT):
        say(f"Not restored, as it was not in the backup: {part}")
    if restored.previous:
        say(
            f"What was there before is kept; when you no longer need it: docker volume rm {' '.join(restored.previous)}"
        )
    return 0


def _gc(apply: bool) -> int:
    command = ("run", "--rm", "--no-deps", "maintenance", "cv-platform", "gc")
    engine.compose(*command, *(("--apply",) if apply else ()))
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
