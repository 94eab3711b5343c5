"""Who works with an installation now: its restoration and the deletion of its files must not happen under them.

Kernel locks first (PostgreSQL's users, the spools of services), which say it whoever holds them; then the processes of
this machine that were started for this CV_HOME, as everything that the platform starts is (`stack.environment`).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from cv_platform.database.cluster import START_SECONDS, Cluster
from cv_platform.files import exclusive, is_locked
from cv_platform.maintenance.contents import SPOOL

_PROGRAMS = ("python", "postgres", "dagster", "mlflow", "bentoml", "evidently")


def users(home: Path) -> list[str]:
    """Names what uses the installation at `home`: empty, when nothing does.

    A PostgreSQL that a killed process has left, and that nobody uses, is stopped.
    """
    found = _database_users(Cluster(home))
    found += [f"a service ({lock.name})" for lock in sorted((home / SPOOL).glob("*.lock")) if is_locked(lock)]
    return found + [f"process {pid}: {command}" for pid, command in _processes(home)]


def _database_users(cluster: Cluster) -> list[str]:
    if not cluster.folder.is_dir():
        return []
    # As `embedded.py` wants it of everyone who tries `users.lock` alone, or stops the server.
    with exclusive(cluster.folder / "start.lock", timeout_seconds=START_SECONDS):
        server = cluster.postmaster()
        if is_locked(cluster.folder / "users.lock"):
            return [f"PostgreSQL (process {server.pid if server else 'unknown'})"]
        if server is not None:
            cluster.stop()
    return []


def _processes(home: Path) -> list[tuple[int, str]]:
    """Lists this user's programs that carry `CV_HOME=<home>`, without this process and those that started it."""
    wanted = f"CV_HOME={home}"
    proc = Path("/proc")
    if not (proc / "self" / "environ").exists():  # macOS: `ps` shows the environment after the command.
        listing = subprocess.run(["ps", "axeww", "-o", "pid=,command="], capture_output=True, text=True, check=False)
        lines = [line.split(maxsplit=1) for line in listing.stdout.splitlines()]
        ours = {os.getpid(), os.getppid()}
        return [
            (int(line[0]), line[1].split(" ", 1)[0])
            for line in lines
            if len(line) == 2 and wanted in line[1].split() and int(line[0]) not in ours and _is_program(line[1])
        ]
    ancestors = _ancestors(os.getpid())
    found = []
    for entry in proc.iterdir():
        if not entry.name.isdigit() or int(entry.name) in ancestors:
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().decode(errors="replace").split("\0"):
                continue
            command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
        except OSError:  # Another user's, or gone meanwhile.
            continue
        if _is_program(command):  # A shell or an editor may have inherited the variable.
            found.append((int(entry.name), command[:120]))
    return sorted(found)


def _is_program(command: str) -> bool:
    name = Path(command.split(" ", 1)[0]).name
    return name.startswith(_PROGRAMS)


def _ancestors(pid: int) -> set[int]:
    found = set()
    while pid > 0:
        found.add(pid)
        try:
            # After the name in parentheses, which may hold anything: state, then the parent.
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return found
