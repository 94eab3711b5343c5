"""Restores an embedded installation from a backup: beside the old one, then in its place.

Nothing of the old installation is touched before the new one is complete: files unpacked, folders renamed in the
records, the request log loaded, migrated and counted. The old one is kept.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from cv_platform.database.cluster import Cluster
from cv_platform.database.embedded import embedded_database
from cv_platform.database.migrate import migrate
from cv_platform.errors import BackupError
from cv_platform.files import exclusive, require_free_space, sync_folder
from cv_platform.maintenance.archive import extract_archive, verify_archive
from cv_platform.maintenance.archive_stream import Manifest
from cv_platform.maintenance.backup import DUMP, FORMAT_FILE, HOME, KIND, Contents, maintenance_lock
from cv_platform.maintenance.contents import SPOOL
from cv_platform.maintenance.database_dump import load_database
from cv_platform.maintenance.folder_swap import replace_folder
from cv_platform.maintenance.moved_home import Relocation
from cv_platform.maintenance.users import users

logger = logging.getLogger(__name__)

_CLUSTER_BYTES = 100_000_000
"""Of a data folder without rows."""


@dataclass(frozen=True)
class Restored:
    """A finished restoration.

    Attributes:
        manifest: of the archive.
        contents: its details.
        previous: where the installation that was there before is now; None, when there was none.
    """

    manifest: Manifest
    contents: Contents
    previous: Path | None


def restore(archive: Path, home: Path, *, home_format: str, spare_bytes: int) -> Restored:
    """Makes `home` the installation that `archive` holds; the one that is there is kept beside it.

    Args:
        archive: see `backup.back_up`.
        home: CV_HOME; it need not exist, nor be the folder that was backed up.
        home_format: the layout of CV_HOME that this release knows.
        spare_bytes: see `files.require_free_space`.

    Raises:
        BackupError: the archive is damaged, harmful, of another kind or of a newer release, or processes use `home`.
        DiskSpaceError: it does not fit beside the old installation.
        ServiceError: PostgreSQL does not start on the restored data.
        LockHeldError: a backup of `home` runs.
        SchemaMismatchError: the request log is of a newer release.
    """
    manifest = verify_archive(archive)
    contents = _require_restorable(archive, manifest, home_format)
    home = home.absolute()
    with contextlib.ExitStack() as stack:
        if (home / FORMAT_FILE).exists():
            stack.enter_context(exclusive(maintenance_lock(home), timeout_seconds=0.0))
        _require_idle(home)
        home.parent.mkdir(parents=True, exist_ok=True)
        _discard_leftovers(home)
        database_bytes = next((member.bytes for member in manifest.members if member.name == DUMP), 0)
        needed = manifest.total_bytes + 2 * database_bytes + _CLUSTER_BYTES
        require_free_space(home.parent, needed, purpose="the restored installation", spare_bytes=spare_bytes)
        work = home.parent / f".{home.name}.restoring-{secrets.token_hex(4)}"
        work.mkdir()
        try:
            _prepare(archive, manifest, contents, work, home)
            _require_idle(home)
            previous = _swap(work / HOME, home)
        finally:
            _discard(work)
    return Restored(manifest, contents, previous)


def _require_restorable(archive: Path, manifest: Manifest, home_format: str) -> Contents:
    if manifest.kind != KIND:
        raise BackupError(f"{archive}: expected a backup of an {KIND}. Received: of a {manifest.kind}.")
    try:
        contents = Contents.model_validate(manifest.details)
    except ValidationError as err:
        raise BackupError(f"{archive}: expected details of an {KIND}. Received: {err}. Use another backup.") from err
    if contents.home_format != home_format:
        raise BackupError(
            f"{archive}: expected an installation of format {home_format}. Received: {contents.home_format}. "
            f"Restore it with release {manifest.product_version}, which made it."
        )
    names = {member.name for member in manifest.members}
    strangers = [name for name in names if name != DUMP and not name.startswith(f"{HOME}/")]
    if strangers or f"{HOME}/{FORMAT_FILE}" not in names or (contents.database is not None) != (DUMP in names):
        raise BackupError(f"{archive}: expected the files of an {KIND}. Received: others. Use another backup.")
    if contents.database is not None:
        contents.database.require_loadable()
    return contents


def _require_idle(home: Path) -> None:
    if home.exists() and (found := users(home)):
        raise BackupError(
            f"Expected that nothing uses {home}. Received: {'; '.join(found[:5])}. "
            "Stop it (`make down`, and what you started yourself), then restore again."
        )


def _prepare(archive: Path, manifest: Manifest, contents: Contents, work: Path, home: Path) -> None:
    """Makes `work/home` a complete installation that believes to be at `home`."""
    extract_archive(archive, manifest, work)
    staged = work / HOME
    if (staged / "postgres").exists():  # It would say where PostgreSQL's data are, and what may be deleted.
        raise BackupError(f"{archive}: expected a dump of the request log. Received: a data folder. Do not use it.")
    if (staged / SPOOL).is_dir():
        (staged / SPOOL).chmod(0o700)
    relocation = Relocation(contents.home, home)
    relocation.home(staged)
    if contents.database is None:
        return
    with embedded_database(staged) as url:
        load_database(url, work / DUMP, contents.database)
        migrate(url)
        relocation.report_urls(url)
    if Cluster(staged).postmaster() is not None:
        raise BackupError(f"Expected PostgreSQL on {staged} to stop. Received: it runs. Look into its log.")


def _swap(staged: Path, home: Path) -> Path | None:
    aside = home.with_name(f"{home.name}.before-restore-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    existed = home.exists() and any(home.iterdir())
    try:
        replace_folder(staged, home, aside=aside)
    except OSError as err:
        raise BackupError(
            f"Cannot put the restored installation at {home}: {err}. The old one is as it was. "
            "Set CV_HOME to a folder whose parent you may write, on one file system."
        ) from err
    sync_folder(home.parent)
    return aside if existed else None


def _discard_leftovers(home: Path) -> None:
    """Removes what killed restorations have left beside `home`, their PostgreSQL too."""
    for leftover in home.parent.glob(f".{home.name}.restoring-*"):
        _discard(leftover)


def _discard(work: Path) -> None:
    cluster = Cluster(work / HOME)
    if cluster.folder.is_dir():
        cluster.stop()
        if not cluster.data.is_relative_to(cluster.folder):  # Root keeps them where PostgreSQL's user may go.
            shutil.rmtree(cluster.data.parent, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
