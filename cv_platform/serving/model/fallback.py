"""Model bundles that a service can start from without central storage: the last good one, and the one inside a Bento.

Both are folders laid out as central storage with one bundle and one pointer, so that everything that reads central
storage (checksums, metadata, self-test) reads them too. They hold what serving needs, not the Keras files.
"""

from __future__ import annotations

import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from cv_platform.serving.model.runtime import GOLDEN, LoadedModel, load_bundle, locked
from cv_platform.serving.model.unknown import UNKNOWN
from cv_platform.storage import MODEL_PATHS, BundleMetadata, CentralStorage, ProductionPointer

BUNDLED = "bundled"
"""Name of the pointer inside a Bento."""


def write_fallback(folder: Path, metadata: BundleMetadata, directory: Path, *, pointer: str = BUNDLED) -> None:
    """Makes `directory` hold the bundle whose files lie in `folder`, under `pointer`, and no other version of it.

    Raises:
        StorageError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    storage = CentralStorage(directory)
    with locked(directory, exclusive=True):
        for leftover in directory.glob(".copying-*"):  # Of a worker that was killed.
            shutil.rmtree(leftover, ignore_errors=True)
        if metadata.version not in storage.bundle_versions(metadata.model_name):
            with tempfile.TemporaryDirectory(dir=directory, prefix=".copying-") as slim:
                model = MODEL_PATHS[metadata.runtime]
                copy = shutil.copytree if (folder / model).is_dir() else shutil.copyfile
                copy(folder / model, Path(slim) / model)
                for name in (GOLDEN, UNKNOWN):
                    if (folder / name).is_file():
                        shutil.copyfile(folder / name, Path(slim) / name)
                storage.publish_bundle(Path(slim), metadata)
        storage.write_pointer(
            pointer,
            ProductionPointer(model_name=metadata.model_name, version=metadata.version, since_utc=datetime.now(UTC)),
        )
        _drop_unreferenced(directory, storage)


def load_fallback(directory: Path, *, pointer: str = BUNDLED, threads: int | None = None) -> LoadedModel | None:
    """Loads what `pointer` names in `directory`; None when nothing was kept there.

    Raises:
        StorageError: the folder is unreadable, or (CorruptBundleError) its bundle does not hold.
    """
    if not directory.is_dir():
        return None
    storage = CentralStorage(directory)
    with locked(directory, exclusive=False):
        kept = storage.read_pointer(pointer)
        if kept is None:
            return None
        return load_bundle(storage, kept.model_name, kept.version, cache=directory, threads=threads)


def _drop_unreferenced(directory: Path, storage: CentralStorage) -> None:
    """Deletes bundles that no pointer in `directory` names, so that it does not grow with each deployment."""
    pointers = [storage.read_pointer(path.name) for path in (directory / "services").iterdir() if path.is_dir()]
    kept = {(p.model_name, p.version) for p in pointers if p is not None}
    for model in (directory / "models").iterdir():
        for version in model.iterdir():
            if (model.name, version.name) not in kept:
                shutil.rmtree(version, ignore_errors=True)
