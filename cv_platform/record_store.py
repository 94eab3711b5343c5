"""Keeps the records of one experiment by version, below `$CV_HOME/records/<experiment>/`:

    <asset>/<version>.json    a record, never changed; its version is when it was written, and the run that wrote it
    <asset>.json              a copy of the latest, for people, and for programs that want no other
    runs/<run>.json           what was the latest of each asset when a run first looked

A run reads what it wrote itself, and else what was the latest when it first looked: another run of the experiment
cannot swap a record under it. A retry belongs to the run that it goes on with, and sees what that one saw.

Release 0.1 kept `<asset>.json` alone. Such a record counts as version `0.1` and is converted when it is read.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from cv_platform.errors import StorageError
from cv_platform.files import exclusive, write_file
from cv_platform.records import RECORDS, Record
from cv_platform.records_0_1 import FIRST_RELEASE, from_first_release

_R = TypeVar("_R", bound=Record)
RUNS = "runs"
"""Folder of what runs saw, beside those of the assets."""
_TIME = "%Y%m%dT%H%M%S%fZ"


class RecordStore:
    """The records of one experiment.

    Args:
        home: `CV_HOME`.
        experiment: its name.

    Raises:
        StorageError: (all methods) a record is missing, or is none of this release or the one before.
    """

    def __init__(self, home: Path, experiment: str) -> None:
        self.home = home
        self.experiment = experiment
        self.folder = home / "records" / experiment

    def write(self, asset: str, record: Record, *, run_id: str) -> str:
        """Keeps a record, and returns its version, which is later than all others of the asset."""
        self.seen(run_id)
        text = record.model_dump_json(indent=2, context={"home": self.home})
        latest, folder = self.folder / f"{asset}.json", self.folder / asset
        with exclusive(self.folder / ".lock"):
            versions = self._versions(asset)
            if FIRST_RELEASE in versions and not (first := folder / f"{FIRST_RELEASE}.json").exists():
                write_file(first, latest.read_bytes())
            version = f"{_later(versions):{_TIME}}-{run_id[:8]}"
            for path in (folder / f"{version}.json", latest):  # Then the latest is never one that has no version.
                write_file(path, text)
        return version

    def seen(self, run_id: str) -> dict[str, str]:
        """Returns what was the latest version of each asset when the run first looked, which is now or before."""
        path = self.folder / RUNS / f"{run_id}.json"
        try:
            return json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            latest = {copy.stem: self._versions(copy.stem)[-1] for copy in self.folder.glob("[!.]*.json")}
            write_file(path, json.dumps(latest))
            return latest

    def version_for(self, asset: str, *, run_id: str) -> str | None:
        """Returns the version that a run has to read; None where there is none."""
        own = [version for version in self._versions(asset) if version.endswith(f"-{run_id[:8]}")]
        return own[-1] if own else self.seen(run_id).get(asset)

    def read(self, asset: str, kind: type[_R], version: str) -> _R:
        """Reads one version of an asset's record; its files are those below the home at hand."""
        content = json.dumps(self._content(asset, version))
        try:
            return kind.model_validate_json(content, context={"home": self.home})
        except ValidationError as err:
            raise self._unreadable(asset, err) from err

    def latest(self, kind: type[_R]) -> _R | None:
        """Reads the latest record of a kind; None where there is none."""
        asset = next(asset for asset, known in RECORDS.items() if known is kind)
        versions = self._versions(asset)
        return self.read(asset, kind, versions[-1]) if versions else None

    def made_from(self, assets: list[str], *, run_id: str) -> dict[str, str]:
        """Returns the versions of these assets that the run reads, and of all that those were made from."""
        direct = {asset: version for asset in assets if (version := self.version_for(asset, run_id=run_id))}
        further: dict[str, str] = {}
        for asset, version in direct.items():
            further |= self._content(asset, version).get("made_from", {})
        return further | direct

    def _versions(self, asset: str) -> list[str]:
        """Lists the versions, oldest first."""
        versions = sorted(path.stem for path in (self.folder / asset).glob("[!.]*.json"))
        return versions or ([FIRST_RELEASE] if (self.folder / f"{asset}.json").is_file() else [])

    def _content(self, asset: str, version: str) -> dict[str, Any]:
        path = self.folder / asset / f"{version}.json"
        is_first = version == FIRST_RELEASE
        if is_first and not path.is_file():
            path = self.folder / f"{asset}.json"
        try:
            content = json.loads(path.read_bytes())
            return from_first_release(asset, content, self.folder) if is_first else dict(content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
            raise self._unreadable(asset, err) from err

    def _unreadable(self, asset: str, err: Exception) -> StorageError:
        name = f"{self.experiment}/{asset}"
        return StorageError(f"Expected a record of {name} of this release. Received: {err}. Materialise {name} again.")


def record_stores(home: Path) -> list[RecordStore]:
    """Opens the records of every experiment that has some."""
    return [RecordStore(home, folder.name) for folder in sorted((home / "records").glob("*")) if folder.is_dir()]


def _later(versions: list[str]) -> datetime:
    """Returns the time, or a moment after the last version's where the clock was set back since."""
    now = datetime.now(UTC)
    if not versions or versions[-1] == FIRST_RELEASE:
        return now
    last = datetime.strptime(versions[-1].partition("-")[0], _TIME).replace(tzinfo=UTC)
    return max(now, last + timedelta(microseconds=1))
