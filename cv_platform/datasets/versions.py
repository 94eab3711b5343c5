"""A tag of a DVC repository as a folder of read-only images with a manifest.

Nothing here changes the repository: DVC's files are read from git's objects, and the images come out of DVC's cache (or
its remote) into `home/worktrees/<ds_name>/<md5>`, which experiments share. Data version = that md5.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from cv_platform.compute.engine import Engine
from cv_platform.config import DatasetConfig, ModelConfig
from cv_platform.datasets.digits import make_digits_repository
from cv_platform.datasets.dvc_store import check_out
from cv_platform.datasets.manifest import build_manifest, is_manifest, manifest_name
from cv_platform.datasets.publishing import Sharing, find_origin
from cv_platform.datasets.repository import (
    ANNOTATIONS,
    StoredVersion,
    list_versions,
    read_file,
    read_version,
    require_repository,
)
from cv_platform.datasets.stand_ins.links import PLACE, place_links
from cv_platform.datasets.stand_ins.tars import place_tars
from cv_platform.files import exclusive, whole_directory
from cv_platform.records import DatasetVersion, Provenance

logger = logging.getLogger(__name__)

_MARKER = "checkout.json"
_MARKER_FORMAT = 1


def repository_directory(dataset: DatasetConfig, *, home: Path) -> Path:
    """Returns where the dataset's repository is, or would be."""
    root = Path(dataset.ds_root).expanduser() if dataset.ds_root else home / "datasets"
    return root.absolute() / dataset.ds_name


def list_tags(dataset: DatasetConfig, *, home: Path) -> dict[str, str]:
    """Returns the md5 of every tag that carries a dataset, in version order.

    Raises:
        DatasetNotFoundError: there is no repository.
    """
    return {tag: version.dvc_md5 for tag, version in list_versions(_require(dataset, home)).items()}


def checkout_version(
    dataset: DatasetConfig,
    model: ModelConfig,
    *,
    home: Path,
    engine: Engine | None = None,
    shared_in: str | None = None,
) -> DatasetVersion:
    """Checks the configured tag out and describes its images; a built-in source is made on first use.

    What is there already is used again, what is incomplete or was changed is made again, and concurrent calls share the
    work.

    Args:
        dataset: name, tag, splits and quarantine.
        model: its classes, and how many bits samples use.
        home: `Settings.home`.
        engine: who reads and decodes the images; None: processes of this machine.
        shared_in: URL of central storage, where machines that do not see the check-out read them; None: they are
            refused.

    Raises:
        DatasetNotFoundError: there is no repository.
        UnknownDatasetVersionError: it has no such tag; the message lists the tags.
        InvalidDatasetError: images, annotations or classes do not fit the config; all mistakes are named.
        DatasetError: neither DVC's cache nor its remote has the images.
        ComputeError, StorageError: see `publishing.find_origin`.
    """
    repository = open_repository(dataset, home=home)
    version, directory = check_out_images(repository, dataset.dvc_tag, home=home)
    provenance = Provenance(ds_name=dataset.ds_name, dvc_tag=version.tag, dvc_md5=version.dvc_md5)
    with exclusive(_lock_of(directory)):
        manifest = directory / manifest_name(model, dataset)
        if not is_manifest(manifest):
            manifest = build_manifest(
                directory,
                data_path=version.data_path,
                annotations=version.annotations,
                model=model,
                dataset=dataset,
                engine=engine,
                origin=find_origin(
                    directory,
                    provenance,
                    seen_by=directory / _MARKER,
                    engine=engine,
                    sharing=Sharing(shared_in, repository) if shared_in else None,
                ),
            )
    return DatasetVersion(
        provenance=provenance,
        git_commit=version.commit,
        directory=directory,
        manifest=manifest.name,
        class_names=model.classes,
        sample_bits=model.sample_bits,
    )


def check_out_images(repository: Path, tag: str, *, home: Path) -> tuple[StoredVersion, Path]:
    """Returns a tag of `repository`, and the read-only folder of its images, which is made unless it is whole.

    Raises:
        UnknownDatasetVersionError, InvalidDatasetError, DatasetError: see `checkout_version`.
    """
    version = read_version(repository, tag)
    directory = home.absolute() / "worktrees" / repository.name / version.dvc_md5
    with exclusive(_lock_of(directory)):
        if not _is_complete(directory, version):
            with whole_directory(directory) as partial:
                check_out(version, partial, repository=repository)
                images, name = partial / version.data_path, f"{repository.name} {tag}"
                place_tars(images, version=name)
                place_links(images, read_file(repository, tag, PLACE), version=name)
                _seal(partial, version)
    return version, directory


def _lock_of(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.lock"


def repository_of(ds_name: str, *, root: Path) -> Path:
    """Returns the repository of a dataset below `root`.

    Raises:
        DatasetNotFoundError: there is none; the datasets that are there are listed.
    """
    repository = root.expanduser().absolute() / ds_name
    known = sorted(path.parent.name for path in repository.parent.glob("*/.git"))
    require_repository(repository, remedy=f"Datasets there: {', '.join(known) or 'none'}; --root names another folder.")
    return repository


def open_repository(dataset: DatasetConfig, *, home: Path) -> Path:
    """Returns the configured repository; a built-in source is made on first use.

    Raises:
        DatasetNotFoundError: there is none.
    """
    if dataset.source == "digits":
        make_digits_repository(repository_directory(dataset, home=home))
    return _require(dataset, home)


def _require(dataset: DatasetConfig, home: Path) -> Path:
    repository = repository_directory(dataset, home=home)
    remedy = (
        "Materialise the dataset: it is made on first use."
        if dataset.source
        else f"Run: cv-platform import-dataset SOURCE --name {dataset.ds_name} --tag {dataset.dvc_tag}"
    )
    require_repository(repository, remedy=remedy)
    return repository


def _seal(directory: Path, version: StoredVersion) -> None:
    """Makes a checkout's files (neither its folders nor what it links to) read-only, and writes down what it holds."""
    if version.annotations is not None:
        (directory / ANNOTATIONS).write_bytes(version.annotations)
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o444)
    marker = {"format": _MARKER_FORMAT, **_listing(directory / version.data_path)}
    (directory / _MARKER).write_text(json.dumps(marker), encoding="utf-8")


def _is_complete(directory: Path, version: StoredVersion) -> bool:
    """Compares names, sizes and times with what was written down: cheap, and sees every honest accident.

    Of images that were left in place, those of the files that the links lead to are compared.
    """
    try:
        marker = json.loads((directory / _MARKER).read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        marker = None
    try:
        complete = marker == {"format": _MARKER_FORMAT, **_listing(directory / version.data_path)}
    except OSError:  # A link whose file is gone.
        complete = False
    if not complete:
        logger.warning("The checkout %s has changed since it was made; making it again", directory)
    return complete


def _listing(images: Path) -> dict[str, Any]:
    digest, count, size = hashlib.sha256(), 0, 0
    # Every run looks at each file: by its name in its open folder, the kernel need not walk to it from the root.
    for folder, folders, names, handle in os.fwalk(images):
        folders.sort()
        inside = "" if folder == str(images) else f"{Path(folder).relative_to(images).as_posix()}/"
        for name in sorted(names):
            status = os.stat(name, dir_fd=handle)
            line = f"{inside}{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
            count, size = count + 1, size + status.st_size
    return {"files": count, "bytes": size, "listing": digest.hexdigest()}
