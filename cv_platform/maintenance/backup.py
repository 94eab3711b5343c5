"""Backs up an embedded installation while it works: see `contents.py` for what, in which order, and why."""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from cv_platform.database.connection import database_url
from cv_platform.errors import BackupError
from cv_platform.files import exclusive, require_free_space
from cv_platform.maintenance.archive import write_archive
from cv_platform.maintenance.archive_stream import ArchiveWriter
from cv_platform.maintenance.contents import Part, elsewhere, parts, spool_part
from cv_platform.maintenance.database_dump import DatabaseDump, database_bytes, dump_database
from cv_platform.maintenance.sqlite_copy import copy_sqlite
from cv_platform.settings import Settings
from cv_platform.storage import new_version

logger = logging.getLogger(__name__)

KIND = "embedded installation"
HOME = "home"
"""Folder of the archive that becomes CV_HOME."""
DUMP = "database/request_log.dump"
FORMAT_FILE = "FORMAT_VERSION"


class Contents(BaseModel):
    """What a manifest says of an installation.

    Attributes:
        home: CV_HOME as it was.
        home_format: layout of CV_HOME.
        files: number by part.
        database: the request log; None, when a server has it.
        left_out: what other servers hold.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path
    home_format: str
    files: dict[str, int]
    database: DatabaseDump | None
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Backup:
    """A finished backup.

    Attributes:
        path: the archive.
        contents: what it holds.
    """

    path: Path
    contents: Contents


def maintenance_lock(home: Path) -> Path:
    """Returns the file whose lock backup, restoration and garbage collection of one installation hold."""
    (home / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
    return home / "run" / "maintenance.lock"


def back_up(settings: Settings, output: Path) -> Backup:
    """Writes an archive of the installation to the folder `output` while it works, and returns it verified.

    Everything that was answered, trained or published before the call is in it; of what happens meanwhile, some may be.
    Files of a run in progress may be incomplete, as they are for anyone who looks at it.

    Raises:
        BackupError: there is no installation, a part is damaged, or the archive cannot be written.
        DiskSpaceError: it would fill the disk.
        LockHeldError: another backup or garbage collection runs.
        ServiceError: the embedded PostgreSQL does not start.
    """
    home = settings.home
    if not (home / FORMAT_FILE).is_file():
        raise BackupError(f"Expected an installation at {home}. Received: none. Set CV_HOME.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise BackupError(f"Expected a folder to write the backup to. Received: {err}. Name another: OUTPUT=…") from err
    with exclusive(maintenance_lock(home), timeout_seconds=0.0):
        target = output.absolute() / f"cv-platform-{new_version()}.tar.gz"
        version = importlib.metadata.version("cv-platform")
        with (
            tempfile.TemporaryDirectory(dir=output, prefix=".backup-") as staging,
            write_archive(target, kind=KIND, product_version=version) as writer,
        ):
            contents = _fill(writer, settings, Path(staging))
            writer.details = contents.model_dump(mode="json")
        return Backup(target, contents)


def _fill(writer: ArchiveWriter, settings: Settings, staging: Path) -> Contents:
    home, counts = settings.home, Counter[str]()
    copied = parts(settings)
    database: DatabaseDump | None = None
    _require_space([spool_part(), *copied], settings, staging)
    counts["spool"] = add_part(writer, spool_part(), home, below=HOME, staging=staging)
    if settings.database_url is None:
        with database_url(settings) as url:
            needed = 2 * database_bytes(url)
            require_free_space(staging, needed, purpose="the dump", spare_bytes=settings.spare_disk_bytes)
            dump = staging / "dump"
            database = dump_database(url, dump)
            writer.add_file(dump, DUMP)
            dump.unlink()
    for part in copied:
        counts[part.folder] += add_part(writer, part, home, below=HOME, staging=staging)
    writer.add_file(home / FORMAT_FILE, f"{HOME}/{FORMAT_FILE}")
    return Contents(
        home=home,
        home_format=(home / FORMAT_FILE).read_text().strip(),
        files=dict(counts),
        database=database,
        left_out=tuple(elsewhere(settings)),
    )


def add_part(writer: ArchiveWriter, part: Part, root: Path, *, below: str, staging: Path) -> int:
    """Adds the files of a part and returns how many; one that has gone since it was listed is left out.

    Args:
        writer: gets them, as `<below>/<path relative to root>`.
        part: of `root`.
        root: CV_HOME, or another folder of parts.
        below: a folder of the archive.
        staging: a folder for copies of databases.
    """
    count = 0
    if (root / part.folder).is_dir() and not part.only:
        writer.add_folder(str(PurePosixPath(below, part.folder)))
    for relative, path in part.files(root):
        name = f"{below}/{relative}"
        try:
            if path.is_dir():
                if relative != PurePosixPath(part.folder):
                    writer.add_folder(name)
            elif part.is_database(relative):
                copy = staging / "copy.sqlite"
                if copy_sqlite(path, copy):
                    writer.add_file(copy, name)
                    copy.unlink()
                    count += 1
            else:
                writer.add_file(path, name)
                count += 1
        except FileNotFoundError:
            logger.info("%s has gone meanwhile", path)
    return count


def part_bytes(part: Part, root: Path) -> int:
    """Returns how much disk a copy of a part may need."""
    needed = 0
    for relative, path in part.files(root):
        try:
            # A database is copied before it is packed.
            needed += path.stat().st_size * (2 if part.is_database(relative) else 1)
        except FileNotFoundError:
            continue
    return needed


def _require_space(all_parts: list[Part], settings: Settings, staging: Path) -> None:
    needed = sum(part_bytes(part, settings.home) for part in all_parts)
    require_free_space(staging, needed, purpose="the backup", spare_bytes=settings.spare_disk_bytes)
