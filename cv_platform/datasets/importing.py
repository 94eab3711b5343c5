"""Makes a folder or archive of images a tagged version of a git + DVC repository; the source is only read."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cv_platform.config import DatasetConfig
from cv_platform.datasets.archives import is_archive, unpack
from cv_platform.datasets.durable import exclusive, scratch_directory, whole_directory
from cv_platform.datasets.dvc_store import store_images
from cv_platform.datasets.layouts import (
    SPLIT_ALIASES,
    ImageEntry,
    Layout,
    has_images,
    read_layout,
    visible,
    write_annotations,
)
from cv_platform.datasets.repository import (
    ANNOTATIONS,
    DATA_FOLDER,
    StoredVersion,
    commit_version,
    create_repository,
    list_tag_names,
    read_version,
    require_repository,
    show_version,
    version_md5,
)
from cv_platform.disk_space import require_free_space
from cv_platform.errors import DatasetError, InvalidDatasetError

logger = logging.getLogger(__name__)

NO_SPLIT = "no split"


class ImportedDataset(BaseModel):
    """A version that `import_dataset` added, or found to be there already.

    Attributes:
        ds_name: name of the dataset.
        tag: its new tag.
        dvc_md5: the data version.
        class_names: the classes found.
        counts: images per split; `no split` when the source has none.
        class_counts: images per class.
        directory: the repository.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    ds_name: str
    tag: str
    dvc_md5: str
    class_names: tuple[str, ...]
    counts: dict[str, int]
    class_counts: dict[str, int]
    directory: Path


def import_dataset(
    source: Path, *, ds_name: str, tag: str, ds_root: Path, annotations: Path | None = None
) -> ImportedDataset:
    """Adds the images of `source` to the repository `ds_root/ds_name` as the version `tag`.

    The repository is made when it is missing. Importing the same images under the same tag again changes nothing. The
    source is only read, and of an existing repository neither branch nor working tree changes.

    Args:
        source: a folder, or a tar or zip archive, with class folders, split/class folders, or annotations.csv inside.
        ds_name: the dataset's name.
        tag: the new version's git tag, such as v1.0.0.
        ds_root: folder of the dataset repositories.
        annotations: a CSV outside of `source`; its paths are relative to the images.

    Raises:
        InvalidDatasetError: name, tag, source or annotations are not usable, a class has no images, train or test is
            missing, or the tag exists with other content.
        DatasetError: `ds_root` cannot hold repositories, there is not enough disk space, or git or DVC fails.
    """
    _check_names(ds_name, tag)
    source, repository = source.expanduser().absolute(), ds_root.expanduser().absolute() / ds_name
    if not source.exists():
        raise InvalidDatasetError(f"Expected a folder, tar or zip of images. Received: {source}, which does not exist.")
    if not source.is_dir() and not is_archive(source):
        raise InvalidDatasetError(f"Expected a folder, tar or zip of images. Received: {source}, which is neither.")
    _make_root(repository.parent)
    with (
        exclusive(repository.parent / f".{ds_name}.lock"),
        scratch_directory(repository.parent, ds_name) as scratch,
    ):
        root = source
        if not source.is_dir():
            root = scratch / "unpacked"
            root.mkdir()
            unpack(source, root)
        root = _descend(root)
        layout = _read(root, annotations)
        has_csv = annotations is not None or (root / ANNOTATIONS).is_file()
        entries = layout.entries if has_csv else _canonical(layout.entries)
        _stage(root, layout.entries, entries, scratch / DATA_FOLDER, moves=not source.is_dir())
        stored = _store(repository, tag, scratch, write_annotations(entries) if has_csv else None)
    classes = Counter(label for entry in entries for label in entry.labels)
    return ImportedDataset(
        ds_name=ds_name,
        tag=tag,
        dvc_md5=stored.dvc_md5,
        class_names=layout.class_names,
        counts=dict(Counter(entry.split or NO_SPLIT for entry in entries)),
        class_counts={name: classes[name] for name in layout.class_names},
        directory=repository,
    )


def _check_names(ds_name: str, tag: str) -> None:
    try:
        DatasetConfig.model_validate({"ds_name": ds_name, "dvc_tag": tag})
    except ValidationError as err:
        wrong = "; ".join(f"{e['loc'][0]} {e['input']!r}: {e['msg']}" for e in err.errors())
        raise InvalidDatasetError(f"Expected a name and a tag such as cifar10 and v1.0.0. Received: {wrong}.") from err
    # Git's own rules for tags that the pattern does not know.
    if ".." in tag or tag.endswith(("/", ".", ".lock")) or "//" in tag or "/." in tag:
        raise InvalidDatasetError(f"Expected a git tag such as v1.0.0. Received: {tag!r}.")


def _make_root(root: Path) -> None:
    """Makes the folder of repositories, or refuses one that cannot be it."""
    if (root / ".dvc").exists():
        raise DatasetError(
            f"Expected the folder that holds dataset repositories. Received: {root}, which is a repository itself. "
            f"Give the folder above it: --root {root.parent}."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as err:
        reason = "a file" if root.is_file() else err.strerror
        raise DatasetError(
            f"Expected a folder for dataset repositories, which is made where it is missing. Received: {root} "
            f"({reason}). Give another by --root, or none for $CV_HOME/datasets."
        ) from err


def _descend(root: Path) -> Path:
    """Steps through single wrapping folders, as archives have them."""
    while not (root / ANNOTATIONS).is_file() and not has_images(root):
        folders = [path for path in visible(root) if path.is_dir()]
        if len(folders) != 1 or folders[0].name in SPLIT_ALIASES or has_images(folders[0]):
            break
        root = folders[0]
    return root


def _read(root: Path, annotations: Path | None) -> Layout:
    csv_path = annotations or root / ANNOTATIONS
    content = None
    if annotations is not None or csv_path.is_file():
        try:
            content = csv_path.read_bytes()
        except OSError as err:
            raise InvalidDatasetError(f"Expected annotations at {csv_path}. Received: {err}.") from err
    layout = read_layout(root, content)
    used = {label for entry in layout.entries for label in entry.labels}
    empty = [name for name in layout.class_names if name not in used]
    if empty:
        raise InvalidDatasetError(
            f"Expected images of every class in {root}. Received: none of {', '.join(empty)}. "
            "Add some, or remove the class."
        )
    if len(layout.class_names) < 2:
        raise InvalidDatasetError(
            f"Expected at least two classes in {root}. Received: {', '.join(layout.class_names) or 'none'}. "
            "Arrange images as CLASS/image.jpg or SPLIT/CLASS/image.jpg, or add annotations.csv."
        )
    splits = {entry.split for entry in layout.entries}
    missing = [split for split in ("train", "test") if split not in splits] if splits != {None} else []
    if missing or (None in splits and len(splits) > 1):
        found = ", ".join(sorted(split or "(none)" for split in splits))
        raise InvalidDatasetError(
            f"Expected the splits train and test, or no splits at all. Received: {found}. "
            "Add what is missing, or give the images without splits."
        )
    if layout.ignored:
        logger.warning("Ignored %d files that are no listed images, such as %s", len(layout.ignored), layout.ignored[0])
    return layout


def _canonical(entries: tuple[ImageEntry, ...]) -> tuple[ImageEntry, ...]:
    """Names split folders train, valid, test and reference, whatever they were called."""
    return tuple(
        ImageEntry(f"{entry.split}/{entry.path.partition('/')[2]}", entry.split, entry.labels) if entry.split else entry
        for entry in entries
    )


def _stage(
    root: Path, found: tuple[ImageEntry, ...], named: tuple[ImageEntry, ...], images: Path, *, moves: bool
) -> None:
    """Copies (or moves, what was unpacked here) the images found in `root` to their names below `images`."""
    try:
        if not moves:
            needed = sum((root / entry.path).stat().st_size for entry in found)
            require_free_space(images.parent, needed, purpose=f"a copy of {root}")
        for origin, entry in zip(found, named, strict=True):
            target = images / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if moves:
                (root / origin.path).rename(target)
            else:
                # Never a hard link: what happens to a stored file must not reach the source.
                shutil.copyfile(root / origin.path, target)
    except OSError as err:
        raise InvalidDatasetError(f"Cannot read the images of {root}: {err}. Check their rights and the disk.") from err


def _store(repository: Path, tag: str, scratch: Path, annotations: bytes | None) -> StoredVersion:
    message = f"Import {tag}"
    if not repository.exists():
        with whole_directory(repository) as partial:
            create_repository(partial)
            dvc_file = store_images(scratch, repository=partial)
            version = commit_version(partial, tag, dvc_file=dvc_file, annotations=annotations, message=message)
            show_version(partial, version)
        return version
    require_repository(repository, remedy="Move it away, or choose another name.")
    dvc_file = store_images(scratch, repository=repository)
    if tag in list_tag_names(repository):
        existing = read_version(repository, tag)
        if existing.dvc_md5 == version_md5(dvc_file, annotations):
            return existing
        raise InvalidDatasetError(
            f"Expected a new tag, or the same images. Received: {tag} of {repository}, which has other content "
            f"({existing.dvc_md5}). Versions do not change: choose a new tag."
        )
    return commit_version(repository, tag, dvc_file=dvc_file, annotations=annotations, message=message)
