"""The audit log of central storage: who did what to production, when and why. Nothing here changes or deletes an entry.

One file per entry, `audit/<time>-<random>.json`, beside the bundles that it speaks of. It is written before the action:
what cannot be noted is not done. An action that then fails gets a second entry that says so. Who has overruled the gate
for a version stands in `overrides/<model_name>/<version>.json` too, where its bundle and deployment look.
"""

from __future__ import annotations

import os
import pwd
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cv_platform.errors import StorageError
from cv_platform.object_store import ObjectStore

BY_API = "the service's API, with CV_ADMIN_TOKEN"
"""As `by`, where the service knows of a person only the token."""
Action = Literal["promote", "take-over", "rollback", "return", "override", "delete", "accept", "loop", "probation"]


@dataclass(frozen=True)
class Note:
    """Who does something, and why; the reason may be empty where none was asked for."""

    by: str
    because: str = ""


class AuditEntry(BaseModel):
    """One action, or its failure."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    at_utc: datetime
    action: Action
    subject: str
    """What it was done to: a service and the version that it gets, a bundle, a prediction."""
    by: str
    because: str = ""
    failure: str | None = None
    """Why nothing came of the action that was noted before; None: this is the action."""


class AuditLog:
    """The audit log at one central storage.

    Args:
        url: of central storage.

    Raises:
        StorageError: (all methods) the storage cannot be reached or written, or holds an entry that is none.
    """

    def __init__(self, url: str | Path) -> None:
        self._store = ObjectStore(url)
        self._folder = self._store.path("audit")

    def write(self, action: Action, subject: str, note: Note, *, failure: str | None = None) -> AuditEntry:
        """Adds an entry, and returns it."""
        entry = AuditEntry(
            at_utc=datetime.now(UTC), action=action, subject=subject, by=note.by, because=note.because, failure=failure
        )
        name = f"{entry.at_utc:%Y%m%dT%H%M%S%fZ}-{secrets.token_hex(4)}.json"
        with self._store.errors(f"write the audit log about {subject}"):
            self._store.replace(f"{self._folder}/{name}", entry.model_dump_json(indent=1))
        return entry

    @contextmanager
    def noted(self, action: Action, subject: str, note: Note) -> Iterator[None]:
        """Adds an entry before the block, and a second one if it fails."""
        self.write(action, subject, note)
        try:
            yield
        except BaseException as err:
            self.write(action, subject, note, failure=f"{type(err).__name__}: {err}")
            raise

    def overrule(self, model_name: str, version: str, note: Note) -> None:
        """Lets a version be exported and deployed that has not passed its gate."""
        entry = self.write("override", f"{model_name} {version}", note)
        with self._store.errors(f"overrule the gate for {model_name} {version}"):
            self._store.replace(self._override(model_name, version), entry.model_dump_json(indent=1))

    def override(self, model_name: str, version: str) -> AuditEntry | None:
        """Returns who has overruled the gate for a version, and why; None where nobody has."""
        path = self._override(model_name, version)
        text = self._store.read(path)
        try:
            return None if text is None else AuditEntry.model_validate_json(text)
        except ValidationError as err:
            raise StorageError(f"{path}: expected an audit entry. Received: {err}") from err

    def _override(self, model_name: str, version: str) -> str:
        return self._store.path("overrides", model_name, f"{version}.json")

    def entries(self) -> list[AuditEntry]:
        """Lists all entries, oldest first."""
        with self._store.errors("read the audit log"):
            names = sorted(self._store.names(self._folder, "file"))
            texts = {name: self._store.read(f"{self._folder}/{name}") for name in names if name.endswith(".json")}
        try:
            return [AuditEntry.model_validate_json(text) for text in texts.values() if text is not None]
        except ValidationError as err:
            raise StorageError(f"{self._folder}: expected audit entries. Received: {err}") from err


def this_user() -> str:
    """Returns who runs this process, as `name@host`."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # In a container, whose user may have no name.
        name = f"uid {os.getuid()}"
    return f"{name}@{os.uname().nodename}"
