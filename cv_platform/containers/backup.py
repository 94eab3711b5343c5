"""Backs up the running stack while it works, into one verified archive.

Names before what they name, as the embedded installation's backup does (cv_platform/maintenance/contents.py): spools,
the request log, records and pointers, the databases of Dagster and MLflow, and last the files, which are never changed
once they have a name. Whatever a copied row or pointer refers to is there when its turn comes.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from cv_platform.containers import engine
from cv_platform.containers.backup_contents import (
    CONFIGS,
    DATABASES,
    KIND,
    SETTINGS,
    VOLUMES,
    Contents,
    product_version,
)
from cv_platform.containers.certificate import has_tls
from cv_platform.containers.databases import Server
from cv_platform.containers.env_file import read_env
from cv_platform.containers.preflight import FORMAT
from cv_platform.errors import BackupError, DiskSpaceError, ServiceError
from cv_platform.maintenance.archive import write_archive
from cv_platform.maintenance.archive_stream import ArchiveReader, ArchiveWriter

SPARE_BYTES = 256 * 2**20
"""Left free on every disk."""
_SPOOLS, _NAMES, _THINGS = "spool", "names", "things"
"""Phases of `cv_platform.maintenance.volumes`."""


def back_up(output: Path, say: Callable[[str], None]) -> tuple[Path, Contents]:
    """Writes an archive of the running stack to the folder `output`, reads it again, and returns it.

    Everything that was answered, trained or published before the call is in it; of what happens meanwhile, some may be.
    Files of a run in progress may be incomplete, as they are for anyone who looks at it.

    Raises:
        BackupError: a part is damaged, or the archive cannot be written.
        DiskSpaceError: it would fill the disk.
        ServiceError: PostgreSQL does not run, or another backup or garbage collection does.
    """
    values = read_env(engine.ENV_FILE)
    project = engine.project_name(values)
    server = _running_server(project)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise BackupError(f"Cannot write to {output}: {err}. Choose another folder: OUTPUT=…") from err
    name = f"{project}-stack-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}.tar.gz"
    target = output.absolute() / name
    with _held_volumes() as needed:
        _discard_leftovers(output, project)
        require_space(output, needed + 2 * server.bytes(), "the backup")
        with (
            write_archive(target, kind=KIND, product_version=product_version()) as writer,
            tempfile.TemporaryDirectory(dir=output, prefix=f".{project}-stack-dump-") as staging,
        ):
            contents = _fill(writer, server, values, Path(staging) / "dump", say)
            writer.details = asdict(contents)
            say("Reading it again")
    return target, contents


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Returns if so many bytes fit where `folder` is, and a reserve stays free.

    Raises:
        DiskSpaceError: they do not.
    """
    free = shutil.disk_usage(folder).free
    if needed_bytes + SPARE_BYTES > free:
        raise DiskSpaceError(
            f"Expected {(needed_bytes + SPARE_BYTES) / 1e9:.2f} GB free at {folder} for {purpose}. "
            f"Received: {free / 1e9:.2f} GB. Free some (make stack-gc lists what is not needed; docker image prune), "
            "or use another disk."
        )


def _fill(
    writer: ArchiveWriter, server: Server, values: Mapping[str, str], dump: Path, say: Callable[[str], None]
) -> Contents:
    contents = Contents(engine.project_name(values), FORMAT, server.major(), left_out=_elsewhere(values))
    # First: a restoration begins with it.
    writer.add_file(engine.ENV_FILE, SETTINGS)
    files = Counter[str]()
    steps = ((_SPOOLS, ("request_log",)), (_NAMES, ("dagster", "mlflow")), (_THINGS, ()))
    for phase, databases in steps:
        say(f"Copying {phase}")
        files.update(_copy(writer, phase))
        for database in databases:
            say(f"Dumping {database}")
            contents.rows[database] = server.dump(database, dump)
            writer.add_file(dump, f"{DATABASES}/{database}.dump")
            dump.unlink()
    contents.files.update(files)
    configs = engine.REPOSITORY / CONFIGS
    for path in sorted(path for path in configs.rglob("*") if path.is_file() and not path.is_symlink()):
        writer.add_file(path, f"{CONFIGS}/{path.relative_to(configs).as_posix()}")
    return contents


def _copy(writer: ArchiveWriter, phase: str) -> dict[str, int]:
    command = maintenance_command("send", phase)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=engine.environment(),
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        reader = ArchiveReader(f"the copy of {phase}", run.stdout)
        try:
            manifest = writer.add_all(reader, below=VOLUMES)
        except BackupError as err:
            run.kill()
            raise BackupError(f"{err} {end_of(run.stderr.read())}") from err
        error = run.stderr.read()
    if run.returncode != 0:
        raise BackupError(f"Expected {phase} to be copied. Received: {end_of(error)}")
    return manifest.details["files"]


@contextmanager
def _held_volumes() -> Iterator[int]:
    """Keeps garbage collection and other backups away while the block runs; yields how many bytes it may copy.

    The lock's holder ends with this process, however that ends.
    """
    command = maintenance_command("hold")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=engine.environment()
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        line = run.stdout.readline()
        if not line:
            raise ServiceError(f"Expected to hold the volumes. Received: {end_of(run.stderr.read())}")
        try:
            yield int(json.loads(line)["bytes"])
        finally:
            run.communicate()  # Its input ends.


def maintenance_command(*arguments: str, env_file: Path | None = None) -> list[str]:
    """Returns the command that runs `cv_platform.maintenance.volumes` on the volumes of an env file.

    It is run with `engine.environment`.
    """
    command = ("run", "--rm", "--no-deps", "--no-TTY", "maintenance")
    program = ("python", "-m", "cv_platform.maintenance.volumes")
    return engine.compose_command(*command, *program, *arguments, env_file=env_file)


def end_of(error: bytes) -> str:
    """Returns what a program has said last on standard error, without what Compose says of its progress."""
    lines = error.decode(errors="replace").splitlines()
    return "\n".join(line for line in lines if not re.match(r"^ (Container|Network|Volume) ", line)).strip()[-2000:]


def _running_server(project: str) -> Server:
    found = [c for c in engine.containers(project, "postgres") if c.is_well]
    if not found:
        raise ServiceError(f"Expected the PostgreSQL of {project} to run. Received: none. Run: make stack-up")
    return Server(found[0].id)


def _elsewhere(values: Mapping[str, str]) -> list[str]:
    storage = values.get("CV_STORAGE", "")
    left_out = [f"central storage ({storage})"] if "://" in storage else []
    return [*left_out, "TLS certificate and key"] if has_tls(values) else left_out


def _discard_leftovers(output: Path, project: str) -> None:
    """Removes what killed backups of the project have left: only one works at a time."""
    for path in output.glob(f".{project}-stack-dump-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in output.glob(f".{project}-stack-*.partial-*"):
        path.unlink()
