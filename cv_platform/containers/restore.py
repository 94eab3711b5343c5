"""Restores the stack from a backup: into new volumes beside the old ones, which renaming one file makes the stack's.

`VOLUME_SUFFIX` in docker/.env says which volumes are used. A restoration writes its settings to `engine.RESTORING`,
fills the volumes of a new suffix, and last renames that file to docker/.env. Whoever is killed before leaves the old
stack as it was, and that file, which nothing starts beside and the next restoration clears away. Old volumes are kept.

The new databases are set up with the passwords of docker/.env, so those of a backup need not be the same; only where
there is no docker/.env, the backup's becomes it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cv_platform.containers import engine
from cv_platform.containers.backup import end_of, maintenance_command, require_space
from cv_platform.containers.backup_contents import (
    CONFIGS,
    DATABASES,
    KIND,
    SETTINGS,
    VOLUMES,
    Contents,
    require_restorable,
)
from cv_platform.containers.databases import Server
from cv_platform.containers.env_file import (
    env_problems,
    make_secrets,
    parse_env,
    read_env,
    set_values,
)
from cv_platform.containers.preflight import engine_problems, image_problems
from cv_platform.errors import BackupError, ConfigError, LockHeldError, ServiceError
from cv_platform.files import sync_folder, try_lock, write_file
from cv_platform.maintenance.archive import verified_members, verify_archive
from cv_platform.maintenance.archive_stream import ArchiveWriter, Manifest, Readable, packing

_CLUSTER_BYTES = 300_000_000
"""Of PostgreSQL's data folder without rows, with its first log files."""


@dataclass(frozen=True)
class Restored:
    """A finished restoration.

    Attributes:
        manifest: of the archive.
        contents: its details.
        previous: the volumes that were the stack's before; they are still there.
        took_settings: whether the archive's docker.env became docker/.env.
        differing_settings: names of variables that docker/.env and the archive have with other values.
        differing_configs: files below configs/ that are not as in the archive; missing ones were put back.
    """

    manifest: Manifest
    contents: Contents
    previous: list[str]
    took_settings: bool
    differing_settings: list[str]
    differing_configs: list[str]


def restore(archive: Path, say: Callable[[str], None]) -> Restored:
    """Makes the stack what `archive` holds; it must be stopped, and is started by nobody here.

    Raises:
        BackupError: the archive is damaged, harmful, of something else or of a newer release, or the stack is in use.
        ConfigError: docker/.env is unusable.
        DiskSpaceError: it does not fit beside the old volumes.
        ServiceError: Docker or PostgreSQL does not do its part.
        LockHeldError: another restoration runs.
    """
    say(f"Reading {archive}")
    manifest = verify_archive(archive)
    contents = require_restorable(archive, manifest)
    with _alone():
        discard_unfinished()
        before = engine.ENV_FILE.read_bytes() if engine.ENV_FILE.exists() else None
        took_settings = before is None
        try:
            archived = _prepare_settings(archive, manifest, before)
            project = _require_ready(manifest)
            say("Filling new volumes; the old ones stay as they are")
            with _new_server(project) as server:
                configs = _fill(archive, manifest, contents, server, say)
            if (engine.ENV_FILE.read_bytes() if engine.ENV_FILE.exists() else None) != before:
                raise BackupError(f"Expected {engine.ENV_FILE} to stay as it was. Received: another. Restore again.")
            _require_idle(project)
            previous = [] if before is None else engine.present_volumes(read_env(engine.ENV_FILE))
            differing = _put_back(configs)
            _remove_stopped(project)
            engine.RESTORING.rename(engine.ENV_FILE)
            sync_folder(engine.DOCKER)
        except BaseException:
            discard_unfinished()
            raise
    now = read_env(engine.ENV_FILE)
    changed = sorted(n for n in archived if n != engine.SUFFIX and archived[n] != now.get(n, ""))
    return Restored(manifest, contents, previous, took_settings, changed, differing)


def discard_unfinished() -> bool:
    """Removes what a killed restoration has left, and nothing of the stack; returns whether there was something."""
    if not engine.RESTORING.exists():
        return False
    try:
        values = read_env(engine.RESTORING)
    except ConfigError:
        values = {}
    present = read_env(engine.ENV_FILE) if engine.ENV_FILE.exists() else {}
    suffix = values.get(engine.SUFFIX, "")
    if suffix and suffix != present.get(engine.SUFFIX):
        left = engine.present_volumes(values)
        for name in left:
            users = engine.docker("ps", "--all", "--quiet", "--filter", f"volume={name}").split()
            if users:
                engine.docker("rm", "--force", *users, seconds=120)
        if left:
            engine.docker("volume", "rm", "--force", *left, seconds=120)
    engine.RESTORING.unlink()
    return True


def give_up() -> bool:
    """Clears away what a killed restoration has left, unless one is running; returns whether there was something.

    Raises:
        LockHeldError: a restoration is running.
    """
    with _alone():
        return discard_unfinished()


def _prepare_settings(archive: Path, manifest: Manifest, before: bytes | None) -> dict[str, str]:
    """Writes the settings of the new volumes to `engine.RESTORING`; returns those of the archive."""
    text = _read_member(archive, manifest, SETTINGS)
    write_file(engine.RESTORING, text if before is None else before, is_private=True)
    suffix = time.strftime("_%Y%m%dT%H%M%SZ", time.gmtime())
    set_values(engine.RESTORING, {engine.SUFFIX: suffix})
    if before is None:
        make_secrets(engine.EXAMPLE, engine.RESTORING)  # Those that this release has added.
    problems = env_problems(engine.EXAMPLE, engine.RESTORING)
    if problems:
        raise ConfigError("\n".join(problems).replace(str(engine.RESTORING), str(engine.ENV_FILE)))
    return parse_env(text.decode(), f"{SETTINGS} in {archive}")


def _require_ready(manifest: Manifest) -> str:
    values = read_env(engine.RESTORING)
    problems, information = engine_problems()
    if not problems:
        problems = image_problems(values)
    if problems:
        raise ServiceError("\n".join(problems))
    project = engine.project_name(values)
    _require_idle(project)
    root = Path(str(information.get("DockerRootDir", "/var/lib/docker")))
    if root.is_dir():  # Docker Desktop keeps it in a machine of its own.
        dumps = sum(member.bytes for member in manifest.members if member.name.startswith(f"{DATABASES}/"))
        # Rows need their indexes, and a write-ahead log while they are loaded.
        require_space(root, manifest.total_bytes + 2 * dumps + _CLUSTER_BYTES, "the restored volumes")
    return project


def _require_idle(project: str) -> None:
    """Refuses while anything of the stack runs, or uses the present volumes."""
    present = engine.present_volumes(read_env(engine.ENV_FILE)) if engine.ENV_FILE.exists() else []
    filters = [f"label=com.docker.compose.project={project}", *(f"volume={name}" for name in present)]
    listings = [engine.docker("ps", "--filter", which, "--format", "{{.Names}}") for which in filters]
    users = sorted({name for listing in listings for name in listing.splitlines()})
    if users:
        raise BackupError(
            f"Expected that the stack is stopped. Received: {', '.join(users[:6])} running. "
            "Stop it (make stack-down), then restore again."
        )


def _remove_stopped(project: str) -> None:
    """Removes the stack's containers: they know the old volumes, and would be started with them."""
    stopped = engine.docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={project}").split()
    if stopped:
        engine.docker("rm", *stopped, seconds=120)


@contextlib.contextmanager
def _new_server(project: str) -> Iterator[Server]:
    """Yields a PostgreSQL on the new volume, set up with the roles of docker/postgres; stops it at the end."""
    container = f"{project}-restoring{read_env(engine.RESTORING)[engine.SUFFIX]}"
    command = ("run", "--detach", "--no-deps", "--name", container, "postgres")
    _quietly(engine.compose_command(*command, env_file=engine.RESTORING))
    server = Server(container)
    server.wait()
    yield server
    engine.docker("stop", "--time", "60", container, seconds=90)
    status = engine.docker("inspect", "--format", "{{.State.ExitCode}}", container)
    if status != "0":
        raise ServiceError(f"Expected PostgreSQL to stop. Received: status {status}.\n{engine.log_end(container)}")
    engine.docker("rm", container)


def _fill(
    archive: Path, manifest: Manifest, contents: Contents, server: Server, say: Callable[[str], None]
) -> dict[str, bytes]:
    """Fills databases and volumes; returns the configs."""
    configs: dict[str, bytes] = {}
    command = maintenance_command("receive", env_file=engine.RESTORING)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=engine.environment()
    ) as run:
        assert run.stdin is not None
        assert run.stderr is not None
        try:
            with packing(run.stdin, kind=KIND, product_version=manifest.product_version) as writer:
                for info, content in verified_members(archive, manifest):
                    folder, _, name = info.name.partition("/")
                    if folder == VOLUMES:
                        _send(writer, info, name, content)
                    elif content is not None and folder == DATABASES:
                        database = name[: -len(".dump")]
                        say(f"Loading {database}")
                        server.load(database, content, contents.rows[database])
                    elif content is not None and folder == CONFIGS:
                        configs[name] = content.read()
            run.stdin.close()
        except BrokenPipeError as err:
            raise BackupError(f"Expected the volumes to take the files. Received: {end_of(run.stderr.read())}") from err
        except BaseException:
            run.kill()
            raise
        error = run.stderr.read()
    if run.returncode != 0:
        raise BackupError(f"Expected the volumes to take the files. Received: {end_of(error)}")
    return configs


def _send(writer: ArchiveWriter, info: tarfile.TarInfo, name: str, content: Readable | None) -> None:
    if content is None:
        writer.add_folder(name)
    else:
        writer.add_stream(content, name, size=info.size, mtime=info.mtime, mode=info.mode)


def _put_back(configs: dict[str, bytes]) -> list[str]:
    """Writes the configs that are missing; returns those that differ, which stay as they are."""
    differing = []
    for name, content in configs.items():
        path = engine.REPOSITORY / CONFIGS / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        elif path.read_bytes() != content:
            differing.append(f"{CONFIGS}/{name}")
    return differing


def _read_member(archive: Path, manifest: Manifest, wanted: str) -> bytes:
    for info, content in verified_members(archive, manifest):
        if content is not None and info.name == wanted:
            return content.read()
    raise BackupError(f"{archive}: expected {wanted} in it. Received: none. Use another backup.")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    handle = os.open(engine.DOCKER, os.O_RDONLY)  # The folder itself: it needs no lock file among those of git.
    try:
        if not try_lock(handle):
            raise LockHeldError(
                "Expected to be the only restoration. Received: another one is running. Wait for it, and look at what "
                "it made."
            )
        yield
    finally:
        os.close(handle)


def _quietly(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=engine.environment())
    if done.returncode != 0:
        raise ServiceError(f"`docker compose … {command[-1]}` failed ({done.returncode}): {end_of(done.stderr)}")
