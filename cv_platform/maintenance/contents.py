"""What an embedded installation consists of, in the order in which it is copied while it works.

Names before what they name. Everything here is written the other way round (a bundle before its pointer and its row, a
git object before its tag) and never changed, so whatever a copied name refers to is there when its turn comes. Before
all of them the spool: an entry leaves it only once it is in the database, which is dumped next, so an entry that was
answered before the copy began is in one of the two; in both it does no harm, as draining is idempotent.

Left out, as it can be made again: checkouts (`worktrees`), `embeddings`, decoded pixels (`packed`), Bentos, caches,
logs, locks, the PostgreSQL data folder (its dump is there) and `dagster.yaml`, which every command writes anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from cv_platform.settings import Settings

SPOOL = "spool"
UNFINISHED = (".writing-*", ".*.partial-*", ".*.stale-*", ".*.scratch-*", "*.lock")
_SQLITE_SIDES = ("*-wal", "*-shm", "*-journal")


@dataclass(frozen=True)
class Part:
    """A folder of the installation.

    Attributes:
        folder: relative to CV_HOME.
        skip: patterns of names, or of paths relative to `folder`, that are left out with all below them.
        only: patterns of relative paths; none, all files.
        databases: suffix of the SQLite databases among the files.
    """

    folder: str
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    databases: str | None = None

    def files(self, home: Path) -> Iterator[tuple[PurePosixPath, Path]]:
        """Yields `(path relative to CV_HOME, path)` of each file, and of each folder without any, parents first."""
        root = home / self.folder
        for folder, folders, names in os.walk(root):
            here = Path(folder).relative_to(root)
            folders[:] = sorted(name for name in folders if not self._is_skipped(here / name))
            kept = [name for name in sorted(names) if not self._is_skipped(here / name)]
            paths = [here / name for name in kept if self._is_wanted(here / name)]
            if not (folders or kept or self.only):
                paths = [here]
            for path in paths:
                if not (root / path).is_symlink():
                    yield PurePosixPath(self.folder, path.as_posix()), root / path

    def is_database(self, path: PurePosixPath) -> bool:
        """Whether SQLite has to copy it."""
        return self.databases is not None and path.name.endswith(self.databases)

    def _is_skipped(self, relative: Path) -> bool:
        return any(fnmatchcase(relative.name, p) or fnmatchcase(relative.as_posix(), p) for p in self.skip)

    def _is_wanted(self, relative: Path) -> bool:
        return not self.only or any(fnmatchcase(relative.as_posix(), pattern) for pattern in self.only)


def spool_part() -> Part:
    """Returns the entries of the request log that have not reached the database."""
    return Part(SPOOL, skip=("*.lock", *_SQLITE_SIDES), databases=".sqlite")


def parts(settings: Settings) -> list[Part]:
    """Returns what is copied after the spool and the database."""
    found = [records_part()]
    storage = _below(settings.home, settings.storage_url)
    if storage is not None:
        found.append(pointers_part(storage))
    if settings.dagster_home == settings.home / "dagster":
        # What assets printed (`logs`) is large, and its texts are in the events.
        skip = ("logs", "dagster.yaml", ".dagster.yaml.*", "*.lock", *_SQLITE_SIDES)
        found.append(Part("dagster", skip=skip, databases=".db"))
    mlflow = (*UNFINISHED, *_SQLITE_SIDES)
    if embedded_mlflow(settings):
        found.append(Part("mlflow", skip=("artifacts", *mlflow), databases=".db"))
    if settings.evidently_url is None:
        found.append(Part("evidently"))
    found += training_parts()
    if storage is not None:
        found += stored_parts(storage)
    if embedded_mlflow(settings):
        found.append(Part("mlflow/artifacts", skip=UNFINISHED))
    return found


def records_part() -> Part:
    """Returns what the latest materialisations say."""
    return Part("records", skip=UNFINISHED)


def pointers_part(storage: str) -> Part:
    """Returns what each service serves; `storage` is central storage's folder."""
    # A worker's heartbeat says what runs now, which nothing of a backup does.
    return Part(f"{storage}/services", skip=("workers", *UNFINISHED))


def training_parts() -> list[Part]:
    """Returns the dataset repositories, and what trainings and evaluations have made."""
    cached = ("*/.git/objects", "*/.dvc/cache")
    return [
        Part("datasets", skip=("*/.dvc/tmp", *cached, *UNFINISHED)),
        Part("datasets", skip=("*/.dvc/tmp",), only=tuple(f"{pattern}/*" for pattern in cached)),
        *(Part(folder, skip=(".*",)) for folder in ("models", "evaluation", "validation", "production_metrics")),
    ]


def stored_parts(storage: str) -> list[Part]:
    """Returns what central storage keeps for good."""
    return [Part(f"{storage}/{folder}", skip=UNFINISHED) for folder in ("ref_data", "reports", "models")]


def elsewhere(settings: Settings) -> list[str]:
    """Names what other servers or folders hold, which have backups of their own."""
    found = []
    if settings.database_url is not None:
        found.append("the request log (DATABASE_URL)")
    if _below(settings.home, settings.storage_url) is None:
        found.append("central storage (CV_STORAGE)")
    if not embedded_mlflow(settings):
        found.append("MLflow (MLFLOW_TRACKING_URI)")
    if settings.dagster_home != settings.home / "dagster":
        found.append("Dagster (DAGSTER_HOME)")
    if settings.evidently_url is not None:
        found.append("Evidently (EVIDENTLY_URL)")
    return found


def embedded_mlflow(settings: Settings) -> bool:
    """Whether MLflow's runs and artifacts lie below CV_HOME."""
    return settings.mlflow_tracking_uri == f"sqlite:///{settings.home / 'mlflow' / 'mlflow.db'}"


def _below(home: Path, folder: str) -> str | None:
    path = Path(folder)
    if "://" in folder or not path.absolute().is_relative_to(home):
        return None
    return path.absolute().relative_to(home).as_posix()
