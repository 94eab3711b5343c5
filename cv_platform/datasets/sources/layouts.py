"""What a folder of images says about them: class folders, split and class folders, or label files.

Importing and the manifest read folders through here, so that what was imported is what is found again.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from unicodedata import normalize

from cv_platform.config import is_class_name
from cv_platform.datasets.sources.entries import (
    ACCOMPANYING,
    NO_CLASS_FOLDER,
    NOT_AN_IMAGE,
    UNLABELLED,
    UNWANTED_CLASS,
    ImageEntry,
    LabelSource,
    Layout,
    LeftOut,
    split_of,
)
from cv_platform.datasets.sources.exports import EXPORT_SUFFIXES, merged, read_export
from cv_platform.datasets.sources.label_files import LABEL_FILES, LabelRules, read_labels, read_rows
from cv_platform.datasets.sources.tree import Folder
from cv_platform.errors import InvalidDatasetError
from cv_platform.images.files import TEXT_SUFFIXES
from cv_platform.predictions import LABEL_SEPARATOR, UNKNOWN_LABELS

_NO_CLASSES = frozenset({"images", "image", "imgs", "img", "labels", "masks", "annotations", "jpegimages"})
"""Folders of datasets for other tasks (detection, segmentation), or of images without labels."""


def read_layout(root: Folder, annotations: bytes | None, rules: LabelRules, *, name: str = "annotations") -> Layout:
    """Lists the images of `root` with splits and labels.

    Args:
        root: the images.
        annotations: content of a label file that lies elsewhere; without one, `LAYOUTS` are tried.
        rules: what the caller has decided.
        name: of the label file, for messages.

    Raises:
        InvalidDatasetError: no layout fits, or what fits is broken; all mistakes are listed.
    """
    if annotations is not None:
        layout = read_labels(root, annotations, rules, name=name)
    else:
        layout = next(found for read in LAYOUTS if (found := read(root, rules)) is not None)
    for folder in root.below():
        inside = folder.path.relative_to(root.path)
        litter = ((inside / name).as_posix() for name in (*folder.litter, *folder.broken))
        layout.left_out.add("litter, hidden or a broken link", litter)
    if not layout.entries and not layout.left_out.lost().counts():
        raise _refusal(root, "none")
    unusable = [name for name in layout.class_names if LABEL_SEPARATOR in name or not is_class_name(name)]
    if unusable:
        raise InvalidDatasetError(
            f"Expected class names of up to 100 characters without {LABEL_SEPARATOR!r}, slashes or control characters. "
            f"Received: {', '.join(ascii(name)[:80] for name in unusable)}. Rename them."
        )
    if strange := sorted({name for e in layout.entries for name in e.unknown_labels} - set(layout.class_names)):
        raise InvalidDatasetError(
            f"Expected names of classes in the column {UNKNOWN_LABELS} of {name}. Received: {', '.join(strange[:5])}, "
            f"which no image has as a label; the classes are {', '.join(layout.class_names)}. Correct the names."
        )
    for entry in layout.entries:
        try:
            entry.path.encode()
        except UnicodeEncodeError as err:
            raise InvalidDatasetError(f"Expected file names in UTF-8. Received: {entry.path!r}. Rename it.") from err
    return layout


def write_annotations(entries: Iterable[ImageEntry]) -> bytes:
    """Returns `annotations.csv` in one form, whatever it came in: path, label; split, group, unknown labels if any."""
    entries = tuple(entries)
    beside = [name for name in ("split", "group") if any(getattr(entry, name) for entry in entries)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("labels", "unknown_labels") if any(entry.unknown_labels for entry in entries) else ("labels",)
    writer.writerow(["path", *beside, "label", *names[1:]])
    for entry in entries:
        cells = [getattr(entry, name) or "" for name in beside]
        writer.writerow([entry.path, *cells, *(LABEL_SEPARATOR.join(getattr(entry, name)) for name in names)])
    return text.getvalue().encode()


def descend(root: Folder) -> Folder:
    """Steps through single wrapping folders, as archives have them."""
    while not root.images and len(root.folders) == 1 and _label_file(root) is None:
        (inner,) = root.folders
        if split_of(inner.name) or (inner.images and _label_file(inner) is None):
            break
        root = inner
    return root


def _one_label_file(root: Folder, rules: LabelRules) -> Layout | None:
    if rules.is_stored or (path := _label_file(root)) is None:
        return None
    return read_labels(root, _content(path), rules, name=path.name)


def _one_export(root: Folder, rules: LabelRules) -> Layout | None:
    """Reads what labelling tools put beside the images under names of their own, or into a folder of annotations."""
    if rules.is_stored:
        return None
    beside = [root.path / name for name in root.files if name.lower().endswith(EXPORT_SUFFIXES)]
    folders = [folder for folder in root.folders if folder.name.lower() in {"annotations", "annotation"}]
    inside = [folder.path / name for folder in folders for name in folder.files if name.lower().endswith(".json")]
    instances = [path for path in inside if path.name.startswith("instances_")]  # COCO has captions there, too.
    found = [
        (path, export)
        for path in beside or instances or inside
        if (export := read_export(_content(path), path.name, classes=rules.classes)) is not None
    ]
    if beside and len(found) > 1:
        names = ", ".join(path.name for path, _ in found)
        raise InvalidDatasetError(
            f"Expected one export beside the images of {root.path}. Received: {names}. Name one by --annotations."
        )
    if not found:
        return None
    names = ", ".join(path.name for path, _ in found)
    return read_rows(root, merged(export for _, export in found), rules, name=names)


def _label_file_per_split(root: Folder, rules: LabelRules) -> Layout | None:
    splits = {} if rules.is_stored else _split_folders(root)
    found = {folder: path for folder in splits if (path := _label_file(folder)) is not None}
    if not found:
        return None
    left_out = LeftOut()
    left_out.add(ACCOMPANYING, root.files)
    entries: list[ImageEntry] = []
    notes: dict[str, None] = {}
    class_names: dict[str, tuple[str, ...]] = {}
    sources: set[LabelSource] = set()
    for folder in root.folders:
        if folder not in found:
            if splits.get(folder) == "train" and folder.has_images:
                files = ", ".join(f"{other.name}/{path.name}" for other, path in found.items())
                raise InvalidDatasetError(
                    f"Expected a label file in {folder.name}/ of {root.path}, too. Received: {files}. "
                    "Add one, or move these away where the folders' names are the classes."
                )
            left_out.add(f"in {folder.name}/, which has no label file", folder.image_paths(root))
            continue
        name = f"{folder.name}/{found[folder].name}"
        layout = read_labels(folder, _content(found[folder]), rules, name=name)
        entries += [
            replace(entry, path=f"{folder.name}/{entry.path}", split=splits[folder]) for entry in layout.entries
        ]
        for reason, paths in layout.left_out.paths.items():
            left_out.add(reason, (f"{folder.name}/{path}" for path in paths))
        notes |= dict.fromkeys(layout.notes)
        class_names[name] = layout.class_names
        sources.add(layout.labels_from)
        if layout.labels_from == "class columns" and set(layout.class_names) != set(next(iter(class_names.values()))):
            columns = "; ".join(f"{file}: {', '.join(names)}" for file, names in class_names.items())
            raise InvalidDatasetError(
                f"Expected the same columns of classes in each split. Received: {columns}. Name them by --classes."
            )
    names, *others = class_names.values()
    if any(other != names for other in others):
        names = tuple(sorted({name for names in class_names.values() for name in names}))
    title = f"the label files {', '.join(class_names)}"
    return Layout(title, _by_path(entries), names, left_out, tuple(notes), min(sources))


def _split_and_class_folders(root: Folder, rules: LabelRules) -> Layout | None:
    splits = {folder: (split, _unwrapped(folder)) for folder, split in _split_folders(root).items()}
    labelled = [folder for folder, (_, inner) in splits.items() if any(child.has_images for child in inner.folders)]
    others = [folder for folder in root.folders if folder not in splits and folder.has_images]
    if splits and not labelled and not others:
        flat = [path for folder in splits for path in folder.image_paths(root)]
        if flat:
            names = ", ".join(folder.name for folder in splits)
            raise _refusal(root, f"the splits {names} with images directly in them ({flat[0]}) and no labels")
    if not labelled:
        return None  # A class may be called `train` (beside `car` and `plane`).
    if others:
        raise InvalidDatasetError(
            f"Expected only folders of splits beside {', '.join(folder.name for folder in splits)} in {root.path}. "
            f"Received also: {', '.join(folder.name for folder in others)}. "
            "Move these into a split, or remove the split folders."
        )
    left_out = LeftOut()
    class_folders: list[tuple[str | None, Folder]] = []
    for folder, (split, inner) in splits.items():
        names = {child.name.lower() for child in inner.folders}
        if folder not in labelled or (names <= _NO_CLASSES | {folder.name.lower(), "unknown"} and split != "train"):
            left_out.add(f"in {folder.name}/, which has no labels", folder.image_paths(root))
            continue
        class_folders += [(split, child) for child in inner.folders]
        inside, images = inner.inside(root), frozenset(inner.images)
        for name in inner.files:
            left_out.add(NO_CLASS_FOLDER if name in images else ACCOMPANYING, [inside + name])
    for folder in root.folders:
        if folder not in splits:
            left_out.add(ACCOMPANYING, folder.paths(root))
    shown = ", ".join(folder.name for folder in labelled)
    return _from_class_folders(root, class_folders, f"split and class folders ({shown})", rules, left_out)


def _class_folders(root: Folder, rules: LabelRules) -> Layout:
    if root.images:
        raise _refusal(root, f"{len(root.images)} directly in it, such as {root.images[0]}")
    left_out = LeftOut()
    folders: list[tuple[str | None, Folder]] = []
    for folder in root.folders:
        paths = list(folder.paths(root))
        if paths and all(Path(path).suffix.lower() in TEXT_SUFFIXES for path in paths):
            left_out.add(ACCOMPANYING, paths)
        else:
            folders.append((None, folder))
    return _from_class_folders(root, folders, "class folders", rules, left_out)


class LayoutReader(Protocol):
    """Reads sources of one layout.

    How to add one: such a function in this module, its name in `LAYOUTS`, of which the first that answers counts, and a
    row in docs/reference/import.md.
    """

    def __call__(self, root: Folder, rules: LabelRules) -> Layout | None:
        """Returns what the source holds, or None where it is of another layout.

        Raises:
            InvalidDatasetError: it is of this one, and broken.
        """
        ...


LAYOUTS: tuple[LayoutReader, ...] = (
    _one_label_file,
    _label_file_per_split,
    _one_export,
    _split_and_class_folders,
    _class_folders,
)


def _from_class_folders(
    root: Folder, folders: list[tuple[str | None, Folder]], title: str, rules: LabelRules, left_out: LeftOut
) -> Layout:
    left_out.add(ACCOMPANYING, root.files)
    nothing = set() if rules.is_stored else UNLABELLED - set(rules.classes or ())
    names = {_class_name(folder) for _, folder in folders if _class_name(folder).lower() not in nothing}
    if names and {name.lower() for name in names} <= _NO_CLASSES:
        raise _refusal(root, f"folders that name no classes: {', '.join(sorted(names))}")
    entries: list[ImageEntry] = []
    for split, folder in folders:
        name, inside = _class_name(folder), folder.inside(root)
        if name not in names:
            left_out.add(f"in folders {folder.name}, which means no label", folder.image_paths(root))
        elif rules.classes is not None and name not in rules.classes:
            left_out.add(UNWANTED_CLASS, folder.image_paths(root))
        elif nested := [child.name for child in folder.folders if any(child.paths(root))]:
            raise InvalidDatasetError(
                f"Expected images directly in the class folder {inside[:-1]} of {root.path}. "
                f"Received: the folder {inside}{nested[0]}. Arrange them as CLASS/image.jpg or SPLIT/CLASS/image.jpg."
            )
        else:
            images, labels = frozenset(folder.images), (name,)
            for file in folder.files:
                path = inside + file
                if file in images:
                    entries.append(ImageEntry(path, split, labels))
                else:
                    is_text = Path(file).suffix.lower() in TEXT_SUFFIXES
                    left_out.add(folder.unreadable.get(file, ACCOMPANYING if is_text else NOT_AN_IMAGE), [path])
    return Layout(title, _by_path(entries), rules.classes or tuple(sorted(names)), left_out)


def _split_folders(root: Folder) -> dict[Folder, str]:
    splits = {folder: split for folder in root.folders if (split := split_of(folder.name)) is not None}
    for split, count in Counter(split for folder, split in splits.items() if folder.has_images).items():
        if count > 1:
            names = ", ".join(folder.name for folder, name in splits.items() if name == split)
            raise InvalidDatasetError(
                f"Expected one folder for the split {split} in {root.path}. Received: {names}. Merge or rename them."
            )
    return splits


def _unwrapped(folder: Folder) -> Folder:
    """Steps through single folders that are called like the split or `images`, as in `test_set/test_set/CLASS`."""
    split = split_of(folder.name)
    while not folder.images and len(folder.folders) == 1:
        (inner,) = folder.folders
        if (split_of(inner.name) != split and inner.name.lower() not in _NO_CLASSES) or not inner.folders:
            break
        folder = inner
    return folder


def _label_file(folder: Folder) -> Path | None:
    return next((folder.path / name for name in LABEL_FILES if name in folder.files), None)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise InvalidDatasetError(f"Expected labels in {path}. Received: {err.strerror}. Correct its rights.") from err


def _class_name(folder: Folder) -> str:
    return normalize("NFC", folder.name)


def _by_path(entries: Iterable[ImageEntry]) -> tuple[ImageEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _refusal(root: Folder, received: str) -> InvalidDatasetError:
    unread = [name for name in root.files if Path(name).suffix.lower() in {".csv", ".tsv", ".json", ".jsonl"}]
    hints = [f"Labels may be in {', '.join(unread)}: name it by --annotations."] if unread else []
    hints += [f"{name} stands for images that `dvc pull` would fetch." for name in root.files if name.endswith(".dvc")]
    return InvalidDatasetError(
        f"Expected images in class folders of {root.path}. Received: {received}. "
        "Arrange them as CLASS/image.jpg or SPLIT/CLASS/image.jpg, or put a label file beside them (such as "
        f"metadata.csv with file_name and label); docs/reference/import.md has all layouts. {' '.join(hints)}".rstrip()
    )
