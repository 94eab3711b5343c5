"""Central storage: immutable model bundles, the production pointer, worker heartbeats, reference data and reports.

A folder or any fsspec URL (`s3://bucket/prefix` with the `s3` extra). Layout:

    models/<model_name>/<version>/<model_name>.yaml      written last: a bundle without it does not exist
    services/<service>/production.json                   the pointer: which version a service serves
    services/<service>/workers/<worker_id>.json          what each worker runs, refreshed as it lives
    ref_data/<model_name>/<version>/<model_name>_ref_data.parquet
    reports/<name>/<report_id>/…

Bundles are never overwritten; pointer, heartbeats, reference data and reports are replaced file by file, each in one
step. A process that dies while it publishes leaves a folder without metadata, which no reader sees. In a folder all
that was written survives a power cut, where the file system can sync; object stores see to that themselves.

The pointer moves by compare-and-set, so that of two hosts that move it at once neither undoes the other's move: in a
folder under a lock of the kernel's, on S3 by conditional requests
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html). Other object stores have no such
request in fsspec: there it is compared, then written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import fsspec
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cv_platform.disk_space import require_free_space
from cv_platform.errors import (
    BundleExistsError,
    BundleNotFoundError,
    CorruptBundleError,
    PointerMovedError,
    StorageError,
)

FORMAT_VERSION = 1
# LibYAML, where the wheel has it, reads the same a dozen times as fast; a start waits for the metadata.
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SWAPS = 20
"""Attempts of a compare-and-set on S3: each but the last lost to a write between its reading and its writing."""
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey"}
"""Error codes of S3 for a condition that does not hold, or for an object that another request is changing."""
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
    runtime_reason: str = Field("", description="why that runtime was chosen")
    parity: dict[str, float] = Field(
        default_factory=dict, description="differences of the ONNX graph from the gradient tape on the golden images"
    )
    classifier_type: Literal["multi-class", "multi-label"]
    class_names: tuple[str, ...]
    image_size: tuple[int, int] = Field(description="(height, width) in pixels")
    threshold: float = Field(0.5, description="multi-label only")
    temperature: float = Field(
        1.0, description="what the logits are divided by, in the weights: nothing has to apply it"
    )
    uae_dims: int
    feature_dims: int
    preprocessing_hash: str
    encoder_hash: str
    dataset_name: str
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


_R = TypeVar("_R", bound=_Record)


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


class WorkerHeartbeat(_Record):
    """What one worker of a service runs."""

    worker_id: str
    public_id: str = Field("", description="what strangers read instead: the worker's id names its host and process")
    model_name: str | None = None
    version: str | None = None
    beat_utc: datetime
    last_swap_error: str | None = Field(
        None, description="why the worker did not take the version that the pointer names"
    )
    failed_version: str | None = None
    failed_pointer_utc: datetime | None = Field(None, description="`since_utc` of the pointer whose version failed")


class CentralStorage:
    """Reads and writes central storage at one URL.

    Args:
        url: a folder, or a URL that fsspec knows.

    Raises:
        StorageError: (all methods) the storage cannot be reached or written.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as err:
            raise StorageError(
                f"CV_STORAGE: expected a folder or a URL whose driver is installed. Received: {self.url} ({err}). "
                "For s3:// install the extra: pip install 'cv-platform[s3]'."
            ) from err
        protocol = self._fs.protocol
        protocols = (protocol,) if isinstance(protocol, str) else protocol
        self.is_local, self.is_s3 = "file" in protocols, "s3" in protocols

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
        with self._errors(f"publish {metadata.model_name} {metadata.version}"):
            if self._fs.exists(f"{target}/{name}"):
                raise BundleExistsError(
                    f"Expected a new version. Received: {metadata.model_name} {metadata.version}, which is published. "
                    "Export again: it gets a version of its own."
                )
            for relative in sums:
                self._fs.makedirs(f"{target}/{relative}".rsplit("/", 1)[0], exist_ok=True)
                self._fs.put_file(str(directory / relative), f"{target}/{relative}")
            if self.is_local:
                # Else a power cut could leave metadata that vouch for empty files.
                self._sync([Path(target, relative) for relative in sums])
            self._replace(
                f"{target}/{name}",
                yaml.safe_dump(complete.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            )
        return complete

    def bundle_versions(self, model_name: str) -> list[str]:
        """Lists a model's published versions, oldest first."""
        base = f"{self._root}/models/{_name(model_name)}"
        with self._errors(f"list the versions of {model_name}"):
            self._fs.invalidate_cache()
            if not self._fs.exists(base):
                return []
            folders = [str(entry["name"]).rstrip("/").rsplit("/", 1)[-1] for entry in self._fs.ls(base, detail=True)]
            return sorted(v for v in folders if self._fs.exists(f"{base}/{v}/{model_name}.yaml"))

    def read_metadata(self, model_name: str, version: str) -> BundleMetadata:
        """Reads a bundle's metadata.

        Raises:
            BundleNotFoundError: there is no such version.
            CorruptBundleError: the metadata are not what this version of the format says.
        """
        path = f"{self._bundle(model_name, version)}/{model_name}.yaml"
        text = self._read(path)
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
            with self._errors(f"fetch {model_name} {version}"):
                shutil.rmtree(folder, ignore_errors=True)
                size = sum(int(self._fs.size(f"{source}/{relative}") or 0) for relative in metadata.checksums)
                require_free_space(cache, size, purpose=f"a copy of {model_name} {version}")
                for relative in metadata.checksums:
                    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(f"{source}/{relative}", str(folder / relative))
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
                f"Restore {self._fs.unstrip_protocol(source)} from a backup, or remove it and materialise the bento "
                "again."
            )
        return folder, metadata

    # What is there, whole or not, and its deletion

    def service_names(self) -> list[str]:
        """Lists the services that have a pointer or workers."""
        return self._folder_names("services")

    def stored_bundles(self) -> dict[tuple[str, str], int]:
        """Returns the bytes of each `(model_name, version)` there, the unfinished ones included."""
        with self._errors("measure the bundles"):
            return {
                (model, version): int(self._fs.du(f"{self._root}/models/{model}/{version}"))
                for model in self._folder_names("models")
                for version in self._folder_names(f"models/{model}")
            }

    def delete_bundle(self, model_name: str, version: str, *, is_wanted: Callable[[], bool] = lambda: False) -> bool:
        """Deletes a version and its reference data, and returns whether it did.

        The metadata go first, so that no reader ever sees half of it. Then `is_wanted` is asked, and if it is, they
        come back: a host that promotes the version meanwhile is seen here, or sees that the version is gone.
        """
        bundle = self._bundle(model_name, version)
        metadata = f"{bundle}/{model_name}.yaml"
        reference = self._reference(model_name, version).rsplit("/", 1)[0]
        with self._errors(f"delete {model_name} {version}"):
            text = self._read(metadata)
            if text is not None:
                self._fs.rm_file(metadata)
                is_gone = False
                try:
                    is_gone = not is_wanted()
                finally:
                    if not is_gone:
                        self._replace(metadata, text)
                if not is_gone:
                    return False
            for path in (bundle, reference):
                self._fs.invalidate_cache()
                if self._fs.exists(path):
                    self._fs.rm(path, recursive=True)
        return True

    def _folder_names(self, relative: str) -> list[str]:
        folder = f"{self._root}/{relative}"
        with self._errors(f"list {relative}"):
            self._fs.invalidate_cache()
            if not self._fs.exists(folder):
                return []
            entries = self._fs.ls(folder, detail=True)
            return sorted(str(e["name"]).rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

    # The production pointer and the workers

    def read_pointer(self, service: str) -> ProductionPointer | None:
        """Returns what `service` should serve, or None before the first deployment.

        Raises:
            StorageError: the pointer is unreadable.
        """
        return self._read_record(self._pointer(service), ProductionPointer)

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
        with self._errors(f"move the production pointer of {service}"):
            self._replace(self._pointer(service), pointer.model_dump_json(indent=2))

    def swap_pointer(self, service: str, expected: ProductionPointer | None, new: ProductionPointer | None) -> None:
        """Moves the production pointer from `expected` to `new` in one step; None: no pointer, as before a deployment.

        Raises:
            PointerMovedError: it is elsewhere: somebody has moved it since it was read. Nothing was changed.
        """
        path = self._pointer(service)
        data = None if new is None else new.model_dump_json(indent=2).encode()
        with self._errors(f"move the production pointer of {service}"), self._only_writer(service):
            for _ in range(_SWAPS):
                tag = self._tag(path)  # Before the reading: if the object changes between them, the write is refused.
                current = self.read_pointer(service)
                if current == new:
                    return  # Also when the driver has sent a request again whose answer was lost.
                if current != expected:
                    raise PointerMovedError(
                        f"Expected the production pointer of {service} at {_title(expected)}. Received: "
                        f"{_title(current)}, as somebody has moved it. Look at what it serves first."
                    )
                if self._write_if(path, data, tag):
                    return
        raise PointerMovedError(
            f"Expected to move the production pointer of {service}. Received: others write it all the time. Try again."
        )

    def write_heartbeat(self, service: str, heartbeat: WorkerHeartbeat) -> None:
        """Says what a worker runs."""
        with self._errors(f"write the heartbeat of {heartbeat.worker_id}"):
            self._replace(f"{self._service(service)}/workers/{heartbeat.worker_id}.json", heartbeat.model_dump_json())

    def remove_heartbeat(self, service: str, worker_id: str) -> None:
        """Takes a stopped worker off the list."""
        path = f"{self._service(service)}/workers/{worker_id}.json"
        with self._errors(f"remove the heartbeat of {worker_id}"):
            if self._fs.exists(path):
                self._fs.rm_file(path)

    def read_heartbeats(self, service: str) -> list[WorkerHeartbeat]:
        """Lists the heartbeats of a service, live or stale, by worker id; unreadable ones are left out."""
        folder = f"{self._service(service)}/workers"
        with self._errors(f"list the workers of {service}"):
            self._fs.invalidate_cache()
            if not self._fs.exists(folder):
                return []
            paths = sorted(str(p) for p in self._fs.ls(folder, detail=False) if str(p).endswith(".json"))
        beats = []
        for path in paths:
            try:
                beat = self._read_record(path, WorkerHeartbeat)
            except StorageError:
                continue  # A worker that died while writing; its successor has a file of its own.
            if beat is not None:
                beats.append(beat)
        return beats

    # Reference data and reports

    def publish_reference_data(self, parquet: Path, model_name: str, version: str) -> str:
        """Copies a reference parquet into place and returns its URL."""
        target = self._reference(model_name, version)
        with self._errors(f"publish the reference data of {model_name} {version}"):
            self._replace(target, parquet.read_bytes())
        return str(self._fs.unstrip_protocol(target))

    def fetch_reference_data(self, model_name: str, version: str, cache: Path) -> Path:
        """Returns a local path of a version's reference parquet.

        Raises:
            BundleNotFoundError: that version has no reference data.
        """
        source = self._reference(model_name, version)
        with self._errors(f"fetch the reference data of {model_name} {version}"):
            if not self._fs.exists(source):
                raise BundleNotFoundError(
                    f"Expected reference data of {model_name} {version}. Received: none. Materialise it first."
                )
            if self.is_local:
                return Path(source)
            local = cache / "ref_data" / model_name / version / Path(source).name
            if not local.exists():
                local.parent.mkdir(parents=True, exist_ok=True)
                partial = local.with_suffix(f".{secrets.token_hex(4)}")
                self._fs.get_file(source, str(partial))
                partial.replace(local)
            return local

    def publish_report(self, name: str, report_id: str, directory: Path) -> str:
        """Copies a report's folder to `reports/<name>/<report_id>/` and returns its URL."""
        target = f"{self._root}/reports/{_name(name)}/{_name(report_id)}"
        with self._errors(f"publish the report {report_id}"):
            for path in sorted(p for p in directory.rglob("*") if p.is_file()):
                self._replace(f"{target}/{path.relative_to(directory).as_posix()}", path.read_bytes())
        return str(self._fs.unstrip_protocol(target))

    # Inside

    def _bundle(self, model_name: str, version: str) -> str:
        return f"{self._root}/models/{_name(model_name)}/{_name(version)}"

    def _reference(self, model_name: str, version: str) -> str:
        return f"{self._root}/ref_data/{_name(model_name)}/{_name(version)}/{model_name}_ref_data.parquet"

    def _service(self, service: str) -> str:
        return f"{self._root}/services/{_name(service)}"

    def _pointer(self, service: str) -> str:
        return f"{self._service(service)}/production.json"

    @contextmanager
    def _only_writer(self, service: str) -> Iterator[None]:
        """Keeps the writers of a service's pointer apart, where they share a file system."""
        if not self.is_local:
            yield
            return
        path = Path(self._service(service), ".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except PermissionError:  # Made by another user; to lock it, reading is enough.
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _tag(self, path: str) -> str | None:
        """Returns what S3 calls an object's present content; None: there is no such object, or this is not S3."""
        self._fs.invalidate_cache()
        try:
            return self._fs.info(path)["ETag"] if self.is_s3 else None
        except FileNotFoundError:
            return None

    def _write_if(self, path: str, data: bytes | None, tag: str | None) -> bool:
        """Writes a file, or deletes it; on S3 if it has this tag still (None: if it is still not there), else False."""
        if not self.is_s3:
            if data is not None:
                self._replace(path, data)
            else:
                self._fs.rm_file(path)
                if self.is_local:
                    _sync_folder(Path(path).parent)
            return True
        try:
            if data is not None:
                self._fs.pipe_file(path, data, **({"IfMatch": tag} if tag else {"IfNoneMatch": "*"}))
            elif tag is None:
                return False
            else:
                bucket, key, _ = self._fs.split_path(path)
                self._fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=tag)
        except OSError as err:
            answer = getattr(err.__cause__, "response", None) or {}
            if answer.get("Error", {}).get("Code") in _CONFLICTS:
                return False
            raise
        return True

    def _read(self, path: str) -> str | None:
        with self._errors(f"read {path}"):
            self._fs.invalidate_cache()
            try:
                return self._fs.cat_file(path).decode()
            except FileNotFoundError:
                return None
            except UnicodeDecodeError as err:
                raise CorruptBundleError(f"{path}: expected text. Received: {err}") from err

    def _read_record(self, path: str, record: type[_R]) -> _R | None:
        text = self._read(path)
        if text is None:
            return None
        try:
            return record.model_validate_json(text)
        except ValidationError as err:
            raise StorageError(f"{path}: expected a {record.__name__}. Received: {err}") from err

    def _replace(self, path: str, content: str | bytes) -> None:
        """Writes a file in one step: a reader sees the old one or the new one, after a power cut too."""
        data = content.encode() if isinstance(content, str) else content
        parent = path.rsplit("/", 1)[0]
        if not self.is_local:
            self._fs.makedirs(parent, exist_ok=True)
            self._fs.pipe_file(path, data)  # Object stores replace a whole object at once.
            return
        is_new_folder = not Path(parent).is_dir()
        self._fs.makedirs(parent, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=parent, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).chmod(0o644)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        for folder in self._folders(Path(path)) if is_new_folder else [Path(parent)]:
            _sync_folder(folder)

    def _sync(self, files: Iterable[Path]) -> None:
        """Makes local files survive a power cut, and the names of all folders on the way to them."""
        folders: dict[Path, None] = {}
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            folders |= dict.fromkeys(self._folders(file))
        for folder in folders:
            _sync_folder(folder)

    def _folders(self, file: Path) -> list[Path]:
        """Lists the folders from the one that holds `file` up to the one that holds the storage."""
        root = Path(self._root)
        return [*(folder for folder in file.parents if folder.is_relative_to(root)), root.parent]

    @contextmanager
    def _errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise StorageError(
                f"Cannot {action} at {self.url}: {err}. Check CV_STORAGE, its rights and the free space."
            ) from err


def file_sha256(path: Path) -> str:
    """Returns a file's sha256 as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Makes renames and new names in `folder` survive a power cut, where the file system can."""
    # Some network file systems refuse to sync a folder, and the one around the storage may not be ours to open; what
    # the files hold is synced without it.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _title(pointer: ProductionPointer | None) -> str:
    return f"{pointer.model_name} {pointer.version} since {pointer.since_utc.isoformat()}" if pointer else "nothing"


def _name(part: str) -> str:
    """Refuses what would leave its folder; callers validate before, this is the last lock."""
    if not part or part in {".", ".."} or any(c in part for c in "/\\\0"):
        raise StorageError(f"Expected a name. Received: {part!r}, which is a path.")
    return part
