"""Files that say which image has which labels: CSV in its dialects, and JSON lines.

A new dialect is a name in one of the tables below. Where a file can be read in two ways, it is refused with a question:
a column that becomes a class by mistake is a model that nobody wanted.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, Literal, cast
from unicodedata import normalize

from cv_platform.datasets.sources.entries import (
    ACCOMPANYING,
    NOT_IN_LABEL_FILE,
    UNLABELLED,
    UNWANTED_CLASS,
    ImageEntry,
    LabelSource,
    Layout,
    LeftOut,
    split_of,
)
from cv_platform.datasets.sources.exports import Export, locate, read_export
from cv_platform.datasets.sources.tree import Folder
from cv_platform.datasets.splits import SPLITS
from cv_platform.errors import InvalidDatasetError
from cv_platform.predictions import LABEL_SEPARATOR, UNKNOWN_LABELS

LABEL_FILES = (
    *("annotations.csv", "annotations.tsv", "annotation_df.csv", "metadata.csv", "metadata.jsonl", "_classes.csv"),
    *("labels.csv", "labels.tsv", "_annotations.coco.json", "annotations.xml", "labels.json"),
)
"""Found by these names, in this order: ours, the original's, Hugging Face's, Roboflow's, the usual one, exports'."""
PATH_COLUMNS = (
    *("path", "abs_path", "file_path", "filepath", "image_path", "file_name", "filename", "image", "image_name"),
    *("file", "img", "image_id", "id"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
GROUP_COLUMN = "group"
LABEL_COLUMNS = ("label", "labels", "class", "classes", "class_name", "category", "target")
_ROW_NUMBERS = ("", "index", "unnamed:_0")
"""Of what pandas writes beside the data."""
_DOUBTFUL_COLUMN = re.compile(r"(is|has)_.*|fold|valid|verified|checked|reviewed|difficult|crowd|occluded|truncated")
"""Names of columns of 0 and 1 that often say something else than a class."""
_TRUE, _FALSE = {"1", "1.0", "true"}, {"0", "0.0", "false"}
_BLANK, _UNCERTAIN = {"", "nan", "na", "n/a", "null"}, {"-1", "-1.0"}
_BINARY = _TRUE | _FALSE | _BLANK | _UNCERTAIN
_SHOWN = 10


@dataclass(frozen=True)
class LabelRules:
    """How a label file is read.

    Attributes:
        classes: the class columns or labels that count; None: found by their values.
        is_stored: it is a version's own, which means what it meant when it was stored: labels are joined by a bar only,
            splits are those written.
        group: the column of what splits never divide (a patient, a video); None: one that is called group, if any.
        unknown: what blank and −1 in a class's column mean, and the column `unknown_labels` beside one of labels: no
            (`negative`), or that nobody knows (`ignore`); None: the former of cells, the latter of that column.
    """

    classes: tuple[str, ...] | None = None
    is_stored: bool = False
    group: str | None = None
    unknown: Literal["negative", "ignore"] | None = None


@dataclass(frozen=True)
class _Columns:
    header: list[str]
    path: int
    split: int | None
    label: int | None
    group: int | None
    unknown: int | None
    classes: dict[int, str]
    notes: tuple[str, ...]


def read_labels(folder: Folder, content: bytes, rules: LabelRules, *, name: str) -> Layout:
    """Lists the images that a label file names, with splits and labels; `name` is for messages.

    Raises:
        InvalidDatasetError: the file or its columns cannot be understood, or rows are wrong; all of them are listed.
    """
    if not rules.is_stored and (export := read_export(content, name, classes=rules.classes)) is not None:
        return read_rows(folder, export, rules, name=name)
    header, rows = _read_table(content, name)
    columns = _understand(header, rows, rules, name)
    files = _Files(folder)
    separator = _separator(columns, rows, rules)
    mistakes: list[str] = []
    doubts: Counter[str] = Counter()
    left_out = LeftOut()
    entries: dict[str, ImageEntry] = {}
    keeps_unknown = rules.unknown == "ignore" or (rules.unknown is None and columns.unknown is not None)
    for number, cells in enumerate(rows, start=2):
        if len(cells) != len(header):
            mistakes.append(f"row {number}: {len(cells)} cells instead of {len(header)}")
            continue
        labels, unknown, wrong = _labels(cells, columns, separator, doubts)
        mistakes += [f"row {number}: {text}" for text in wrong]
        split_name = cells[columns.split].strip() if columns.split is not None else ""
        split = split_of(split_name)
        path, problem = files.find(cells[columns.path].strip())
        if split_name and split is None:
            mistakes.append(f"row {number}: split {split_name!r} instead of {', '.join(SPLITS)}")
        elif path is None:
            mistakes.append(f"row {number}: {problem}")
        elif path in entries:
            mistakes.append(f"row {number}: {path} for the second time")
        else:
            group = normalize("NFC", cells[columns.group].strip()) if columns.group is not None else ""
            entries[path] = ImageEntry(path, split, labels, group or None, unknown if keeps_unknown else ())
    _refuse(mistakes, name)
    notes = list(columns.notes)
    if separator is not None and any(separator in row[columns.label or 0] for row in rows):
        notes.append(f"labels joined by {separator!r} are several labels")
    if doubts:
        said = " and ".join(f"{count} {kind}" for kind, count in sorted(doubts.items()))
        place = "the columns of classes" if columns.label is None else f"the column {UNKNOWN_LABELS}"
        meaning = "are unknown (--unknown ignore)" if keeps_unknown else "count as negative (--unknown negative)"
        notes.append(f"{name}: {said} in {place} {meaning}")
    kept = _without_unlabelled(entries.values(), rules, left_out)
    if columns.split is None and not rules.is_stored:
        kept = _splits_by_folder(kept, notes)
    if blank := sum(not (entry.labels or entry.unknown_labels) for entry in kept):
        notes.append(f"{name}: {blank} images without a label (multi-label: of no class; multi-class refuses them)")
    _leave_out_others(folder, entries, left_out)
    source: LabelSource = "class columns" if columns.label is None else "label column"
    kept, names = _only_wanted(kept, rules, left_out) if source == "label column" else (kept, rules.classes)
    names = names or tuple(columns.classes.values())
    kept.sort(key=lambda entry: entry.path)
    return Layout(f"the label file {name}", tuple(kept), names, left_out, tuple(notes), source)


def read_rows(folder: Folder, export: Export, rules: LabelRules, *, name: str) -> Layout:
    """Lists the images that a labelling tool's export names; see `read_labels`.

    Raises:
        InvalidDatasetError: the file of a row is missing, or of several.
    """
    files, left_out, notes = _Files(folder), LeftOut(), list(export.notes)
    mistakes: list[str] = []
    entries: dict[str, ImageEntry] = {}
    for row in export.rows:
        path, problem = locate(row, files.find)
        if path is None:
            mistakes.append(problem)
        elif path in entries:
            mistakes.append(f"{path} for the second time")
        else:
            entries[path] = ImageEntry(path, row.split, tuple(sorted(normalize("NFC", label) for label in row.labels)))
    _refuse(mistakes, name)
    for reason, paths in export.without.items():
        left_out.add(reason, paths)
    unlabelled = {files.find(path)[0] for paths in export.without.values() for path in paths}
    kept = _without_unlabelled(entries.values(), rules, left_out)
    if all(entry.split is None for entry in kept):
        kept = _splits_by_folder(kept, notes)
    _leave_out_others(folder, entries.keys() | unlabelled, left_out)
    kept, names = _only_wanted(kept, rules, left_out)
    kept.sort(key=lambda entry: entry.path)
    return Layout(export.kind, tuple(kept), names, left_out, tuple(notes), "label column")


def _refuse(mistakes: list[str], name: str) -> None:
    if mistakes:
        shown = "\n".join(f"  {mistake}" for mistake in mistakes[:_SHOWN])
        more = f"\n  and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
        raise InvalidDatasetError(
            f"Expected one correct row per image in {name}. Received:\n{shown}{more}\n"
            "Correct them; or, where the folders' names are the classes, move the file away."
        )


def _leave_out_others(folder: Folder, named: Container[str], left_out: LeftOut) -> None:
    images = set(folder.image_paths(folder))
    for path in folder.paths(folder):
        if path not in named and path not in LABEL_FILES:
            left_out.add(NOT_IN_LABEL_FILE if path in images else ACCOMPANYING, [path])


def _only_wanted(
    entries: list[ImageEntry], rules: LabelRules, left_out: LeftOut
) -> tuple[list[ImageEntry], tuple[str, ...]]:
    """Returns the entries with the labels that `--classes` names, and the classes."""
    if rules.classes is None:
        return entries, tuple(sorted({label for entry in entries for label in entry.labels}))
    wanted = set(rules.classes)
    left_out.add(UNWANTED_CLASS, (e.path for e in entries if e.labels and not set(e.labels) & wanted))
    kept = [
        replace(
            entry,
            labels=tuple(label for label in entry.labels if label in wanted),
            unknown_labels=tuple(label for label in entry.unknown_labels if label in wanted),
        )
        for entry in entries
        if not entry.labels or set(entry.labels) & wanted
    ]
    return kept, rules.classes


def _read_table(content: bytes, name: str) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows that are not empty, as text."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        if text.lstrip().startswith("{"):
            return _read_json_lines(text)
        text = re.sub(r"\A\s*sep=.\r?\n", "", text)  # Excel's own line, which says no more than the header does.
        first = text.lstrip("\r\n").partition("\n")[0]
        delimiter = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [row for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error, ValueError, RecursionError) as err:
        raise InvalidDatasetError(
            f"Expected {name} as a CSV (or JSON lines) in UTF-8. Received: {err}. Save it as such."
        ) from err
    return ([normalize("NFC", cell.strip()) for cell in rows[0]], rows[1:]) if rows else ([], [])


def _read_json_lines(text: str) -> tuple[list[str], list[list[str]]]:
    def cell(value: object) -> str:
        if isinstance(value, list):
            return LABEL_SEPARATOR.join(map(cell, cast(list[object], value)))
        if value is None or isinstance(value, bool):
            return "" if value is None else str(int(value))
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)

    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            rows.append(cast(dict[str, Any], row))
    header = list(dict.fromkeys(key for row in rows for key in row))
    return [normalize("NFC", key.strip()) for key in header], [[cell(row.get(key)) for key in header] for row in rows]


def _understand(header: list[str], rows: list[list[str]], rules: LabelRules, name: str) -> _Columns:
    keys = [re.sub(r"[\s-]+", "_", column.lower()) for column in header]
    place = {key: at for at, key in enumerate(keys)}
    paths = [place[key] for key in PATH_COLUMNS if key in place]
    repeated = sorted({column for column in header if header.count(column) > 1})
    if not paths or repeated:
        twice = f", of these twice: {', '.join(repeated)}" if repeated else ""
        raise InvalidDatasetError(
            f"Expected {name} with a column of the images ({', '.join(PATH_COLUMNS)}), and each name once. "
            f"Received: {', '.join(header) or 'no header'}{twice}. "
            "Rename a column; or, where the folders' names are the classes, move the file away."
        )
    split = next((place[key] for key in SPLIT_COLUMNS if key in place), None)
    label = next((place[key] for key in LABEL_COLUMNS if key in place), None)
    group = _group_column(header, keys, label, rules, name)
    taken = {*paths, *(at for at in (split, group) if at is not None)}
    unknown = place.get(UNKNOWN_LABELS) if label is not None else None
    taken |= set() if unknown is None else {unknown}
    others = [at for at, key in enumerate(keys) if at not in taken and key not in _ROW_NUMBERS]
    found, is_binary = _values(rows, others)
    doubtful = [at for at in others if at not in is_binary or _DOUBTFUL_COLUMN.fullmatch(keys[at])]
    if len(others) == 1 and label is None and rules.classes is None and not (is_binary and doubtful):
        label = others[0]
    classes: dict[int, str] = {}
    why = ""
    if rules.classes is not None and set(rules.classes) <= set(header):
        classes, why = {header.index(column): column for column in rules.classes}, "named by --classes"
        label = unknown = None
    elif label is None:
        classes, why = {at: header[at] for at in others}, "every value is 0 or 1"
        missing = [] if rules.classes is None else [column for column in rules.classes if column not in header]
        if not others or (not rules.is_stored and (missing or doubtful)):
            raise _question(name, header, others, found, is_binary, doubtful, missing)
    notes = [f"the image is the column {header[paths[0]]}"]
    if split is not None:
        notes.append(f"the split is the column {header[split]}")
    if group is not None:
        notes.append(f"the group is the column {header[group]}: splits that are made never divide one")
    if label is not None:
        notes.append(f"the labels are the column {header[label]}")
        notes += [] if unknown is None else [f"labels that nobody knows are the column {header[unknown]}"]
    else:
        notes.append(f"classes are the columns {', '.join(classes.values())}: {why}")
    if unused := [
        header[at] or "(no name)"
        for at in range(len(header))
        if at not in {paths[0], split, label, group, unknown, *classes}
    ]:
        notes.append(f"not used are the columns {', '.join(unused)}")
    return _Columns(header, paths[0], split, label, group, unknown, classes, tuple(notes))


def _group_column(header: list[str], keys: list[str], label: int | None, rules: LabelRules, name: str) -> int | None:
    """Returns the column of groups: the one that the user names, or one that is called so beside the labels."""
    if rules.group is None:
        at = keys.index(GROUP_COLUMN) if GROUP_COLUMN in keys else None
        return None if label is None and len(header) < 4 else at
    if rules.group not in header:
        raise InvalidDatasetError(
            f"Expected the column {rules.group} in {name}, as --group says. Received: {', '.join(header)}. "
            "Name one of these."
        )
    return header.index(rules.group)


def _values(rows: Iterable[list[str]], columns: list[int]) -> tuple[dict[int, str], set[int]]:
    """Returns a value of each column that says best what it holds, and the columns that hold 0 and 1."""
    other: dict[int, str] = {}
    said: set[int] = set()
    for row in rows:
        for at in columns:
            value = row[at].strip().lower() if at < len(row) else ""
            if value not in _BINARY:
                other.setdefault(at, row[at].strip())
            elif value in _TRUE or value in _FALSE:
                said.add(at)
    return other, said - set(other)


def _question(
    name: str,
    header: list[str],
    others: list[int],
    found: Mapping[int, str],
    is_binary: set[int],
    doubtful: list[int],
    missing: list[str],
) -> InvalidDatasetError:
    """Asks which columns are classes, with what is known of them."""
    columns = "; ".join(
        f"{header[at]} ({'0 and 1' if at in is_binary else repr(found[at][:40]) if at in found else 'empty'})"
        for at in others
    )
    received = f"no {', '.join(missing)} in {', '.join(header)}" if missing else columns or ", ".join(header)
    likely = ",".join(header[at] for at in others if at in is_binary and at not in doubtful) or "cat,dog"
    return InvalidDatasetError(
        f"Expected {name} with a column label, or with columns of 0 and 1 that are surely the classes. "
        f"Received: {received}. Rename the labels' column to label, or name the columns that are classes, as in "
        f"--classes {likely}."
    )


def _separator(columns: _Columns, rows: list[list[str]], rules: LabelRules) -> str | None:
    """Returns what joins several labels in one cell; None where each class has its column."""
    if (at := columns.label) is None:
        return None
    marks = LABEL_SEPARATOR if rules.is_stored else (LABEL_SEPARATOR, ",", ";")
    return next((mark for mark in marks if any(at < len(row) and mark in row[at] for row in rows)), LABEL_SEPARATOR)


def _labels(
    cells: list[str], columns: _Columns, separator: str | None, doubts: Counter[str]
) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Returns labels, unknown labels and mistakes of a row, and counts in `doubts` how it says that nobody knows."""
    labels: set[str] = set()
    unknown: set[str] = set()
    wrong: list[str] = []
    if separator is not None and columns.label is not None:
        labels = _parts(cells[columns.label], separator)
        if columns.unknown is not None and (unknown := _parts(cells[columns.unknown], separator)):
            doubts["labels"] += len(unknown)
            wrong += [f"{name} is a label, and in {UNKNOWN_LABELS}, too" for name in sorted(unknown & labels)]
    for at, class_name in columns.classes.items():
        value = cells[at].strip().lower()
        if value in _TRUE:
            labels.add(class_name)
        elif value in _BLANK or value in _UNCERTAIN:
            doubts["blank" if value in _BLANK else "−1"] += 1
            unknown.add(class_name)
        elif value not in _FALSE:
            wrong.append(f"{cells[at]!r} in the class column {class_name} instead of 0 or 1")
    return tuple(sorted(labels)), tuple(sorted(unknown)), wrong


def _parts(cell: str, separator: str) -> set[str]:
    return {normalize("NFC", name) for part in cell.split(separator) if (name := part.strip())}


def _without_unlabelled(entries: Iterable[ImageEntry], rules: LabelRules, left_out: LeftOut) -> list[ImageEntry]:
    """Leaves out what is labelled as having no label."""
    nothing = set() if rules.is_stored else UNLABELLED - set(rules.classes or ())
    kept: list[ImageEntry] = []
    for entry in entries:
        labels = tuple(label for label in entry.labels if label.lower() not in nothing)
        if entry.labels and not labels:
            left_out.add(f"labelled {entry.labels[0]}, which means no label", [entry.path])
        else:
            kept.append(replace(entry, labels=labels))
    return kept


def _splits_by_folder(entries: list[ImageEntry], notes: list[str]) -> list[ImageEntry]:
    """Takes the splits from the folders' names where all images lie in folders of splits."""
    splits = [
        next((split for part in PurePosixPath(entry.path).parts[:-1] if (split := split_of(part))), None)
        for entry in entries
    ]
    if None in splits:
        return entries
    notes.append("the split is the folder")
    return [replace(entry, split=split) for entry, split in zip(entries, splits, strict=True)]


class _Files:
    """Finds the file that a row means."""

    def __init__(self, folder: Folder) -> None:
        self._place = str(folder.path)
        self._above = set(folder.path.parts)
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        for path in folder.paths(folder):
            self._add(PurePosixPath(path), path)
        # A name without suffix is only looked for among the images: labels may lie beside them.
        for path in folder.image_paths(folder):
            if PurePosixPath(path).suffix:
                self._add(PurePosixPath(path).with_suffix(""), path)

    def _add(self, known_as: PurePosixPath, path: str) -> None:
        self._by_path[normalize("NFC", known_as.as_posix())].append(path)
        self._by_name[normalize("NFC", known_as.name)].append(path)

    def find(self, said: str) -> tuple[str | None, str]:
        """Returns the file's path, or None and why there is none."""
        path = PurePosixPath(normalize("NFC", said.replace("\\", "/")))
        parts = path.parts
        if not parts or ".." in parts:
            return None, f"{said!r} instead of a path relative to the images"
        if path.is_absolute() or re.fullmatch("[A-Za-z]:", parts[0]):
            tails = [parts[at:] for at in range(1, len(parts))]
        else:
            tails = [parts]
            # A file beside the folder of images names the folder too.
            while len(parts) > 1 and parts[0] in self._above:
                parts = parts[1:]
                tails.append(parts)
        same = next((found for tail in tails if (found := self._by_path.get("/".join(tail)))), [])
        if not same and len(path.parts) == 1:
            same = self._by_name.get(path.name, [])
        if len(same) > 1:
            return None, f"{said} is the name of several files ({', '.join(same[:3])}); give the path"
        return (same[0], "") if same else (None, f"{said} is not in {self._place}")
