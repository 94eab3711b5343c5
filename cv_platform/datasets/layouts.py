"""What a folder of images says about them: class folders, split/class folders, or a CSV beside the images.

    cat/1.jpg                          class folders
    train/cat/1.jpg, test/cat/2.jpg    split/class folders (train, valid or val or validation, test, reference)
    annotations.csv                    path (or image, filename), optional split, and either label (several joined
                                       by `|`) or one column of 0 and 1 per class

Importing and the manifest read folders through here, so that what was imported is what is found again.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cv_platform.datasets.splits import SPLITS
from cv_platform.errors import InvalidDatasetError
from cv_platform.predictions import LABEL_SEPARATOR

IMAGE_SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SPLIT_ALIASES = {**{split: split for split in SPLITS}, "val": "valid", "validation": "valid"}
_PATH_COLUMNS = ("path", "image", "filename")
_TRUE, _FALSE = {"1", "1.0", "true"}, {"0", "0.0", "false", ""}
_SHOWN = 10


@dataclass(frozen=True)
class ImageEntry:
    """One image: POSIX path relative to its folder, split (None without splits) and class names."""

    path: str
    split: str | None
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """What a folder holds.

    Attributes:
        entries: the images by path.
        class_names: all classes, also those without images; sorted, or in the order of the CSV's columns.
        ignored: files that are no images by their suffix, or not in the CSV.
    """

    entries: tuple[ImageEntry, ...]
    class_names: tuple[str, ...]
    ignored: tuple[str, ...]


def read_layout(folder: Path, annotations: bytes | None) -> Layout:
    """Lists the images of `folder` with splits and labels.

    Args:
        folder: the images.
        annotations: content of a CSV; without one, the folders' names are the labels.

    Raises:
        InvalidDatasetError: neither layout fits; all mistakes are listed.
    """
    layout = _read_folders(folder) if annotations is None else _read_csv(folder, annotations)
    if not layout.entries:
        raise InvalidDatasetError(
            f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in class folders of {folder}. Received: none. "
            "Arrange them as CLASS/image.jpg or SPLIT/CLASS/image.jpg, or add annotations.csv."
        )
    unusable = [name for name in layout.class_names if LABEL_SEPARATOR in name]
    if unusable:
        raise InvalidDatasetError(f"Expected class names without {LABEL_SEPARATOR!r}. Received: {', '.join(unusable)}.")
    for entry in layout.entries:
        try:
            entry.path.encode()
        except UnicodeEncodeError as err:
            raise InvalidDatasetError(f"Expected file names in UTF-8. Received: {entry.path!r}. Rename it.") from err
    return layout


def write_annotations(entries: tuple[ImageEntry, ...]) -> bytes:
    """Returns `annotations.csv` in one form (path, split if there are splits, label), whatever form it came in."""
    has_splits = any(entry.split for entry in entries)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", *(["split"] if has_splits else []), "label"])
    for entry in entries:
        writer.writerow([entry.path, *([entry.split or ""] if has_splits else []), LABEL_SEPARATOR.join(entry.labels)])
    return text.getvalue().encode()


def visible(folder: Path) -> list[Path]:
    """Lists a folder's content by name, without hidden files and what archivers and desktops leave behind."""
    return sorted(
        (path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX")) and path.name != "Thumbs.db"),
        key=lambda path: path.name,
    )


def is_image_name(path: Path) -> bool:
    """Tells from the suffix."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def has_images(folder: Path) -> bool:
    """Tells whether images lie directly in `folder`."""
    return any(is_image_name(path) and path.is_file() for path in visible(folder))


def _read_folders(folder: Path) -> Layout:
    folders = [path for path in visible(folder) if path.is_dir()]
    ignored = [path.name for path in visible(folder) if not path.is_dir()]
    loose = [name for name in ignored if is_image_name(Path(name))]
    if loose:
        raise InvalidDatasetError(
            f"Expected images in class folders of {folder}. Received: {len(loose)} directly in it, such as {loose[0]}. "
            "Move them into a folder named after their class, or add annotations.csv."
        )
    # A class may be called `train` (beside `car` and `plane`): then images lie in it, not folders.
    split_folders = {
        path: SPLIT_ALIASES[path.name] for path in folders if path.name in SPLIT_ALIASES and not has_images(path)
    }
    if split_folders and len(split_folders) < len(folders):
        others = ", ".join(path.name for path in folders if path not in split_folders)
        raise InvalidDatasetError(
            f"Expected only split folders ({', '.join(SPLIT_ALIASES)}) in {folder}. Received also: {others}. "
            "Move these into a split, or remove the split folders."
        )
    twice = [split for split, count in Counter(split_folders.values()).items() if count > 1]
    if twice:
        raise InvalidDatasetError(
            f"Expected one folder for the split {twice[0]} in {folder}. Received: several names of it. Merge them."
        )
    class_folders: list[tuple[str | None, Path]] = [(None, path) for path in folders]
    if split_folders:
        class_folders = []
        for path, split in split_folders.items():
            class_folders += [(split, child) for child in visible(path) if child.is_dir()]
            ignored += [f"{path.name}/{child.name}" for child in visible(path) if not child.is_dir()]
    entries = []
    for split, path in class_folders:
        for child in visible(path):
            relative = child.relative_to(folder).as_posix()
            if child.is_dir():
                raise InvalidDatasetError(
                    f"Expected images directly in the class folder {path.relative_to(folder)} of {folder}. "
                    f"Received: the folder {relative}. Arrange images as CLASS/image.jpg or SPLIT/CLASS/image.jpg."
                )
            if is_image_name(child):
                entries.append(ImageEntry(relative, split, (path.name,)))
            else:
                ignored.append(relative)
    names = tuple(sorted({path.name for _, path in class_folders}))
    return Layout(tuple(sorted(entries, key=lambda entry: entry.path)), names, tuple(sorted(ignored)))


def _read_csv(folder: Path, annotations: bytes) -> Layout:
    try:
        reader = csv.reader(io.StringIO(annotations.decode("utf-8-sig"), newline=""), strict=True)
        rows = [row for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as err:
        raise InvalidDatasetError(f"Expected annotations as a CSV in UTF-8. Received: {err}. Save it as such.") from err
    header = [name.strip() for name in rows[0]] if rows else []
    place = {name.lower(): at for at, name in enumerate(header)}
    path_at = next((place[name] for name in _PATH_COLUMNS if name in place), None)
    if path_at is None or len(place) != len(header):
        raise InvalidDatasetError(
            f"Expected annotations with a column {' or '.join(_PATH_COLUMNS)}, and each name once. "
            f"Received: {', '.join(header) or 'no header'}."
        )
    split_at, label_at = place.get("split"), place.get("label")
    class_at: dict[int, str] = {}
    if label_at is None:
        class_at = {at: name for at, name in enumerate(header) if at not in {path_at, split_at}}
    if label_at is None and not class_at:
        raise InvalidDatasetError(
            f"Expected annotations with a column label, or one of 0 and 1 per class. Received: {', '.join(header)}."
        )
    mistakes: list[str] = []
    entries: dict[str, ImageEntry] = {}
    for number, cells in enumerate(rows[1:], start=2):
        if len(cells) != len(header):
            mistakes.append(f"row {number}: {len(cells)} cells instead of {len(header)}")
            continue
        path = PurePosixPath(cells[path_at].strip().replace("\\", "/"))
        if path.parts[:1] == (folder.name,) and not (folder / path).is_file():
            path = PurePosixPath(*path.parts[1:])  # A CSV beside the folder of images names the folder too.
        name = path.as_posix()
        split_name = cells[split_at].strip().lower() if split_at is not None else ""
        labels: list[str] = []
        if label_at is not None:
            labels = [part.strip() for part in cells[label_at].split(LABEL_SEPARATOR) if part.strip()]
        for at, class_name in class_at.items():
            value = cells[at].strip().lower()
            if value in _TRUE:
                labels.append(class_name)
            elif value not in _FALSE:
                mistakes.append(f"row {number}: {cells[at]!r} in the class column {class_name} instead of 0 or 1")
        if path.is_absolute() or ".." in path.parts or name == ".":
            mistakes.append(f"row {number}: {cells[path_at]!r} instead of a path relative to the images")
        elif split_name and split_name not in SPLIT_ALIASES:
            mistakes.append(f"row {number}: split {cells[split_at or 0]!r} instead of {', '.join(SPLITS)}")
        elif name in entries:
            mistakes.append(f"row {number}: {name} for the second time")
        elif not (folder / path).is_file():
            mistakes.append(f"row {number}: {name} is not in {folder}")
        else:
            entries[name] = ImageEntry(name, SPLIT_ALIASES.get(split_name), tuple(sorted(set(labels))))
    if mistakes:
        shown = "\n".join(f"  {mistake}" for mistake in mistakes[:_SHOWN])
        more = f"\n  and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
        raise InvalidDatasetError(f"Expected one correct row per image in the annotations. Received:\n{shown}{more}")
    used = {label for entry in entries.values() for label in entry.labels}
    names = tuple(class_at.values()) or tuple(sorted(used))
    files = (path for path in folder.rglob("*") if path.is_file() and is_image_name(path))
    present = (path.relative_to(folder).as_posix() for path in files)
    ignored = tuple(sorted(path for path in present if path not in entries))
    return Layout(tuple(entries[name] for name in sorted(entries)), names, ignored)
