"""Makes a restored or moved installation name its new folder: in records, MLflow's and Dagster's SQLite, report URLs.

Bundles in central storage name no folder, so their checksums keep holding.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import func, update

from cv_platform.database.connection import make_engine
from cv_platform.database.schema import drift_reports
from cv_platform.files import whole_file

_RECORDS = ("records", "models", "evaluation", "validation", "production_metrics")
_DATABASES = ("mlflow", "dagster")


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
        for folder in _RECORDS:
            for path in (home / folder).rglob("*.json"):
                text = path.read_text(encoding="utf-8")
                if (changed := self.text(text)) != text:
                    with whole_file(path) as partial:
                        partial.write_text(changed, encoding="utf-8")
                        shutil.copymode(path, partial)
        for folder in _DATABASES:
            for path in (home / folder).rglob("*.db"):
                self._database(path)

    def report_urls(self, url: str) -> None:
        """Rewrites the addresses of drift reports in the request log."""
        if self.old == self.new:
            return
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
