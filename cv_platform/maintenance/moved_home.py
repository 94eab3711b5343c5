"""Notices that an installation's folder was moved or copied, and makes it name its new one.

Records, and bundles in central storage, name no folder. MLflow's and Dagster's databases do, and the addresses of drift
reports. `$CV_HOME/LOCATION` says where it was when it was last used. Of releases without that file,
`dagster/dagster.yaml` does.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import yaml

from cv_platform.errors import ConfigError
from cv_platform.files import exclusive, write_file
from cv_platform.settings import Settings

LOCATION = "LOCATION"
_DATABASES = ("mlflow", "dagster")

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
        # Late, as in `report_urls`: every command and run looks whether its home was moved, and few were.
        from cv_platform.database.connection import database_url
        from cv_platform.database.migrate import migrate
        from cv_platform.maintenance.backup import maintenance_lock
        from cv_platform.maintenance.users import users

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


class Relocation:
    """Replaces one absolute folder by another in texts, as a path, in a `file:` URL and in JSON."""

    def __init__(self, old: Path, new: Path) -> None:
        self.old, self.new = str(old), str(new)
        forms = [
            (old.as_uri(), new.as_uri()),
            (json.dumps(self.old)[1:-1], json.dumps(self.new)[1:-1]),
            (self.old, self.new),
        ]
        # What names the new folder stays, also where that lies below the old one: doing it twice does no harm.
        self._replacements = {new: new for _, new in forms} | dict(forms)
        longest_first = sorted(self._replacements, key=len, reverse=True)
        # A longer name around it is another folder: /data/home2, /mnt/data/home.
        self._pattern = re.compile(rf"(?<![\w.%-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w.%-])")

    def text(self, text: str) -> str:
        """Returns `text` with the new folder."""
        return self._pattern.sub(lambda match: self._replacements[match[0]], text)

    def home(self, home: Path) -> None:
        """Rewrites all files below `home` that name the folder, but the request log (see `report_urls`)."""
        if self.old == self.new:
            return
        for folder in _DATABASES:
            for path in (home / folder).rglob("*.db"):
                self._database(path)

    def report_urls(self, url: str) -> None:
        """Rewrites the addresses of drift reports in the request log."""
        if self.old == self.new:
            return
        from sqlalchemy import func, update

        from cv_platform.database.connection import make_engine
        from cv_platform.database.schema import drift_reports

        engine = make_engine(url, pool_size=1)
        column = drift_reports.c.report_url
        try:
            with engine.begin() as connection:
                for old in {self.old, Path(self.old).as_uri(), "file://" + quote(self.old), "file://" + self.old}:
                    new = self.text(old)
                    moved = func.concat(new, func.substr(column, len(old) + 1))
                    rows = func.starts_with(column, f"{old}/")
                    connection.execute(update(drift_reports).where(rows).values(report_url=moved))
        finally:
            engine.dispose()

    def _database(self, path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.create_function("relocated", 1, self.text, deterministic=True)
            database.execute("BEGIN IMMEDIATE")
            tables = database.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
            ).fetchall()
            for (table,) in tables:
                name = _quoted(table)
                for _, column, *_ in database.execute(f"PRAGMA table_info({name})").fetchall():
                    value = _quoted(column)
                    database.execute(
                        f"UPDATE {name} SET {value} = relocated({value}) "
                        f"WHERE typeof({value}) = 'text' AND relocated({value}) <> {value}"
                    )
            database.execute("COMMIT")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
