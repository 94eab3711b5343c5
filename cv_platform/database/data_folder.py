"""Makes the data folder of the installation's PostgreSQL, once, where the user that runs the server can reach it.

https://www.postgresql.org/docs/18/app-initdb.html
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from cv_platform.database import pg_binaries
from cv_platform.database.pg_binaries import POSTGRES_MAJOR, ServerUser, make_enterable
from cv_platform.errors import ServiceError
from cv_platform.files import sync_folder

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_INIT_SECONDS = 300.0
_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",  # No socket: nothing to protect, and no limit on the path's length.
    "timezone": "UTC",
    "log_timezone": "UTC",
    "fsync": "on",
    "logging_collector": "off",
}


def make_data_folder(place: Path, user: ServerUser, binaries: Path, *, role: str, password: str) -> Path:
    """Makes `place/data` with one role, which is no superuser, and its database of the same name.

    It appears in one step: what an interrupted attempt left is thrown away.

    Raises:
        ServiceError: one of PostgreSQL's programs failed; its message is shown.
    """
    data, staged = place / "data", place / "data.partial"
    for leftover in (data, staged):
        if leftover.exists():
            shutil.rmtree(leftover)
    staged.mkdir(mode=0o700)
    # The superuser's password is thrown away: the platform needs no such rights, and a person who does can use
    # single-user mode.
    with tempfile.NamedTemporaryFile("w", dir=place, prefix=".initdb-") as superuser_password:
        superuser_password.write(secrets.token_urlsafe(24))
        superuser_password.flush()
        if user.is_other:
            os.chown(staged, user.uid, user.gid)
            os.chown(superuser_password.name, user.uid, user.gid)
        _run(
            [binaries / "initdb", "-D", staged, "--username=postgres", f"--pwfile={superuser_password.name}"]
            + ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--locale-provider=builtin"]
            + ["--builtin-locale=C.UTF-8", "--data-checksums", "--no-instructions"]
            + [f"--set={key}={value}" for key, value in _SETTINGS.items()],
            user,
        )
    _run(
        [binaries / "postgres", "--single", "-D", staged, "postgres"],
        user,
        statements=f"CREATE ROLE {role} LOGIN CREATEDB PASSWORD '{password}';\nCREATE DATABASE {role} OWNER {role};\n",
    )
    staged.rename(data)
    sync_folder(place)  # What is in it, PostgreSQL has synced.
    logger.info("Made a PostgreSQL %d data folder: %s", POSTGRES_MAJOR, data)
    return data


def place_outside(folder: Path, user: ServerUser) -> Path:
    """Returns a new place for the data of `folder`, which the server's user cannot reach and which stays closed.

    Raises:
        ServiceError: the user cannot reach that place either.
    """
    marker = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    left = sorted(pg_binaries.ROOT_STATE.glob(f"postgres-{marker}-*"))
    if left:
        logger.warning("Left by an earlier CV_HOME at this place, remove if not needed: %s", ", ".join(map(str, left)))
    make_enterable(pg_binaries.ROOT_STATE)
    # Random, because the data of a deleted CV_HOME may still lie there and their password is gone.
    place = pg_binaries.ROOT_STATE / f"postgres-{marker}-{secrets.token_hex(4)}"
    make_enterable(place)
    if not user.can_enter(place):
        raise ServiceError(
            f"Expected a folder that user {user.uid}, who runs PostgreSQL for root, can enter. Received: neither "
            f"{folder} nor {place}. Run as another user, or set DATABASE_URL to a server."
        )
    return place


def _run(command: list[str | Path], user: ServerUser, *, statements: str | None = None) -> None:
    arguments = user.popen_arguments()
    if statements is not None:
        del arguments["stdin"]
        arguments["input"] = statements
    program = list(map(str, command))
    try:
        result = subprocess.run(
            program, capture_output=True, text=True, check=False, timeout=_INIT_SECONDS, **arguments
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise ServiceError(f"Expected {program[0]} to run. Received: {err}. Or set DATABASE_URL to a server.") from err
    # Single-user mode ends with 0 even after a statement failed.
    if result.returncode or "ERROR:" in result.stderr or "FATAL:" in result.stderr:
        # Its log repeats a failing statement, and ours hold the password.
        said = "\n".join(line for line in result.stderr.splitlines() if "STATEMENT:" not in line).strip()[-2000:]
        raise ServiceError(
            f"Expected {Path(program[0]).name} to succeed. Received: status {result.returncode}: {said}. "
            f"Check the free space and the rights of {program[program.index('-D') + 1]}, or set DATABASE_URL."
        )
