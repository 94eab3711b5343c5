"""Notices that an installation's folder was moved or copied, with the project or alone: it shall name its new one.

`$CV_HOME/LOCATION` says where it was when it was last used. Of releases without that file, `dagster/dagster.yaml` does.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import yaml

from cv_platform.database.connection import database_url
from cv_platform.database.migrate import migrate
from cv_platform.errors import ConfigError
from cv_platform.files import exclusive, write_file
from cv_platform.maintenance.backup import maintenance_lock
from cv_platform.maintenance.relocation import Relocation
from cv_platform.maintenance.users import users
from cv_platform.settings import Settings

LOCATION = "LOCATION"

logger = logging.getLogger(__name__)


def previous_location(home: Path) -> Path | None:
    """Returns the folder that the installation at `home` still names; None when it has not been moved."""
    try:
        old = Path(os.fsdecode((home / LOCATION).read_bytes()).removesuffix("\n"))
    except FileNotFoundError:
        try:
            instance = yaml.safe_load((home / "dagster" / "dagster.yaml").read_text(encoding="utf-8"))
            old = Path(instance["storage"]["sqlite"]["base_dir"]).parent
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            return None  # New, or a Dagster of its own: it names nothing yet, or nothing of ours.
    if not old.is_absolute() or old == home:
        return None
    try:
        return None if old.samefile(home) else old  # By another name: a link, or a mount.
    except (OSError, ValueError):  # It is gone, or closed to us.
        return old


def require_settled(home: Path) -> None:
    """Refuses an installation that still names another folder: its runs would be written there.

    Raises:
        ConfigError: the message names the command that settles it.
    """
    if (old := previous_location(home)) is not None:
        raise ConfigError(
            f"Expected an installation that was made at {home}. Received: one that was moved here from {old}. "
            "Stop what uses it, and run: cv-platform migrate"
        )


def settle_home(settings: Settings) -> None:
    """Makes a moved installation name its folder; one that was not moved is left alone.

    A process that dies meanwhile leaves LOCATION as it was, and the next command does all of it again.

    Raises:
        ConfigError: something uses it.
        ServiceError: PostgreSQL does not start on its data.
        LockHeldError: a backup of it runs.
    """
    home = settings.home
    if (old := previous_location(home)) is not None:
        with exclusive(maintenance_lock(home), timeout_seconds=0.0):
            if found := users(home):
                raise ConfigError(
                    f"{home} was moved here from {old}. Expected that nothing uses it, so that it can be made to name "
                    f"its new folder. Received: {'; '.join(found[:5])}. Stop it (`make down`), and run this again."
                )
            relocation = Relocation(old, home)
            relocation.home(home)
            if settings.database_url is not None or (home / "postgres").is_dir():
                with database_url(settings) as url:
                    migrate(url)
                    relocation.report_urls(url)
            write_location(home)
        logger.info("The installation was moved from %s to %s: its files name the new folder now.", old, home)


def write_location(home: Path) -> None:
    """Writes down where the installation is, in one step, synced: an empty file would never tell of a later move."""
    write_file(home / LOCATION, os.fsencode(home) + b"\n")
