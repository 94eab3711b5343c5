"""Finds what an installation does not need any more, and deletes it.

Garbage is what nothing refers to (`in_use.py`), is older than `CV_GC_KEEP_DAYS`, and of models is none of the newest
`CV_GC_KEEP_VERSIONS` versions. While Dagster has an unfinished run, whatever a run may read is kept, whoever refers to
it: such runs are told apart by Dagster alone, so the caller asks it.

A folder is renamed before it is emptied, under the lock of those who make it: whoever is killed meanwhile leaves a name
that nobody reads, and that the next collection removes.
"""

from __future__ import annotations

import functools
import logging
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cv_platform.audit import AuditLog, Note, this_user
from cv_platform.datasets.publishing import Unneeded, find_unneeded
from cv_platform.errors import LockHeldError
from cv_platform.files import exclusive
from cv_platform.maintenance.backup import maintenance_lock
from cv_platform.maintenance.contents import embedded_mlflow
from cv_platform.maintenance.in_use import InUse, current_records, find_in_use
from cv_platform.maintenance.mlflow_runs import run_artifacts
from cv_platform.record_store import RUNS
from cv_platform.serving.model.promotion import PROMOTION_LOCK
from cv_platform.settings import Settings
from cv_platform.storage import VERSION_PATTERN, CentralStorage

logger = logging.getLogger(__name__)

_DAY_SECONDS = 86_400
_DELETING = ".deleting-"
_SWEPT = (
    *("worktrees/*", "embeddings/*", "packed", "models/*", "evaluation/*", "validation/*", "mlflow/artifacts/*"),
    *("bentoml/bentos/*", "cache/*", "cache/ref_data/*", "dagster/logs"),
)
"""Folders whose content is deleted piece by piece."""
_BENTO_VERSION = re.compile(r"^([0-9]{8}t[0-9]{6}z-[0-9a-f]{8})(-[0-9]+)?$")


@dataclass(frozen=True)
class Item:
    """Something that nobody needs.

    Attributes:
        name: path relative to CV_HOME, or the bundle's name.
        bytes: size of its files; what they share with others is not freed.
        reason: for people.
        delete: removes it, unless somebody works on it; returns whether it did.
    """

    name: str
    bytes: int
    reason: str
    delete: Callable[[], bool] = field(compare=False)


@dataclass(frozen=True)
class Garbage:
    """What can be deleted.

    Attributes:
        items: each thing.
        kept: what was not looked at, with the reason.
        unfinished_runs: as they were given.
        now: seconds since 1970 from which ages were counted.
    """

    items: list[Item]
    kept: list[str]
    unfinished_runs: Sequence[str]
    now: float


def find_garbage(settings: Settings, *, unfinished_runs: Sequence[str], now: float | None = None) -> Garbage:
    """Lists what can be deleted; changes nothing.

    Args:
        settings: the installation, and how much is kept.
        unfinished_runs: Dagster runs that have not ended.
        now: seconds since 1970; None: the clock.

    Raises:
        StorageError: a pointer or record is unreadable, so nobody can say what is in use.
        TrackingError: MLflow's database cannot be read, or is not that of the artifacts.
    """
    now = time.time() if now is None else now
    search = _Search(settings, CentralStorage(settings.storage_url), now)
    items = [*search.interrupted_deletions(), *search.logs(), *search.downloads()]
    kept = []
    if unfinished_runs:
        kept.append(
            f"what runs may read, as Dagster holds {len(unfinished_runs)} for unfinished: "
            f"{', '.join(unfinished_runs[:3])}. Wait for them, or terminate what is dead on Dagster's page."
        )
    else:
        items += [*search.data(), *search.records(), *search.trainings(), *search.bundles(), *search.bentos()]
        sent, unreadable = search.sent_images()
        items += sent
        kept += unreadable
        if search.artifacts is not None:
            items += search.mlflow_artifacts(search.artifacts)
        else:
            kept.append("MLflow's artifacts: a server has them (`mlflow gc` there).")
    return Garbage(items, kept, unfinished_runs, now)


def collect(settings: Settings, garbage: Garbage) -> list[Item]:
    """Deletes what is in `garbage` and still is garbage, and returns it; safe to repeat, and to kill.

    Raises:
        LockHeldError: a backup, a restoration or a promotion is under way.
        StorageError, TrackingError: see `find_garbage`; or central storage cannot be changed.
    """
    shown = {item.name for item in garbage.items}
    cache = settings.home / "cache"
    deleted = []
    with (
        exclusive(maintenance_lock(settings.home), timeout_seconds=0.0),
        exclusive(cache / PROMOTION_LOCK, timeout_seconds=0.0),
    ):
        # Again, now that nothing can be promoted any more: what was shown may be in use by now.
        fresh = find_garbage(settings, unfinished_runs=garbage.unfinished_runs, now=garbage.now)
        for item in fresh.items:
            if item.name not in shown:
                continue
            if item.delete():
                deleted.append(item)
            else:
                logger.info("kept, as somebody works on it: %s", item.name)
    return deleted


class _Search:
    """One look at an installation."""

    def __init__(self, settings: Settings, storage: CentralStorage, now: float) -> None:
        self._home = settings.home
        self._settings = settings
        self._storage = storage
        self._oldest_kept = now - settings.gc_keep_days * _DAY_SECONDS
        self._in_use: InUse = find_in_use(settings, storage)
        # MLflow's: below CV_HOME, or those of a server that are mounted here.
        self.artifacts = self._home / "mlflow" / "artifacts" if embedded_mlflow(settings) else settings.mlflow_artifacts

    def interrupted_deletions(self) -> Iterator[Item]:
        found = [path for folder in _SWEPT for path in sorted(self._home.glob(f"{folder}/.*{_DELETING}*"))]
        if self.artifacts is not None and not self.artifacts.is_relative_to(self._home):
            found += sorted(self.artifacts.glob(f"*/.*{_DELETING}*"))
        for path in found:
            delete = functools.partial(_empty, path)
            yield Item(self._name(path), _bytes(path), "left by a killed deletion", delete)

    def logs(self) -> Iterator[Item]:
        """Logs that nobody appends to: of single runs, and what supervisord has put aside."""
        for pattern in ("logs/run-*.log", "logs/demo-*.log", "logs/*.log.*", "postgres/*.log.*"):
            for path in sorted(self._home.glob(pattern)):
                if self._is_old(path):
                    yield Item(self._name(path), path.stat().st_size, "an old log", functools.partial(_unlink, path))
        for folder in self._folders("dagster/logs/*"):
            yield self._folder(folder, "what an old run printed")

    def downloads(self) -> Iterator[Item]:
        """Copies of what a storage server has."""
        skipped = {"last_good", "ref_data", "drift_reports", "embeddings"}
        for folder in self._folders("cache/*/*"):
            if folder.parent.name not in skipped and folder.name not in self._in_use.versions:
                yield self._folder(folder, "a download of a version that is not served")
        for folder in self._folders("cache/ref_data/*/*"):
            if folder.name not in self._in_use.versions:
                yield self._folder(folder, "a download of old reference data")

    def data(self) -> Iterator[Item]:
        """Checkouts, what is computed of their images, and validation reports, that no record names."""
        for pattern, reason in (
            ("worktrees/*/*", "a checkout that no record names"),
            ("embeddings/*/*", "embeddings that no record names"),
            ("cache/embeddings/*", "embeddings by an encoder that no record names"),
            ("packed/*", "decoded images that no record names"),
            ("validation/*/*", "a report that no record names"),
        ):
            for folder in self._folders(pattern):
                if not self._in_use.names(folder.name):
                    yield self._folder(folder, reason, lock=folder.with_name(f".{folder.name}.lock"))
        for pattern, mark, work in (("packed/.*", ".partial-", "packing"), ("datasets/.*", ".scratch-", "import")):
            for folder in sorted(path for path in self._home.glob(f"{pattern}{mark}*") if self._is_old(path)):
                lock = folder.with_name(f"{folder.name.partition(mark)[0]}.lock")
                yield self._folder(folder, f"left by a killed {work}", lock=lock)

    def records(self) -> Iterator[Item]:
        """Versions of records, and notes of what runs saw, that nobody reads any more."""
        current = set(current_records(self._home))
        for folder in sorted(path for path in self._home.glob("records/*/*") if path.is_dir()):
            kept = 0 if folder.name == RUNS else self._settings.gc_keep_versions
            paths = sorted(folder.glob("[!.]*.json"))
            for path in paths[: len(paths) - kept]:
                if path not in current and self._is_old(path):
                    reason = "an old version of a record" if kept else "a note of an old run"
                    yield Item(self._name(path), path.stat().st_size, reason, functools.partial(_unlink, path))

    def trainings(self) -> Iterator[Item]:
        """Outputs of trainings and evaluations, and what killed trainings have left."""
        for kind in ("models", "evaluation"):
            for parent in sorted((self._home / kind).glob("*")):
                versions = [path.name for path in parent.glob("*") if re.match(VERSION_PATTERN, path.name)]
                for version in self._unneeded(versions):
                    if self._is_old(parent / version):
                        yield self._folder(parent / version, "an old version that nothing refers to")
        for pattern in ("models/*/.training-*", "models/*/.*.partial-*", "models/*/.writing-*"):
            for folder in sorted(path for path in self._home.glob(pattern) if path.is_dir() and self._is_old(path)):
                yield self._folder(folder, "left by a killed training", lock=folder.with_name(f"{folder.name}.lock"))

    def bundles(self) -> Iterator[Item]:
        """Versions in central storage; their age is in their names."""
        stored = self._storage.stored_bundles()
        for model in sorted({model for model, _ in stored}):
            complete = self._storage.bundle_versions(model)
            unfinished = [v for m, v in stored if m == model and v not in complete and v not in self._in_use.versions]
            for version in [*self._unneeded(complete), *unfinished]:
                if re.match(VERSION_PATTERN, version) and _version_seconds(version) < self._oldest_kept:
                    reason = "an unfinished publication" if version in unfinished else "a version that is not served"
                    yield Item(
                        f"bundle {model} {version}",
                        stored[model, version],
                        reason,
                        functools.partial(_delete_bundle, self._storage, model, version),
                    )

    def sent_images(self) -> tuple[list[Item], list[str]]:
        """Images in central storage of versions that no record names, and that no installation has used for long.

        Returns:
            Them; and of which datasets nobody can tell, with the reason.
        """

        def is_needed(dvc_md5: str, used_utc: datetime) -> bool:
            return used_utc.timestamp() >= self._oldest_kept or self._in_use.names(dvc_md5)

        def item(found: Unneeded) -> Item:
            return Item(
                f"images of {found.ds_name} in central storage",
                found.bytes,
                "sent to nodes, of versions that no record names",
                functools.partial(_remove_sent, self._storage.url, found.ds_name, is_needed),
            )

        unneeded, unreadable = find_unneeded(self._storage.url, is_needed)
        return [item(found) for found in unneeded], unreadable

    def bentos(self) -> Iterator[Item]:
        for parent in sorted((self._home / "bentoml" / "bentos").glob("*")):
            builds = {path: match for path in parent.glob("*") if (match := _BENTO_VERSION.match(path.name))}
            needless = set(self._unneeded([_as_version(match[1]) for match in builds.values()]))
            for path, match in sorted(builds.items()):
                if _as_version(match[1]) in needless and self._is_old(path):
                    yield self._folder(path, "a Bento of an old version")

    def mlflow_artifacts(self, artifacts: Path) -> Iterator[Item]:
        """Files of deleted and old runs; their parameters and metrics stay in MLflow."""
        newer: Counter[tuple[str, str]] = Counter()
        for run in run_artifacts(self._settings.mlflow_tracking_uri, artifacts):
            is_kept = not run.is_deleted and newer[run.series] < self._settings.gc_keep_versions
            newer[run.series] += not run.is_deleted
            if is_kept or run.run_id in self._in_use.runs or run.started_ms / 1000 >= self._oldest_kept:
                continue
            yield self._folder(run.folder, f"files of {'a deleted' if run.is_deleted else 'an old'} MLflow run")

    def _unneeded(self, versions: list[str]) -> list[str]:
        """Returns the versions, oldest first, without the newest ones and those in use."""
        ordered = sorted(set(versions))
        return [v for v in ordered[: -self._settings.gc_keep_versions] if v not in self._in_use.versions]

    def _folders(self, pattern: str) -> list[Path]:
        """Returns old folders; hidden ones are somebody's unfinished work."""
        found = (path for path in self._home.glob(pattern) if path.is_dir() and not path.name.startswith("."))
        return sorted(path for path in found if self._is_old(path))

    def _folder(self, path: Path, reason: str, *, lock: Path | None = None) -> Item:
        return Item(self._name(path), _bytes(path), reason, functools.partial(_delete_folder, path, lock))

    def _is_old(self, path: Path) -> bool:
        return path.stat().st_mtime < self._oldest_kept

    def _name(self, path: Path) -> str:
        if path.is_relative_to(self._home) or self.artifacts is None:
            return path.relative_to(self._home).as_posix()
        return f"mlflow/{path.relative_to(self.artifacts).as_posix()}"


def _delete_bundle(storage: CentralStorage, model: str, version: str) -> bool:
    def is_served() -> bool:  # By another host's promotion, which no lock of this one keeps out.
        pointers = [storage.read_pointer(service) for service in storage.service_names()]
        return any((model, version) in pointer.references for pointer in pointers if pointer)

    note = Note(this_user(), "garbage: nothing refers to it")
    with AuditLog(storage.url).noted("delete", f"bundle {model} {version}", note):
        return storage.delete_bundle(model, version, is_wanted=is_served)


def _remove_sent(url: str, ds_name: str, is_needed: Callable[[str, datetime], bool]) -> bool:
    for found in find_unneeded(url, is_needed)[0]:  # Again: by now another host may have sent some.
        if found.ds_name == ds_name:
            found.remove(url)
    return True


def _delete_folder(path: Path, lock_path: Path | None) -> bool:
    if lock_path is None:
        return _rename_and_empty(path)
    try:
        with exclusive(lock_path, timeout_seconds=0.0):
            return _rename_and_empty(path)
    except LockHeldError:
        return False


def _rename_and_empty(path: Path) -> bool:
    aside = path.with_name(f".{path.name}{_DELETING}{secrets.token_hex(4)}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return False
    return _empty(aside)


def _empty(path: Path) -> bool:
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def _unlink(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _version_seconds(version: str) -> float:
    return datetime.strptime(version[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _as_version(bento_version: str) -> str:
    return bento_version[:16].upper() + bento_version[16:]
