"""Makes a folder or archive of images a tagged version of a git + DVC repository; the source is only read."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from unicodedata import normalize

from pydantic import BaseModel, ConfigDict, ValidationError

from cv_platform.config import DatasetConfig
from cv_platform.datasets.dvc_store import store_images
from cv_platform.datasets.repository import (
    DATA_FOLDER,
    StoredVersion,
    commit_version,
    create_repository,
    list_tag_names,
    list_versions,
    read_version,
    require_repository,
    show_version,
    version_md5,
)
from cv_platform.datasets.sources import parquet
from cv_platform.datasets.sources.archives import is_archive, unpack
from cv_platform.datasets.sources.entries import NOT_AN_IMAGE, NOTHING_KNOWN, ImageEntry, Layout
from cv_platform.datasets.sources.label_files import LabelRules
from cv_platform.datasets.sources.layouts import descend, read_layout, write_annotations
from cv_platform.datasets.sources.phone_photos import SUFFIX, is_phone_photo
from cv_platform.datasets.sources.staging import Staging, Traits, filled_once
from cv_platform.datasets.sources.tree import Folder, images_among, walk
from cv_platform.datasets.splits import SPLITS
from cv_platform.datasets.stand_ins.tars import tars_above, write_rule
from cv_platform.errors import DatasetError, InvalidDatasetError
from cv_platform.files import exclusive, scratch_directory, whole_directory
from cv_platform.images.files import IMAGE_SUFFIXES

NO_SPLIT = "no split"
MAX_LEFT_OUT_FRACTION = 0.1


class ImportedDataset(BaseModel):
    """A version that `import_dataset` added, or found to be there already.

    Attributes:
        ds_name: name of the dataset.
        tag: its new tag.
        dvc_md5: the data version.
        class_names: the classes found.
        is_multi_label: some image has several labels, or 0 in the columns of all classes, or unknown ones.
        counts: images per split; `no split` when the source has none.
        class_counts: images per class.
        unknown_counts: images per class of which nobody knows whether they show it; empty: all labels are known.
        notes: how the source was understood, as sentences.
        left_out: how many files were left out, by reason, with an example.
        directory: the repository.
        same_as: tags that had the same images and labels before; with `tag` among them, nothing was added.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    ds_name: str
    tag: str
    dvc_md5: str
    class_names: tuple[str, ...]
    is_multi_label: bool
    counts: dict[str, int]
    class_counts: dict[str, int]
    unknown_counts: dict[str, int] = {}
    notes: tuple[str, ...]
    left_out: dict[str, int]
    directory: Path
    same_as: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """Returns what was understood, a sentence a line."""
        return [
            *self.notes,
            f"images: {_counted(self.counts)}",
            f"classes: {_counted(self.class_counts)}",
            *([f"unknown labels: {_counted(self.unknown_counts)}"] if self.unknown_counts else []),
            *(f"left out: {count} {reason}" for reason, count in self.left_out.items()),
            *self._sameness(),
        ]

    def _sameness(self) -> list[str]:
        if self.tag in self.same_as:
            return [f"nothing new: {self.tag} has had the same images and labels before"]
        return [f"nothing new but the tag: the same images and labels as {self.same_as[-1]}"] if self.same_as else []


@dataclass(frozen=True)
class ImportRules:
    """What the user decides where the source does not say it.

    Attributes:
        classes: the columns, labels or folders that are classes; None: found.
        group: the label file's column of what splits never divide; None: one called group, if there is one.
        unknown: what blank and −1 in a class's column mean, see `LabelRules`.
        use_valid_as_test: the valid split becomes test.
        zip_encoding: of the names in a zip that are not UTF-8.
        max_left_out_fraction: of the files in the images' places those that may be no images that can be decoded.
        links: leave the images of a folder where they are, see `stand_ins.links`, instead of copying them into DVC.
        tar_above: with more images a version is stored as tars, see `stand_ins.tars`; None: as the dataset's repository
            says.
    """

    classes: tuple[str, ...] | None = None
    group: str | None = None
    unknown: Literal["negative", "ignore"] | None = None
    use_valid_as_test: bool = False
    zip_encoding: str | None = None
    max_left_out_fraction: float = MAX_LEFT_OUT_FRACTION
    links: bool = False
    tar_above: int | None = None


def import_dataset(
    source: Path,
    *,
    ds_name: str,
    tag: str,
    ds_root: Path,
    annotations: Path | None = None,
    rules: ImportRules | None = None,
) -> ImportedDataset:
    """Adds the images of `source` to the repository `ds_root/ds_name` as the version `tag`.

    The repository is made when it is missing. Importing the same images under the same tag again changes nothing, and
    where an import of the same, unchanged source was killed or interrupted, the next one goes on with what it had
    copied or unpacked. The source is only read, and of an existing repository neither branch nor working tree changes.
    How the source was understood is the message of the version's commit.

    Args:
        source: a folder, or a tar or zip archive, in one of the layouts of docs/reference/import.md.
        ds_name: the dataset's name.
        tag: the new version's git tag, such as v1.0.0.
        ds_root: folder of the dataset repositories.
        annotations: a label file outside of `source`, or of an unusual name.
        rules: what the source does not say.

    Raises:
        InvalidDatasetError: name, tag, source or label file are not usable, a class has no images, train is missing,
            too much is no image, or the tag exists with other content.
        DatasetError: `ds_root` cannot hold repositories, there is not enough disk space, or git or DVC fails.
    """
    rules = rules or ImportRules()
    check_names(ds_name, tag)
    source, repository = source.expanduser().absolute(), ds_root.expanduser().absolute() / ds_name
    if not source.exists():
        raise InvalidDatasetError(f"Expected a folder, tar or zip of images. Received: {source}, which does not exist.")
    is_parquet = source.suffix.lower() == parquet.SUFFIX and source.is_file()
    if not source.is_dir() and not is_parquet and not is_archive(source):
        raise InvalidDatasetError(f"Expected a folder, tar or zip of images. Received: {source}, which is neither.")
    _make_root(repository.parent)
    before = _traits(source)
    labels = _traits(annotations) if annotations is not None and annotations.is_file() else {}
    above = tars_above(repository) if rules.tar_above is None else rules.tar_above
    work = hashlib.sha256(repr((source, rules, above, sorted(before.items()), labels)).encode()).hexdigest()[:16]
    with (
        exclusive(repository.parent / f".{ds_name}.lock"),
        scratch_directory(repository.parent, ds_name, work=work) as scratch,
    ):
        root, unpacked_from = _unpacked(source, scratch, rules)
        folder = descend(walk(root))
        layout = _read(folder, annotations, rules)
        converted = frozenset(entry.path for entry in layout.entries if is_phone_photo(folder.path / entry.path))
        if rules.links:
            _require_linkable(source, root, converted)
        entries = _canonical(layout, converted)
        is_tarred = len(entries) > above and not rules.links
        images, is_ours = scratch / DATA_FOLDER, root != source
        staging = Staging(folder.path, images, converted, is_ours, stays=rules.links, is_tarred=is_tarred)
        beside = {**staging.fill(layout.entries, entries), **({} if rules.tar_above is None else write_rule(above))}
        _require_unchanged(before, source)
        classes = Counter(label for entry in entries for label in entry.labels)
        unknown = Counter(label for entry in entries for label in entry.unknown_labels)
        imported = ImportedDataset(
            ds_name=ds_name,
            tag=tag,
            dvc_md5="",
            class_names=layout.class_names,
            is_multi_label=any(
                len(entry.labels) > 1
                or bool(entry.unknown_labels)
                or (not entry.labels and layout.labels_from == "class columns")
                for entry in entries
            ),
            counts=dict(Counter(entry.split or NO_SPLIT for entry in entries)),
            class_counts={name: classes[name] for name in layout.class_names},
            unknown_counts={name: unknown[name] for name in layout.class_names if unknown[name]},
            notes=(*unpacked_from, f"understood as {layout.name}", *layout.notes, *_said_of(converted, staging, above)),
            left_out=layout.left_out.counts(),
            directory=repository,
        )
        annotations_csv = write_annotations(entries) if layout.labels_from != "folders" else None
        message = "\n".join([f"Import {tag}", "", *imported.summary()])
        known = list_versions(repository) if (repository / ".git").exists() else {}
        stored = store_version(repository, tag, scratch, annotations_csv, message, beside)
    same = tuple(name for name, version in known.items() if version.dvc_md5 == stored.dvc_md5)
    return imported.model_copy(update={"dvc_md5": stored.dvc_md5, "same_as": same})


def _traits(source: Path) -> Traits:
    """Returns size and times (of the content, of the file's record) of every file of a source, by path."""
    folders = walk(source).below() if source.is_dir() else ()
    files = [folder.path / name for folder in folders for name in folder.files] or [source]
    return {str(path): _traits_of(path) for path in files}


def _traits_of(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1, -1)  # It is left out, as what cannot be read.
    return (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _require_unchanged(before: Traits, source: Path) -> None:
    """Refuses a source that somebody has changed since: what was judged would not be what is stored."""
    after = _traits(source)
    paths = before.keys() | after.keys()
    # The last time of the three changes with a file's links and rights, too, which are of no interest here.
    changed = sorted(path for path in paths if before.get(path, ())[:2] != after.get(path, ())[:2])
    if changed:
        raise InvalidDatasetError(
            f"Expected {source} to stay as it was while it was read. Received: {len(changed)} files that came, went or "
            f"changed, such as {changed[0]}. Wait until it is complete, and import again."
        )


def _require_linkable(source: Path, root: Path, converted: frozenset[str]) -> None:
    """Refuses to leave in place what has no place of its own, or is not stored as it is."""
    if root != source:
        raise InvalidDatasetError(
            f"Expected a folder of image files for --link. Received: {source}, whose images are inside of other "
            "files. Unpack it where the images are to stay, or import it without --link."
        )
    if converted:
        raise InvalidDatasetError(
            f"Expected images for --link that the platform reads as they are. Received: {len(converted)} HEIC or AVIF, "
            f"such as {min(converted)}. Convert them in place, or import the folder without --link."
        )


def _unpacked(source: Path, scratch: Path, rules: ImportRules) -> tuple[Path, tuple[str, ...]]:
    """Returns the folder that holds the files of `source`, which itself is only read, and what was done for it."""
    root = source
    files = [source] if source.suffix.lower() == parquet.SUFFIX and source.is_file() else []
    if not source.is_dir() and not files:
        root = filled_once(scratch / "unpacked", functools.partial(unpack, source, encoding=rules.zip_encoding))
    above = root.parent if files else root
    if files := files or parquet.parquet_files(walk(root)):
        taken_out = filled_once(scratch / "parquet", functools.partial(parquet.unpack_parquet, files, root=above))
        return taken_out, (f"images taken out of {len(files)} Parquet files",)
    return root, ()


def check_names(ds_name: str, tag: str) -> None:
    """Returns if a dataset and a version may be called so.

    Raises:
        InvalidDatasetError: they may not.
    """
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


def _read(root: Folder, annotations: Path | None, rules: ImportRules) -> Layout:
    content = None
    try:
        content = annotations.read_bytes() if annotations is not None else None
    except OSError as err:
        raise InvalidDatasetError(f"Expected annotations at {annotations}. Received: {err}. Correct the path.") from err
    name = annotations.name if annotations is not None else ""
    classes = None if rules.classes is None else tuple(dict.fromkeys(normalize("NFC", name) for name in rules.classes))
    asked = LabelRules(classes, group=rules.group, unknown=rules.unknown)
    layout = _judge_images(root, read_layout(root, content, asked, name=name), rules)
    layout = _judge_unknown(root, layout, rules)
    used = {label for entry in layout.entries for label in entry.labels}
    empty = [name for name in layout.class_names if name not in used]
    if empty:
        raise InvalidDatasetError(
            f"Expected images of every class in {root.path}. Received: none of {', '.join(empty)}. "
            "Add some, or remove the class (or name the others by --classes)."
        )
    if len(layout.class_names) < 2:
        raise InvalidDatasetError(
            f"Expected at least two classes in {root.path}. Received: {', '.join(layout.class_names) or 'none'}. "
            "Arrange images as CLASS/image.jpg or SPLIT/CLASS/image.jpg, or add a label file: "
            "see docs/reference/import.md."
        )
    return _judge_splits(root, layout, rules)


def _judge_images(root: Folder, layout: Layout, rules: ImportRules) -> Layout:
    """Leaves out what by content and suffix is no image or cannot be read, unless what does not decode is too much.

    What is called an image and is none stays: the manifest quarantines it by name, with its reason.
    """
    whole, unreadable = images_among(root.path, [entry.path for entry in layout.entries])
    for path, why in sorted(unreadable.items()):
        layout.left_out.add(why, [path])
    broken = [entry.path for entry in layout.entries if entry.path not in whole and entry.path not in unreadable]
    named = {
        path
        for path in broken
        if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES and not is_phone_photo(root.path / path)
    }
    kept = whole | named
    layout = replace(layout, entries=tuple(entry for entry in layout.entries if entry.path in kept))
    layout.left_out.add(NOT_AN_IMAGE, (path for path in broken if path not in named))
    lost = layout.left_out.lost()
    lost.add(NOT_AN_IMAGE, named)
    count = sum(lost.counts().values())
    if count > rules.max_left_out_fraction * (count + len(whole)):
        reasons = [f"{n} {reason}" for reason, n in lost.counts().items()]
        raise InvalidDatasetError(
            f"Expected images in at least {1 - rules.max_left_out_fraction:.0%} of the images' files of {root.path}. "
            f"Received: {len(whole)} images, and {'; '.join(reasons)}. Convert them (RAW to JPEG), correct their "
            "rights, or leave them out by --max-left-out 1."
        )
    if not named:
        return layout
    note = f"called images, but none that decode: {len(named)}, such as {min(named)}; quarantined when they are used"
    return replace(layout, notes=(*layout.notes, note))


def _judge_unknown(root: Folder, layout: Layout, rules: ImportRules) -> Layout:
    """Leaves out images of which nothing is known, as if nobody had labelled them; refuses to ignore what no cell says.

    Classes that every image shows, as far as is known, are named.
    """
    unknown = {name for entry in layout.entries for name in entry.unknown_labels}
    if rules.unknown == "ignore" and layout.labels_from != "class columns" and not unknown:
        raise InvalidDatasetError(
            "Expected a label file with a column for each class, of 1, 0, −1 or nothing, for --unknown ignore. "
            f"Received: {layout.name} of {root.path}, where each image says all of its labels. Omit it."
        )
    nothing = {
        entry.path for entry in layout.entries if unknown and len(entry.unknown_labels) == len(layout.class_names)
    }
    if nothing:
        layout.left_out.add(NOTHING_KNOWN, sorted(nothing))
        layout = replace(layout, entries=tuple(entry for entry in layout.entries if entry.path not in nothing))
    absent = {name for entry in layout.entries for name in unknown.difference(entry.labels, entry.unknown_labels)}
    if always := [name for name in layout.class_names if name in unknown - absent]:
        note = f"no image is known not to show {', '.join(always)}: nothing teaches a model to say no. Write 0 there"
        return replace(layout, notes=(*layout.notes, note))
    return layout


def _judge_splits(root: Folder, layout: Layout, rules: ImportRules) -> Layout:
    """Refuses splits from which not all can be made, and says which are made."""
    splits = {entry.split for entry in layout.entries}
    notes: list[str] = []
    if rules.use_valid_as_test:
        if "valid" not in splits or "test" in splits:
            found = ", ".join(sorted(split or NO_SPLIT for split in splits))
            raise InvalidDatasetError(
                f"Expected a split valid and none called test for --use-valid-as-test. Received: {found}. Omit it."
            )
        notes.append("valid is used as test")
        entries = tuple(replace(e, split="test") if e.split == "valid" else e for e in layout.entries)
        layout, splits = replace(layout, entries=entries), {entry.split for entry in entries}
    if splits != {None} and (None in splits or "train" not in splits):
        found = ", ".join(sorted(split or "(none)" for split in splits))
        raise InvalidDatasetError(
            f"Expected the split train (from which test, valid and reference can be taken), or no splits at all, in "
            f"{root.path}. Received: {found}. Add what is missing, or give the images without splits."
        )
    if missing := [split for split in SPLITS if split not in splits]:
        origin = "all images" if splits == {None} else "train"
        notes.append(f"{', '.join(missing)}: taken from {origin} when the dataset is used, seeded, by its fractions")
    return replace(layout, notes=(*layout.notes, *notes))


def _said_of(converted: frozenset[str], staging: Staging, above: int) -> Iterator[str]:
    if converted:
        example = min(converted)
        yield f"made JPEG of HEIC and AVIF, which the service does not take: {len(converted)}, such as {example}"
    if staging.stays:
        yield f"left in place, in {staging.root}: DVC holds the sha256 of each"
    if staging.is_tarred:
        yield f"stored as tars, as they are more than {above:,}"


def _canonical(layout: Layout, converted: frozenset[str]) -> tuple[ImageEntry, ...]:
    """Names folders train, valid, test and reference, and classes and files in NFC, whatever they were called."""
    entries: list[ImageEntry] = []
    for entry in layout.entries:
        path = normalize("NFC", entry.path)
        if entry.path in converted and not path.lower().endswith((SUFFIX, ".jpeg")):
            path += SUFFIX
        if layout.labels_from == "folders":
            path = "/".join([*([entry.split] if entry.split else []), *entry.labels, PurePosixPath(path).name])
        entries.append(replace(entry, path=path))
    twice = [path for path, count in Counter(entry.path for entry in entries).items() if count > 1]
    if twice:
        raise InvalidDatasetError(
            f"Expected each name once, whatever form its accents have. Received twice: {', '.join(twice[:5])}. "
            "Rename one of each."
        )
    return tuple(entries)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def store_version(
    repository: Path,
    tag: str,
    scratch: Path,
    annotations: bytes | None,
    message: str,
    beside: Mapping[str, bytes] | None = None,
) -> StoredVersion:
    """Adds `scratch/images` to a repository, which is made if it is missing; call it under its lock.

    Args:
        repository: of the dataset.
        tag: of the new version; the same content under the same tag changes nothing.
        scratch: what is in its folder of images goes to DVC's cache.
        annotations: the labels, where they do not follow from the folders.
        message: of the commit.
        beside: more files of the commit, by path.

    Raises:
        InvalidDatasetError: the tag exists with other content.
        DatasetError: git or DVC fails, or something else is at `repository`.
    """
    files = {"annotations": annotations, "message": message, "beside": beside}
    if not repository.exists():
        with whole_directory(repository) as partial:
            create_repository(partial)
            version = commit_version(partial, tag, dvc_file=store_images(scratch, repository=partial), **files)
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
    return commit_version(repository, tag, dvc_file=dvc_file, **files)
