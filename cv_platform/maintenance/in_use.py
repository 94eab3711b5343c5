"""What an installation still refers to: never garbage, however old it is."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cv_platform.errors import BundleNotFoundError, StorageError
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

_VERSION = re.compile(r"[0-9]{8}[Tt][0-9]{6}[Zz]-[0-9a-f]{8}")
_RUN_ID = re.compile(r"\b[0-9a-f]{32}\b")


@dataclass(frozen=True)
class InUse:
    """References of an installation.

    Attributes:
        versions: of models: production and its predecessor of every service, what a worker runs or keeps as its last
            good one, and what the current records name.
        runs: MLflow runs of these versions, and of the records.
        texts: the current records: whatever is named in one is in use.
    """

    versions: frozenset[str]
    runs: frozenset[str]
    texts: tuple[str, ...]

    def names(self, name: str) -> bool:
        """Whether a record names it."""
        return any(name in text for text in self.texts)


def find_in_use(settings: Settings, storage: CentralStorage) -> InUse:
    """Reads all references.

    Raises:
        StorageError: a pointer is unreadable: nothing may be deleted then.
    """
    served = [reference for service in storage.service_names() for reference in _references(storage, service)]
    last_good = settings.home / "cache" / "last_good"
    if last_good.is_dir():
        kept = CentralStorage(last_good)
        served += [reference for service in kept.service_names() for reference in _references(kept, service)]
    texts = tuple(_read(path) for path in current_records(settings.home))
    versions = {version for _, version in served}
    # Bentos carry the version in lower case.
    versions |= {found.upper()[:16] + found[16:] for text in texts for found in _VERSION.findall(text)}
    runs = {found for text in texts for found in _RUN_ID.findall(text)}
    for model_name, version in served:
        try:
            run = storage.read_metadata(model_name, version).mlflow_run_id
        except BundleNotFoundError:
            continue  # Deleted by hand: its last good copy serves.
        runs |= {run} if run else set()
    return InUse(frozenset(versions), frozenset(runs), texts)


def current_records(home: Path) -> list[Path]:
    """Lists the latest record of each asset, and those that an experiment's latest deployment was made from.

    Raises:
        StorageError: the record of a deployment is unreadable.
    """
    found = sorted(home.glob("records/*/[!.]*.json"))
    for deployment in [path for path in found if path.stem == "deployment"]:
        try:
            made_from = json.loads(_read(deployment)).get("made_from", {})
            used = [deployment.parent / asset / f"{version}.json" for asset, version in made_from.items()]
        except (ValueError, AttributeError) as err:
            raise StorageError(f"{deployment}: expected a record. Received: {err}. Materialise it again.") from err
        found += [path for path in used if path.is_file()]
    return found


def _references(storage: CentralStorage, service: str) -> list[tuple[str, str]]:
    pointer = storage.read_pointer(service)
    found: list[tuple[str | None, str | None]] = [
        (beat.model_name, beat.version) for beat in storage.read_heartbeats(service)
    ]
    if pointer is not None:
        found += pointer.references
    return [(model_name, version) for model_name, version in found if model_name and version]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise StorageError(f"{path}: expected a record. Received: {err}. Materialise its asset again.") from err
