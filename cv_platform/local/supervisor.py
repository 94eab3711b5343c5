"""The local stack under supervisord: Dagster, MLflow, Evidently, PostgreSQL and the service.

supervisord restarts what fails, stops each program with the signal it wants and keeps a log of each. This module
writes its configuration to `$CV_HOME/run/`, starts it, waits until everything answers, and stops it.
http://supervisord.org/configuration.html
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from xmlrpc.client import ServerProxy

import httpx
from supervisor.xmlrpc import SupervisorTransport

from cv_platform.client.loopback import direct_transport
from cv_platform.database.address import running_database_url
from cv_platform.database.connection import database_url
from cv_platform.database.migrate import migrate
from cv_platform.errors import ServiceError
from cv_platform.files import write_file
from cv_platform.local.environment import REPOSITORY, platform_environment, prepare_home
from cv_platform.local.http import is_taken, wait_for_http
from cv_platform.local.leftovers import end_leftovers, program_mark
from cv_platform.local.programs import Program, programs
from cv_platform.settings import Settings

START_SECONDS = 600.0
"""Longer than a busy machine needs: what ends instead of starting is noticed by `MOST_STARTS`."""
MOST_STARTS = 3
PID_SECONDS = 15.0


def start_stack(settings: Settings) -> list[Program]:
    """Starts everything and waits until it answers.

    Raises:
        ServiceError: the stack runs already, a port is taken, or a program did not answer; its log's end is shown.
    """
    if is_running(settings):
        raise ServiceError("Expected a stopped stack. Received: it is running. Use `make status` or `make down`.")
    stack = programs(settings)
    _end_leftovers(settings, stack)
    taken = [f"{p.name}: {p.port}" for p in stack if p.port is not None and is_taken(p.port)]
    if taken:
        raise ServiceError(
            f"Expected free ports. Received: in use: {', '.join(taken)}. Stop what uses them, or choose others with "
            "CV_SERVICE_PORT, CV_DAGSTER_PORT, CV_MLFLOW_PORT and CV_EVIDENTLY_PORT."
        )
    prepare_home(settings)
    environment = platform_environment(settings, database_url=_migrated_database(settings))
    (settings.home / "evidently").mkdir(exist_ok=True)
    (settings.home / "mlflow").mkdir(exist_ok=True)
    environment["BENTOML_HOME"] = str(settings.home / "bentoml-serve")
    (settings.home / "bentoml-serve").mkdir(exist_ok=True)
    configuration = _write_configuration(settings, stack)
    _start_supervisor(settings, configuration, environment)
    for program in stack:
        _wait_until_up(settings, program)
    _require_loaded_graph(settings)
    return stack


def stop_stack(settings: Settings) -> bool:
    """Stops everything in order, leftovers of killed programs too; returns whether it ran."""
    pid = _supervisor_pid(settings)
    if pid is None:
        return _end_leftovers(settings, programs(settings)) > 0
    control(settings, "shutdown")
    _wait(
        lambda: _supervisor_pid(settings) is None, START_SECONDS, f"supervisord (pid {pid}) to stop; see `make status`"
    )
    _end_leftovers(settings, programs(settings))
    return True


def is_running(settings: Settings) -> bool:
    """Returns whether this installation's supervisor runs."""
    return _supervisor_pid(settings) is not None


def control(settings: Settings, *arguments: str) -> str:
    """Runs `supervisorctl` with `arguments` and returns what it prints."""
    configuration = settings.home / "run" / "supervisord.conf"
    # Not the socket that the configuration names: the home may have been moved since.
    server = ("-s", f"unix://{_socket_path(settings.home)}")
    command = [sys.executable, "-m", "supervisor.supervisorctl", "-c", str(configuration), *server, *arguments]
    # `status` exits with 3 when a program is not running, which is an answer and no failure.
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _start_supervisor(settings: Settings, configuration: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(configuration)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise ServiceError(f"supervisord did not start: {(result.stdout + result.stderr).strip()[-2000:]}")
    # It has gone to the background by now, and writes its pid a moment later.
    _wait(lambda: is_running(settings), PID_SECONDS, f"supervisord; see {settings.home / 'logs' / 'supervisord.log'}")


def _end_leftovers(settings: Settings, stack: list[Program]) -> int:
    """Ends what killed programs left; PostgreSQL looks after its own."""
    names = [program.name for program in stack if program.name != "postgres"]
    return sum(end_leftovers(program_mark(settings.home, name)) for name in names)


def _migrated_database(settings: Settings) -> str:
    with database_url(settings) as url:
        migrate(url)
        return url


def _write_configuration(settings: Settings, stack: list[Program]) -> Path:
    run, logs = settings.home / "run", settings.home / "logs"
    socket_path = _socket_path(settings.home)
    lines = [
        "[supervisord]",
        f"pidfile={run / 'supervisord.pid'}",
        f"logfile={logs / 'supervisord.log'}",
        f"directory={REPOSITORY}",
        f"childlogdir={logs}",
        "",
        "[unix_http_server]",
        f"file={socket_path}",
        "chmod=0700",
        "",
        "[supervisorctl]",
        f"serverurl=unix://{socket_path}",
        "",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for program in stack:
        leftovers = "keep" if program.has_lasting_children else "end"
        wrapper = (sys.executable, "-m", "cv_platform.local.run_program", str(settings.home), program.name, leftovers)
        command = shlex.join(program.command if program.name == "postgres" else (*wrapper, *program.command))
        lines += [
            "",
            f"[program:{program.name}]",
            f"command={command}",
            f"priority={program.priority}",
            "autorestart=true",
            "startsecs=2",
            "startretries=10",
            f"stopsignal={program.stop_signal}",
            f"stopwaitsecs={program.stop_seconds}",
            # PostgreSQL's children get their orders from the postmaster; a signal of ours would be a crash to them.
            f"stopasgroup={'false' if program.name == 'postgres' else 'true'}",
            f"killasgroup={'false' if program.name == 'postgres' else 'true'}",
            "redirect_stderr=true",
            # supervisor 4.3 fills this one in twice: https://github.com/Supervisor/supervisor/blob/4.3.0/supervisor/options.py#L976
            f"stdout_logfile={logs / (program.name + '.log')}".replace("%", "%%"),
            "stdout_logfile_maxbytes=20MB",
            "stdout_logfile_backups=3",
        ]
    path = run / "supervisord.conf"
    if comments := [line for line in lines if " ;" in line or " #" in line]:
        raise ServiceError(
            "Expected no ' ;' or ' #' in the names of the checkout's folder and of CV_HOME, where a comment of "
            f"supervisord begins. Received: {comments[0]}. Rename the folder, or set CV_HOME to another."
        )
    # supervisord fills in what follows a % in any value, and folders' names may hold one.
    write_file(path, "\n".join(lines).replace("%", "%%") + "\n", is_private=True)
    return path


def _socket_path(home: Path) -> Path:
    """Returns a socket path below the system's limit of about 107 bytes, in a private folder."""
    path = home / "run" / "supervisor.sock"
    if len(os.fsencode(path)) <= 90:
        return path
    digest = hashlib.sha256(str(home).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"cv-platform-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise ServiceError(f"Expected {folder} to be private to this user. Received: it is not. Remove it.")
    return folder / "supervisor.sock"


def _wait_until_up(settings: Settings, program: Program) -> None:
    """Waits until a program answers, PostgreSQL takes connections, or supervisord calls what has no port RUNNING."""
    try:
        if program.health_path is not None:
            url = f"http://127.0.0.1:{program.port}{program.health_path}"
            wait_for_http(url, seconds=START_SECONDS, alive=_may_come_up(settings, program.name))
        elif program.name == "postgres":
            _wait(lambda: running_database_url(settings) is not None, START_SECONDS, "PostgreSQL to take connections")
        else:
            _wait(lambda: _process(settings, program.name)["statename"] == "RUNNING", START_SECONDS, "it to stay up")
    except ServiceError as err:
        log = settings.home / "logs" / f"{program.name}.log"
        end = log.read_text(errors="replace")[-2000:] if log.exists() else "(no log)"
        raise ServiceError(
            f"{program.name} did not start: {err}\nThe end of {log}:\n{end}\n`make down` stops the rest."
        ) from err


def _may_come_up(settings: Settings, name: str) -> Callable[[], bool]:
    """Returns whether a program that does not answer may still do so: not once it has ended again and again."""
    pids: set[int] = set()

    def may() -> bool:
        if not is_running(settings):
            return False
        process = _process(settings, name)
        pids.update({process["pid"]} - {0})
        return len(pids) <= MOST_STARTS and process["statename"] != "FATAL"

    return may


def _process(settings: Settings, name: str) -> dict[str, Any]:
    """Returns what supervisord says of a program; without a `supervisorctl`, which takes long to start."""
    transport = SupervisorTransport(None, None, f"unix://{_socket_path(settings.home)}")
    with ServerProxy("http://127.0.0.1", transport=transport) as server:
        return cast("dict[str, Any]", server.supervisor.getProcessInfo(name))


def _require_loaded_graph(settings: Settings) -> None:
    """Refuses a Dagster that runs without the graph: its pages would be empty, and say so only when looked at.

    Raises:
        ServiceError: the code location did not load; the error is shown.
    """
    query = (
        "{workspaceOrError {... on Workspace {locationEntries {locationOrLoadError {"
        "__typename ... on PythonError {message}}}}}}"
    )
    url = f"http://127.0.0.1:{settings.dagster_port}/graphql"
    with httpx.Client(transport=direct_transport(url), timeout=60) as client:
        answer = client.post(url, json={"query": query}).json()
    for entry in answer["data"]["workspaceOrError"].get("locationEntries", []):
        loaded = entry["locationOrLoadError"] or {}
        if loaded.get("__typename") == "PythonError":
            raise ServiceError(
                f"Dagster runs, but the graph did not load:\n{loaded['message'][-2000:]}\n"
                "Mend the config, then reload the definitions in Dagster. `make down` stops everything."
            )


def _supervisor_pid(settings: Settings) -> int | None:
    try:
        pid = int((settings.home / "run" / "supervisord.pid").read_text())
        os.kill(pid, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None
    command = _command_line(pid)
    return pid if command is None or "supervisord" in command else None


def _command_line(pid: int) -> str | None:
    """Returns a process's command line where the system shows it: a pid may have been given to something else."""
    listing = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return listing.stdout or None


def _wait(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServiceError(f"Waited {seconds:.0f} s for {what}.")
        time.sleep(0.2)
