"""What a backup of the stack holds, and whether this release can restore it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cv_platform.containers import engine
from cv_platform.containers.databases import OWNERS
from cv_platform.containers.preflight import FORMAT, POSTGRES_MAJOR
from cv_platform.errors import BackupError
from cv_platform.maintenance.archive_stream import Manifest

KIND = "stack in containers"
VOLUMES = "volumes"
DATABASES = "databases"
CONFIGS = "configs"
SETTINGS = "docker.env"
"""Members of the archive."""
LEFT_OUT = "what Prometheus has measured; what was set in Grafana, Alertmanager and pgAdmin; downloads and caches"


@dataclass(frozen=True)
class Contents:
    """What a manifest says of a stack.

    Attributes:
        project: Compose's name of it.
        volume_format: layout of what lies in the volumes.
        postgres_major: version that the dumps are of.
        rows: by database and table.
        files: number by volume.
        left_out: what other servers hold, and files of this machine that docker/.env names.
    """

    project: str
    volume_format: str
    postgres_major: int
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def product_version() -> str:
    """Returns this checkout's version; nothing of it need be installed."""
    text = (engine.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise BackupError(f"Expected a version in {engine.REPOSITORY / 'pyproject.toml'}. Received: none. Mend it.")
    return found[1]


def require_restorable(archive: Path, manifest: Manifest) -> Contents:
    """Returns what the archive says of its stack, if this release can restore it.

    Raises:
        BackupError: it cannot.
    """
    if manifest.kind != KIND:
        hint = " Restore it with: make restore FILE=…" if manifest.kind == "embedded installation" else ""
        raise BackupError(f"{archive}: expected a backup of a {KIND}. Received: of an {manifest.kind}.{hint}")
    ours = product_version()
    if engine.version_tuple(manifest.product_version) > engine.version_tuple(ours):
        raise BackupError(
            f"{archive}: expected a backup of release {ours} or older. Received: of {manifest.product_version}. "
            "Restore it with that release, or a newer one."
        )
    try:
        contents = _contents_of(manifest.details)
    except (TypeError, ValueError) as err:
        raise BackupError(f"{archive}: expected details of a {KIND}. Received: {err}. Use another backup.") from err
    if contents.volume_format != FORMAT:
        raise BackupError(
            f"{archive}: expected volumes of format {FORMAT}. Received: {contents.volume_format}. "
            f"Restore it with release {manifest.product_version}, which made it."
        )
    if contents.postgres_major > int(POSTGRES_MAJOR):
        raise BackupError(
            f"{archive}: expected dumps of PostgreSQL {POSTGRES_MAJOR} or older. Received: of "
            f"{contents.postgres_major}. Restore it with the release that made it, or a newer one."
        )
    names = {member.name for member in manifest.members}
    dumps = {f"{DATABASES}/{database}.dump" for database in OWNERS}
    known = (f"{CONFIGS}/", *(f"{VOLUMES}/{volume}/" for volume in engine.RESTORED_VOLUMES if volume != "postgres"))
    strangers = [name for name in names - dumps - {SETTINGS} if not name.startswith(known)]
    if strangers or not dumps <= names or SETTINGS not in names or set(contents.rows) != set(OWNERS):
        raise BackupError(f"{archive}: expected the files of a {KIND}. Received: others. Use another backup.")
    return contents


def _contents_of(details: dict[str, Any]) -> Contents:
    """Returns what a manifest says.

    Raises:
        TypeError, ValueError: it says something else.
    """
    contents = Contents(**details)
    if not all(isinstance(part, dict) for part in (contents.rows, contents.files, *contents.rows.values())):
        raise ValueError("rows or files that are no numbers by name")
    return contents
