"""Central storage: immutable model bundles, the production pointer, worker heartbeats, reference data and reports.

A folder or any fsspec URL (`s3://bucket/prefix` with the `s3` extra). Layout:

    models/<model_name>/<version>/<model_name>.yaml      written last: a bundle without it does not exist
    services/<service>/production.json                   the pointer: which version a service serves
    services/<service>/workers/<worker_id>.json          what each worker runs, refreshed as it lives
    services/<service>/probation/<worker>.json           what each has seen of a challenger that the pointer names
    ref_data/<model_name>/<version>/<model_name>_ref_data.parquet
    reports/<name>/<report_id>/…
    audit/<time>-<random>.json                           who did what, when and why (`audit`)
    shards/<pack>/…, images/<ds_name>/…                  what installations and machines share (`datasets`)

Bundles are never overwritten; pointer, heartbeats, reference data and reports are replaced file by file, each in one
step (`object_store`). A process that dies while it publishes leaves a folder without metadata, which no reader sees.
The pointer moves by compare-and-set, so that of two hosts that move it at once neither undoes the other's move.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from cv_platform.config import ClassifierType, Threshold
from cv_platform.errors import (
    BundleExistsError,
    BundleNotFoundError,
    CorruptBundleError,
    PointerMovedError,
    StorageError,
)
from cv_platform.files import file_sha256, require_free_space, whole_file
from cv_platform.object_store import ObjectStore
from cv_platform.probation import Probation, Tally, WorkerTally

FORMAT_VERSION = 2
# LibYAML, where the wheel has it, reads the same a dozen times as fast; a start waits for the metadata.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MODEL_PATHS = {"tensorflow": "saved_model", "onnx": "model.onnx"}
"""Where a bundle keeps its exported model, by the runtime in its metadata: a SavedModel's folder, or an ONNX file."""
VERSION_PATTERN = r"^[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}$"


def new_version(now: datetime | None = None) -> str:
    """Returns a fresh version such as `20260131T060000Z-1f3c9a2e`: sorted by time, unique by its random tail."""
    return f"{(now or datetime.now(UTC)).astimezone(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class BundleMetadata(_Record):
    """What a bundle is and where it came from: `<model_name>.yaml`."""

    format_version: int = FORMAT_VERSION
    model_name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")
    version: str = Field(pattern=VERSION_PATTERN)
    created_utc: datetime
    runtime: Literal["tensorflow", "onnx"] = "tensorflow"
    runtime_reason: str = Field(default="", description="why that runtime was chosen")
    parity: dict[str, float] = Field(
        default_factory=dict, description="differences of the ONNX graph from the gradient tape on the golden images"
    )
    classifier_type: ClassifierType
    class_names: tuple[str, ...]
    image_size: tuple[int, int] = Field(description="(height, width) in pixels")
    threshold: Threshold = Field(default=0.5, description="multi-label only; of all classes, or of each")
    temperature: float = Field(
        default=1.0, description="what the logits are divided by, in the weights: nothing has to apply it"
    )
    uae_dims: int
    feature_dims: int
    preprocessing_hash: str
    encoder_hash: str
    ds_name: str = Field(validation_alias=AliasChoices("ds_name", "dataset_name"), description="format 1: dataset_name")
    dvc_tag: str
    dvc_md5: str
    git_commit: str | None = None
    mlflow_run_id: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    effective_config: dict[str, Any] = Field(default_factory=dict)
    checksums: dict[str, str] = Field(default_factory=dict, description="sha256 of each file, by relative POSIX path")

    @property
    def experiment(self) -> str | None:
        """Name of the experiment that trained it; None where its config was not kept."""
        name = self.effective_config.get("name")
        return name if isinstance(name, str) else None


_R = TypeVar("_R", bound=BaseModel)


class PointerMove(_Record):
    """One move of a pointer: to what, by whom, when and why."""

    model_name: str
    version: str
    since_utc: datetime
    action: str = ""
    by: str = ""
    because: str = ""


class ProductionPointer(_Record):
    """Which version a service serves: `production.json`."""

    model_name: str
    version: str
    previous_model_name: str | None = None
    previous_version: str | None = None
    since_utc: datetime
    experiment: str | None = Field(
        default=None, description="whose model it is; none in old pointers: the metadata of the bundle name it there"
    )
    history: tuple[PointerMove, ...] = Field(
        default=(), description="the latest moves and probations, the last one first; the audit log has all"
    )
    probation: Probation | None = Field(
        default=None, description="the challenger that is tried out on live traffic, or the last one that was"
    )

    @property
    def references(self) -> tuple[tuple[str | None, str | None], ...]:
        """Model and version of all that may have to be loaded: now, for a rollback, on probation."""
        tried = self.probation if self.probation and self.probation.is_running else None
        return (
            (self.model_name, self.version),
            (self.previous_model_name, self.previous_version),
            *([(tried.model_name, tried.version)] if tried else []),
        )


class WorkerHeartbeat(_Record):
    """What one worker of a service runs."""

    worker_id: str
    public_id: str = Field(
        default="", description="what strangers read instead: the worker's id names its host and process"
    )
    model_name: str | None = None
    version: str | None = None
    beat_utc: datetime
    last_swap_error: str | None = Field(
        default=None, description="why the worker did not take the version that the pointer names"
    )
    failed_version: str | None = None
    failed_pointer_utc: datetime | None = Field(
        default=None, description="`since_utc` of the pointer whose version failed"
    )


class AcceptedReference(_Record):
    """A window that somebody has taken as the new normal of a model version: what its requests are compared with."""

    report_id: str = Field(pattern=r"^[0-9a-f-]{36}$")
    rows: int
    window_start_utc: datetime
    window_end_utc: datetime
    at_utc: datetime
    by: str
    because: str
    forgotten: int = Field(default=0, description="rows that left it, as their predictions were deleted")

    @property
    def file(self) -> str:
        """Its rows; another name after each deletion, so that no copy of the former ones is read."""
        return f"{self.report_id}{f'.{self.forgotten}' if self.forgotten else ''}.parquet"

    def told(self) -> str:
        """Returns it in words."""
        window = f"{self.window_start_utc:%Y-%m-%d %H:%M} to {self.window_end_utc:%Y-%m-%d %H:%M} UTC"
        return f"{self.rows} requests of {window}, taken as normal by {self.by}: {self.because}"


class CentralStorage:
    """Reads and writes central storage at one URL.

    Args:
        url: a folder, or a URL that fsspec knows.

    Raises:
        StorageError: (all methods) the storage cannot be reached or written.
    """

    def __init__(self, url: str | Path) -> None:
        self._store = ObjectStore(url)
        self.url, self.is_local = self._store.url, self._store.is_local

    def has_anything(self) -> bool:
        """Tells whether there is anything at all, now: a folder that is not mounted is empty, or none."""
        return self._store.has_anything()

    # Bundles

    def publish_bundle(self, directory: Path, metadata: BundleMetadata) -> BundleMetadata:
        """Publishes `directory` as a bundle and returns its metadata, with the checksums of its files.

        Raises:
            BundleExistsError: that version is published already.
            CorruptBundleError: the exported model that the metadata's runtime needs is not in `directory`.
        """
        target = self._bundle(metadata.model_name, metadata.version)
        name = f"{metadata.model_name}.yaml"
        files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != name)
        sums = {path.relative_to(directory).as_posix(): file_sha256(path) for path in files}
        complete = metadata.model_copy(update={"checksums": sums})
        model = MODEL_PATHS[metadata.runtime]
        if not any(relative == model or relative.startswith(f"{model}/") for relative in sums):
            raise CorruptBundleError(
                f"{metadata.model_name} {metadata.version}: expected {model}, which the runtime {metadata.runtime} "
                f"needs. Received: {', '.join(sums) or 'no files'}. Name the runtime that the export returned."
            )
        with self._store.errors(f"publish {metadata.model_name} {metadata.version}"):
            if self._store.exists(f"{target}/{name}"):
                raise BundleExistsError(
                    f"Expected a new version. Received: {metadata.model_name} {metadata.version}, which is published. "
                    "Export again: it gets a version of its own."
                )
            # Before the metadata: else a power cut could leave some that vouch for empty files.
            self._store.upload(directory, list(sums), target)
            text = yaml.safe_dump(complete.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
            self._store.replace(f"{target}/{name}", text)
        return complete

    def bundle_url(self, model_name: str, version: str) -> str:
        """Returns where a bundle's folder is, or would be."""
        return self._store.url_of(self._bundle(model_name, version))

    def bundle_versions(self, model_name: str) -> list[str]:
        """Lists a model's published versions, oldest first."""
        base = self._store.path("models", model_name)
        with self._store.errors(f"list the versions of {model_name}"):
            versions = self._store.names(base, "directory")
            return [version for version in versions if self._store.exists(f"{base}/{version}/{model_name}.yaml")]

    def read_metadata(self, model_name: str, version: str) -> BundleMetadata:
        """Reads a bundle's metadata.

        Raises:
            BundleNotFoundError: there is no such version.
            CorruptBundleError: the metadata are not what this version of the format says.
        """
        path = f"{self._bundle(model_name, version)}/{model_name}.yaml"
        text = self._store.read(path)
        if text is None:
            versions = self.bundle_versions(model_name)
            raise BundleNotFoundError(
                f"Expected a published version of {model_name}. Received: {version}. "
                f"Published: {', '.join(versions[-10:]) or 'none; materialise its bento first'}."
            )
        try:
            metadata = BundleMetadata.model_validate(yaml.load(text, _YAML_LOADER))
        except (yaml.YAMLError, ValueError) as err:
            raise CorruptBundleError(
                f"{path}: expected bundle metadata of format {FORMAT_VERSION}. Received: {err}"
            ) from err
        if metadata.format_version > FORMAT_VERSION:
            raise CorruptBundleError(
                f"{path}: expected format {FORMAT_VERSION} or older. Received: {metadata.format_version}. Update."
            )
        if (metadata.model_name, metadata.version) != (model_name, version):
            raise CorruptBundleError(
                f"{path}: expected {model_name} {version}. Received: {metadata.model_name} {metadata.version}."
            )
        return metadata

    def fetch_bundle(self, model_name: str, version: str, cache: Path) -> tuple[Path, BundleMetadata]:
        """Returns a local folder with a bundle's files, all checksums verified, and its metadata.

        Local storage is read in place; anything else is downloaded into `cache` once.

        Raises:
            BundleNotFoundError: there is no such version.
            CorruptBundleError: a file is missing or differs from its checksum.
            DiskSpaceError: a download would fill the disk.
        """
        metadata = self.read_metadata(model_name, version)
        source = self._bundle(model_name, version)
        folder = Path(source) if self.is_local else cache / model_name / version
        if not self.is_local and not (folder / ".complete").exists():
            with self._store.errors(f"fetch {model_name} {version}"):
                shutil.rmtree(folder, ignore_errors=True)
                purpose = f"a copy of {model_name} {version}"
                require_free_space(cache, self._store.size_bytes(source), purpose=purpose)
                for relative in metadata.checksums:
                    self._store.download(f"{source}/{relative}", folder / relative)
                (folder / ".complete").touch()
        wrong = [
            relative
            for relative, expected in metadata.checksums.items()
            if not (folder / relative).is_file() or file_sha256(folder / relative) != expected
        ]
        if wrong:
            if not self.is_local:
                shutil.rmtree(folder, ignore_errors=True)
            raise CorruptBundleError(
                f"{model_name} {version}: expected the published files. Missing or changed: {', '.join(wrong[:5])}. "
                f"Restore {self._store.url_of(source)} from a backup, or remove it and materialise the bento again."
            )
        return folder, metadata

    # What is there, whole or not, and its deletion

    def service_names(self) -> list[str]:
        """Lists the services that have a pointer or workers."""
        return self._folder_names("services")

    def stored_bundles(self) -> dict[tuple[str, str], int]:
        """Returns the bytes of each `(model_name, version)` there, the unfinished ones included."""
        with self._store.errors("measure the bundles"):
            return {
                (model, version): self._store.size_bytes(self._bundle(model, version))
                for model in self._folder_names("models")
                for version in self._folder_names("models", model)
            }

    def delete_bundle(self, model_name: str, version: str, *, is_wanted: Callable[[], bool] = lambda: False) -> bool:
        """Deletes a version and its reference data, and returns whether it did.

        The metadata go first, so that no reader ever sees half of it. Then `is_wanted` is asked, and if it is, they
        come back: a host that promotes the version meanwhile is seen here, or sees that the version is gone.
        """
        bundle = self._bundle(model_name, version)
        metadata = f"{bundle}/{model_name}.yaml"
        with self._store.errors(f"delete {model_name} {version}"):
            text = self._store.read(metadata)
            if text is not None:
                self._store.remove(metadata)
                is_gone = False
                try:
                    is_gone = not is_wanted()
                finally:
                    if not is_gone:
                        self._store.replace(metadata, text)
                if not is_gone:
                    return False
            for path in (bundle, self._store.path("ref_data", model_name, version)):
                self._store.remove(path)
        return True

    # The production pointer and the workers

    def read_pointer(self, service: str) -> ProductionPointer | None:
        """Returns what `service` should serve, or None before the first deployment.

        Raises:
            StorageError: the pointer is unreadable.
        """
        path = self._pointer(service)
        return _parsed(ProductionPointer, path, self._store.read(path))

    def production(self, service: str, model_name: str) -> BundleMetadata | None:
        """Returns the metadata of the version of `model_name` that `service` serves; None when it serves none of it.

        Raises:
            StorageError: the pointer or the metadata are unreadable.
        """
        pointer = self.read_pointer(service)
        if pointer is None or pointer.model_name != model_name:
            return None
        return self.read_metadata(model_name, pointer.version)

    def write_pointer(self, service: str, pointer: ProductionPointer) -> None:
        """Moves the production pointer in one step, wherever it is: for folders that nobody else writes."""
        with self._store.errors(f"move the production pointer of {service}"):
            self._store.replace(self._pointer(service), pointer.model_dump_json(indent=2))

    def swap_pointer(self, service: str, expected: ProductionPointer | None, new: ProductionPointer | None) -> None:
        """Moves the production pointer from `expected` to `new` in one step; None: no pointer, as before a deployment.

        Raises:
            PointerMovedError: it is elsewhere: somebody has moved it since it was read. Nothing was changed.
        """
        path = self._pointer(service)

        def moved(text: str | None) -> str | None:
            current = _parsed(ProductionPointer, path, text)
            if current == new:
                return text  # Also when the driver has sent a request again whose answer was lost.
            if current != expected:
                raise PointerMovedError(
                    f"Expected the production pointer of {service} at {_title(expected)}. Received: "
                    f"{_title(current)}, as somebody has moved it. Look at what it serves first."
                )
            return None if new is None else new.model_dump_json(indent=2)

        with self._store.errors(f"move the production pointer of {service}"):
            if not self._store.update(path, moved):
                raise PointerMovedError(
                    f"Expected to move the production pointer of {service}. Received: others write it all the time. "
                    "Try again."
                )

    def write_heartbeat(self, service: str, heartbeat: WorkerHeartbeat) -> None:
        """Says what a worker runs."""
        with self._store.errors(f"write the heartbeat of {heartbeat.worker_id}"):
            self._store.replace(self._heartbeat(service, heartbeat.worker_id), heartbeat.model_dump_json())

    def remove_heartbeat(self, service: str, worker_id: str) -> None:
        """Takes a stopped worker off the list."""
        with self._store.errors(f"remove the heartbeat of {worker_id}"):
            self._store.remove(self._heartbeat(service, worker_id))

    def read_heartbeats(self, service: str) -> list[WorkerHeartbeat]:
        """Lists the heartbeats of a service, live or stale, by worker id; unreadable ones are left out."""
        return self._records_in(self._store.path("services", service, "workers"), WorkerHeartbeat)

    # What workers see of a probation

    def write_tally(self, service: str, name: str, tally: WorkerTally) -> None:
        """Says what a worker has seen; `name` is of the worker's process."""
        path = self._store.path("services", service, "probation", f"{name}.json")
        with self._store.errors(f"write what {name} has seen of a probation"):
            self._store.replace(path, tally.model_dump_json())

    def read_tallies(self, service: str, probation_id: str) -> list[WorkerTally]:
        """Lists what workers, live or not, have seen of a probation; what is unreadable is left out."""
        tallies = self._records_in(self._store.path("services", service, "probation"), WorkerTally)
        return [tally for tally in tallies if tally.probation_id == probation_id]

    def read_probation(self, service: str) -> Probation | None:
        """Returns the probation on a service with what was counted until now, or the last one; None: there was none."""
        pointer = self.read_pointer(service)
        probation = pointer.probation if pointer else None
        if probation is None or not probation.is_running:
            return probation
        told = [each.tally for each in self.read_tallies(service, probation.probation_id)]
        return probation.model_copy(update={"tally": sum(told, Tally())})

    def remove_tallies(self, service: str) -> None:
        """Forgets what was seen of former probations."""
        with self._store.errors(f"remove what the workers of {service} have seen"):
            self._store.remove(self._store.path("services", service, "probation"))

    # Reference data and reports

    def publish_reference_data(self, parquet: Path, model_name: str, version: str) -> str:
        """Copies a reference parquet into place and returns its URL."""
        target = self._reference(model_name, version)
        with self._store.errors(f"publish the reference data of {model_name} {version}"):
            self._store.replace(target, parquet.read_bytes())
        return self._store.url_of(target)

    def fetch_reference_data(self, model_name: str, version: str, cache: Path) -> Path:
        """Returns a local path of a version's reference parquet.

        Raises:
            BundleNotFoundError: that version has no reference data.
        """
        source = self._reference(model_name, version)
        with self._store.errors(f"fetch the reference data of {model_name} {version}"):
            if not self._store.exists(source):
                raise BundleNotFoundError(
                    f"Expected reference data of {model_name} {version}. Received: none. Materialise it first."
                )
            return self._local(source, cache / "ref_data" / model_name / version)

    def accept_reference(self, parquet: Path, model_name: str, version: str, accepted: AcceptedReference) -> None:
        """Makes a window's rows what requests of a version are compared with; the file first, then what names it."""
        with self._store.errors(f"publish the accepted reference of {model_name} {version}"):
            self._store.replace(self._accepted(model_name, version, accepted), parquet.read_bytes())
            text = accepted.model_dump_json(indent=1)
            self._store.replace(self._store.path("ref_data", model_name, version, "accepted.json"), text)

    def forget_accepted(
        self, parquet: Path | None, model_name: str, version: str, before: AcceptedReference, after: AcceptedReference
    ) -> None:
        """Puts fewer rows in an accepted window's place; None: it is no reference any more. The former file goes."""
        with self._store.errors(f"publish the accepted reference of {model_name} {version}"):
            if parquet is None:
                self._store.remove(self._store.path("ref_data", model_name, version, "accepted.json"))
            else:
                self.accept_reference(parquet, model_name, version, after)
            self._store.remove(self._accepted(model_name, version, before))

    def accepted_versions(self, model_name: str) -> list[str]:
        """Returns the versions of a model whose requests are compared with an accepted window."""
        folder = self._store.path("ref_data", model_name)
        with self._store.errors(f"list the references of {model_name}"):
            versions = self._store.names(folder, "directory")
        return [version for version in versions if self.read_accepted(model_name, version) is not None]

    def read_accepted(self, model_name: str, version: str) -> AcceptedReference | None:
        """Returns which window requests of a version are compared with; None: its reference split."""
        path = self._store.path("ref_data", model_name, version, "accepted.json")
        with self._store.errors(f"read the accepted reference of {model_name} {version}"):
            return _parsed(AcceptedReference, path, self._store.read(path))

    def fetch_accepted(self, model_name: str, version: str, accepted: AcceptedReference, cache: Path) -> Path:
        """Returns a local path of the parquet of an accepted window."""
        source = self._accepted(model_name, version, accepted)
        with self._store.errors(f"fetch the accepted reference of {model_name} {version}"):
            return self._local(source, cache / "ref_data" / model_name / version)

    def publish_report(self, name: str, report_id: str, directory: Path) -> str:
        """Copies a report's folder to `reports/<name>/<report_id>/` and returns its URL."""
        target = self._store.path("reports", name, report_id)
        with self._store.errors(f"publish the report {report_id}"):
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                self._store.replace(f"{target}/{path.relative_to(directory).as_posix()}", path.read_bytes())
        return self._store.url_of(target)

    # Where they lie

    def _bundle(self, model_name: str, version: str) -> str:
        return self._store.path("models", model_name, version)

    def _local(self, source: str, folder: Path) -> Path:
        """Returns a path of this machine of a file that never changes, fetched into `folder` where it is elsewhere."""
        if self.is_local:
            return Path(source)
        local = folder / Path(source).name
        if not local.exists():
            with whole_file(local) as partial:
                self._store.download(source, partial)
        return local

    def _records_in(self, folder: str, kind: type[_R]) -> list[_R]:
        """Reads the records in a folder by name, without what is unreadable: of a worker that died while writing."""
        with self._store.errors(f"list {folder}"):
            paths = [f"{folder}/{name}" for name in self._store.names(folder, "file") if name.endswith(".json")]
        found = []
        for path in paths:
            try:
                record = _parsed(kind, path, self._store.read(path))
            except StorageError:
                continue
            if record is not None:
                found.append(record)
        return found

    def _reference(self, model_name: str, version: str) -> str:
        return self._store.path("ref_data", model_name, version, f"{model_name}_ref_data.parquet")

    def _accepted(self, model_name: str, version: str, accepted: AcceptedReference) -> str:
        return self._store.path("ref_data", model_name, version, accepted.file)

    def _pointer(self, service: str) -> str:
        return self._store.path("services", service, "production.json")

    def _heartbeat(self, service: str, worker_id: str) -> str:
        return self._store.path("services", service, "workers", f"{worker_id}.json")

    def _folder_names(self, *names: str) -> list[str]:
        with self._store.errors(f"list {'/'.join(names)}"):
            return self._store.names(self._store.path(*names), "directory")


def _parsed(record: type[_R], path: str, text: str | None) -> _R | None:
    try:
        return None if text is None else record.model_validate_json(text)
    except ValidationError as err:
        raise StorageError(f"{path}: expected a {record.__name__}. Received: {err}") from err


def _title(pointer: ProductionPointer | None) -> str:
    return f"{pointer.model_name} {pointer.version} since {pointer.since_utc.isoformat()}" if pointer else "nothing"
