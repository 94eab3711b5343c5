"""The installation's PostgreSQL server: started, watched and stopped with PostgreSQL's own programs.

`embedded.py` decides when; this module knows how, and `data_folder.py` makes the data. Callers hold the start lock
around everything that changes something. https://www.postgresql.org/docs/18/app-pg-ctl.html
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from cv_platform.database import pg_binaries
from cv_platform.database.data_folder import HOST, make_data_folder, place_outside
from cv_platform.database.pg_binaries import POSTGRES_MAJOR, ServerUser, find_binaries, server_user
from cv_platform.errors import ServiceError
from cv_platform.files import write_file

logger = logging.getLogger(__name__)

NAME = "cv_platform"
"""Of the role (no superuser) and of its database."""
START_SECONDS = 60.0
_PORTS = range(20_000, 32_000)
"""Below the range from which systems give ports to outgoing connections, so that a remembered one stays free."""
_POLL_SECONDS = 0.05
_LOG_LIMIT_BYTES = 10_000_000
_PASSING_REASONS = ("shared memory block", "could not bind", "could not create any TCP/IP sockets", "lock file")


class ClusterState(BaseModel):
    """What a cluster remembers between starts: `cluster.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    port: int | None = None
    data_directory: str = "data"
    """Relative to the cluster's folder, so that a CV_HOME that is moved keeps its data."""


@dataclass(frozen=True)
class Postmaster:
    """A running server."""

    pid: int
    port: int


class Cluster:
    """The embedded database of one `CV_HOME`.

    `home/postgres/` holds `password` (mode 600), `cluster.json` (port and data folder), `postgres.log`, the locks, and
    `data/` unless root starts the server and its user cannot reach CV_HOME: then the data lie below
    `/var/lib/cv_platform/` and `cluster.json` says where.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home.absolute() / "postgres"
        self._password_file = self.folder / "password"
        self._state_file = self.folder / "cluster.json"
        self._log_file = self.folder / "postgres.log"

    @property
    def data(self) -> Path:
        """The data folder; it need not exist."""
        return self.folder / self._state().data_directory

    def url(self, port: int) -> str:
        """Returns the URL of the database at `port`."""
        return f"postgresql+psycopg2://{NAME}:{self._password()}@{HOST}:{port}/{NAME}"

    def prepare(self) -> None:
        """Makes the data folder unless it exists; a crash in between leaves nothing that a later start would use.

        Raises:
            ServiceError: the data are of another major version, or are not ours, or cannot be made.
        """
        data = self.data
        if not (data / "PG_VERSION").exists():
            self._initialise()
            return
        found = (data / "PG_VERSION").read_text().strip()
        if found != str(POSTGRES_MAJOR):
            raise ServiceError(
                f"{data}: expected data of PostgreSQL {POSTGRES_MAJOR}. Received: data of PostgreSQL {found}. "
                f"Dump them with version {found}'s pg_dump and load them into a new CV_HOME, or move {self.folder} "
                "away and start empty."
            )
        if not self._password_file.exists():
            raise ServiceError(
                f"{self._password_file}: expected the password of {data}. Received: no file. Restore it, or move "
                f"{self.folder} away to start empty."
            )

    def postmaster(self) -> Postmaster | None:
        """Returns the server that runs on these data, whoever started it."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            found = Postmaster(pid=int(lines[0]), port=int(lines[3]))
        except FileNotFoundError:
            return None
        except (IndexError, ValueError):
            return None  # It is being written: the caller asks again.
        except PermissionError as err:
            raise ServiceError(
                f"{self.data}: expected data of this user. Received: {err}. Run as the user who made CV_HOME."
            ) from err
        return found if _runs_on(found.pid, self.data) is not False else None

    def choose_port(self, port: int | None, *, keep: bool) -> int:
        """Returns the port to start on: the given one, the remembered one, or a free one, which is remembered.

        Args:
            port: wanted by the user; None: any.
            keep: others know the remembered port, so no other will do.

        Raises:
            ServiceError: a port that may not be changed is taken.
        """
        wanted = port or self._state().port
        if wanted is not None and _is_free(wanted):
            chosen = wanted
        elif port is not None or (keep and wanted is not None):
            raise ServiceError(
                f"CV_POSTGRES_PORT: expected a free port for PostgreSQL on {HOST}. Received: {wanted}, which another "
                "program uses. Stop it, or set CV_POSTGRES_PORT to another port."
            )
        else:
            chosen = _free_port()
            if wanted is not None:
                logger.warning("PostgreSQL moves from port %d, which another program uses, to %d.", wanted, chosen)
        self._remember(port=chosen)
        return chosen

    def start(self, port: int) -> bool:
        """Starts a server that outlives this process's terminal.

        Returns:
            False where trying again may help: a killed server's memory is not free yet, or the port was just taken.

        Raises:
            ServiceError: it does not start for another reason.
        """
        user, binaries = self._user_and_binaries()
        self._forget_stale_pid(user)
        if self._log_file.exists() and self._log_file.stat().st_size > _LOG_LIMIT_BYTES:
            self._log_file.replace(self._log_file.with_suffix(".log.1"))
        log = os.open(self._log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        log_start = os.fstat(log).st_size
        command = [binaries / "pg_ctl", "start", "-w", "-s", "-t", str(int(START_SECONDS)), "-D", self.data]
        try:
            # pg_ctl starts it in a session of its own, where Ctrl-C in this terminal does not reach it.
            result = subprocess.run(
                [*map(str, command), "-o", f"-p {port}"], stdout=log, stderr=log, check=False, **user.popen_arguments()
            )
        finally:
            os.close(log)
        if result.returncode == 0:
            return True
        said = self._log_file.read_bytes()[log_start:].decode(errors="replace")
        if any(reason in said for reason in _PASSING_REASONS):
            return False
        raise ServiceError(f"Expected PostgreSQL on {self.data} to start. Received: {said.strip()[-2000:]}")

    def replace_process(self, port: int) -> NoReturn:
        """Turns this process into the server."""
        user, binaries = self._user_and_binaries()
        self._forget_stale_pid(user)
        program = str(binaries / "postgres")
        command = [program, "-D", str(self.data), "-p", str(port)]  # Our files are closed to the user we become below.
        os.chdir("/")
        os.umask(0o077)
        if user.is_other:
            os.setgroups([])
            os.setgid(user.gid)
            os.setuid(user.uid)
        os.execve(program, command, pg_binaries.server_environment())

    def stop(self) -> None:
        """Stops the server, if one runs, ending its connections.

        Raises:
            ServiceError: it does not stop.
        """
        if self.postmaster() is None:
            return
        user, binaries = self._user_and_binaries()
        command = [binaries / "pg_ctl", "stop", "-w", "-s", "-t", str(int(START_SECONDS)), "-D", self.data, "-m"]
        output = ""
        for mode in ("fast", "immediate"):
            result = subprocess.run(
                [*map(str, command), mode], capture_output=True, text=True, check=False, **user.popen_arguments()
            )
            if result.returncode == 0 or self.postmaster() is None:
                return
            output = result.stderr.strip()
        raise ServiceError(f"Expected PostgreSQL on {self.data} to stop. Received: {output}. See {self._log_file}.")

    def answers(self, port: int) -> bool:
        """Whether the server at `port` lets us in; False while it starts or recovers.

        Raises:
            ServiceError: it refuses the password.
        """
        import psycopg2  # Late: who only looks whether there is a server needs no driver.

        try:
            psycopg2.connect(
                host=HOST, port=port, user=NAME, dbname=NAME, password=self._password(), connect_timeout=2
            ).close()
        except psycopg2.OperationalError as err:
            if "authentication failed" in str(err):
                raise ServiceError(
                    f"Expected PostgreSQL on port {port} to accept the password in {self._password_file}. "
                    f"Received: {str(err).strip()}. Restore that file."
                ) from err
            return False
        return True

    def wait_until_it_answers(self, deadline: float) -> int | None:
        """Returns the port once the running server answers; None once none runs any more.

        Args:
            deadline: on `time.monotonic`'s clock.

        Raises:
            ServiceError: it runs, but does not answer in time.
        """
        while (running := self.postmaster()) is not None:
            if self.answers(running.port):
                return running.port
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"Expected PostgreSQL (process {running.pid}) to answer on port {running.port} within "
                    f"{START_SECONDS:.0f} s. Received: nothing. See {self._log_file}:\n{self.log_end()}"
                )
            time.sleep(_POLL_SECONDS)
        return None

    def log_end(self) -> str:
        """Returns the last lines of the server's log."""
        try:
            return "\n".join(self._log_file.read_text(errors="replace").splitlines()[-10:])
        except FileNotFoundError:
            return "(no log)"

    def make_folder(self) -> None:
        """Makes `home/postgres/`, closed to others; root lets the server's user pass through it, but not list it."""
        if self.folder.is_dir():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o711 if os.geteuid() == 0 else 0o700)
        except PermissionError as err:
            raise ServiceError(
                f"{self.folder}: expected a folder of this user. Received: {err}. Run as the user who made CV_HOME."
            ) from err

    def _initialise(self) -> None:
        user = server_user(self.data)
        binaries = find_binaries(user)
        if not self._password_file.exists():
            write_file(self._password_file, secrets.token_urlsafe(24), is_private=True)
        place = self.folder if user.can_enter(self.folder) else place_outside(self.folder, user)
        data = make_data_folder(place, user, binaries, role=NAME, password=self._password())
        self._remember(data_directory="data" if place == self.folder else str(data))

    def _user_and_binaries(self) -> tuple[ServerUser, Path]:
        user = server_user(self.data)
        return user, find_binaries(user)

    def _forget_stale_pid(self, user: ServerUser) -> None:
        """Removes a dead server's pid file if its number now belongs to another program.

        PostgreSQL itself recovers from a pid that is gone, but refuses to start when a process of the same user has
        got the number, as happens in restarted containers.
        """
        pid_file = self.data / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return
        if _runs_on(pid, self.data) is False and Path(f"/proc/{pid}").exists():
            logger.warning("Process %d is no PostgreSQL: removing the stale %s of user %d.", pid, pid_file, user.uid)
            pid_file.unlink(missing_ok=True)

    def _password(self) -> str:
        try:
            return self._password_file.read_text().strip()
        except OSError as err:
            raise ServiceError(
                f"{self._password_file}: expected a readable file. Received: {err}. Run as the user who made CV_HOME."
            ) from err

    def _state(self) -> ClusterState:
        try:
            return ClusterState.model_validate_json(self._state_file.read_text())
        except FileNotFoundError:
            return ClusterState()
        except (OSError, ValidationError) as err:
            raise ServiceError(
                f"{self._state_file}: expected JSON with port and data_directory. Received: {err}. Restore the file."
            ) from err

    def _remember(self, **values: str | int) -> None:
        state = self._state()
        changed = state.model_copy(update=values)
        if changed != state:
            write_file(self._state_file, changed.model_dump_json(), is_private=True)


def _runs_on(pid: int, data: Path) -> bool | None:
    """Whether a process is the PostgreSQL server on `data`; None where the system does not let us tell."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # It lives, and is somebody else's.
    if not Path("/proc/self/cwd").exists():
        result = subprocess.run(["ps", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False)
        return "postgres" in result.stdout
    try:
        # A server's working directory is its data folder; a dead one that nobody has waited for has none.
        return os.path.realpath(f"/proc/{pid}/cwd", strict=True) == os.path.realpath(data)
    except FileNotFoundError:
        return False
    except PermissionError:
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    for _ in range(200):
        port = secrets.choice(_PORTS)
        if _is_free(port):
            return port
    raise ServiceError(
        f"Expected a free port between {_PORTS.start} and {_PORTS.stop}. Received: none in 200 tries. "
        "Set CV_POSTGRES_PORT."
    )
