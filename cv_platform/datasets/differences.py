"""What two versions of a dataset have and do not have in common, image by image.

Images are told by their content (sha256): with class folders, another label is another path.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cv_platform.cores import available_cores
from cv_platform.datasets.contact_sheet import SheetRow, draw_sheet
from cv_platform.datasets.repository import StoredVersion, list_versions
from cv_platform.datasets.sources.entries import ImageEntry
from cv_platform.datasets.sources.label_files import LabelRules
from cv_platform.datasets.sources.layouts import read_layout
from cv_platform.datasets.sources.tree import walk
from cv_platform.datasets.versions import check_out_images
from cv_platform.files import file_sha256
from cv_platform.predictions import LABEL_SEPARATOR, UNKNOWN_LABELS, label_text
from cv_platform.records import DatasetVersion

Kind = Literal["added", "removed", "changed", "relabelled", "moved"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_NO_SPLIT = "no split"


@dataclass(frozen=True)
class StoredImage:
    """An image of one version.

    Attributes:
        path: of its file below the folder of images.
        file: where it is checked out.
        sha256: of the file.
        split: as it is stored; None: it is taken when the dataset is used.
        labels: sorted.
        unknown_labels: sorted, see `ImageEntry`.
    """

    path: str
    file: Path
    sha256: str
    split: str | None
    labels: tuple[str, ...]
    unknown_labels: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Its labels as one text."""
        return label_text(self.labels, self.unknown_labels)

    def is_labelled_as(self, other: StoredImage) -> bool:
        """Says whether the same is known of both."""
        return (self.labels, self.unknown_labels) == (other.labels, other.unknown_labels)


@dataclass(frozen=True)
class Change:
    """One image that the versions do not have alike.

    Attributes:
        kind: `changed` is other content at the same place, `relabelled` the same content with other labels or unknown
            labels, and `moved` the same with the same labels in another split.
        before: in the first version; None: it was added.
        after: in the second; None: it was removed.
    """

    kind: Kind
    before: StoredImage | None
    after: StoredImage | None

    @property
    def title(self) -> str:
        """Its labels, or what became of what."""
        before, after = self.before, self.after
        if self.kind == "relabelled" and before and after:
            return f"{before.label} → {after.label}"
        if self.kind == "moved" and before and after:
            return f"{before.split or _NO_SPLIT} → {after.split or _NO_SPLIT}"
        return (after or before).label  # pyright: ignore[reportOptionalMemberAccess]  # One of them there is.


@dataclass(frozen=True)
class Difference:
    """How the version `after` differs from `before`.

    Attributes:
        before, after: the tags.
        unchanged: images that both have alike; of them `renamed` under another name.
        changes: ordered by kind and path.
    """

    before: str
    after: str
    unchanged: int
    renamed: int
    changes: tuple[Change, ...]

    def count(self, kind: Kind) -> int:
        """Counts the changes of a kind."""
        return sum(change.kind == kind for change in self.changes)

    def by_class(self) -> list[dict[str, str | int]]:
        """Returns a row for each class that anything happened to: how many of each kind, to and from it.

        Of relabelled images also of how many it became known or unknown whether they show it, if of any.
        """
        rows: dict[str, Counter[str]] = defaultdict(Counter)
        for change in self.changes:
            before, after = (set(image.labels) if image else set[str]() for image in (change.before, change.after))
            if change.kind == "relabelled" and change.before and change.after:
                doubts, doubts_after = set(change.before.unknown_labels), set(change.after.unknown_labels)
                for kind, names in (("now known", doubts - doubts_after), ("now unknown", doubts_after - doubts)):
                    for name in names:
                        rows[name][kind] += 1
                for name in after - before:
                    rows[name]["gained"] += 1
                for name in before - after:
                    rows[name]["lost"] += 1
            else:
                for name in before | after:
                    rows[name][change.kind] += 1
        columns = ["added", "removed", "changed", "gained", "lost", "moved"]
        columns += [kind for kind in ("now known", "now unknown") if any(row[kind] for row in rows.values())]
        return [{"class": name, **{column: rows[name][column] for column in columns}} for name in sorted(rows)]

    def summary(self) -> str:
        """Returns the counts in a sentence."""
        counts = ", ".join(f"{self.count(kind)} {kind}" for kind in KINDS)
        renamed = f" ({self.renamed} of them under another name)" if self.renamed else ""
        return f"{self.before} → {self.after}: {counts}; {self.unchanged} images are the same{renamed}."

    def write_csv(self) -> bytes:
        """Returns a table with a row for each change, with unknown labels if there are any."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        is_open = any(image and image.unknown_labels for one in self.changes for image in (one.before, one.after))
        columns = ("path", "sha256", "split", "label", *([UNKNOWN_LABELS] if is_open else []))
        writer.writerow(["kind", *(f"{side}_{name}" for side in ("before", "after") for name in columns)])
        for change in self.changes:
            cells: list[str] = []
            for image in (change.before, change.after):
                values = [image.path, image.sha256, image.split or "", label_text(image.labels)] if image else [""] * 4
                values += [LABEL_SEPARATOR.join(image.unknown_labels) if image else ""] if is_open else []
                cells += values
            writer.writerow([change.kind, *cells])
        return text.getvalue().encode()

    def draw(self, sample_bits: int | None = None) -> bytes:
        """Draws what changed, a row for each kind and class, and returns a PNG; `changed` shows before and after.

        Args:
            sample_bits: by which the images are decoded, see `images.Preprocessing`.
        """
        rows: dict[tuple[Kind, str], list[Change]] = defaultdict(list)
        for change in self.changes:
            rows[change.kind, change.title].append(change)
        ordered = sorted(rows, key=lambda key: (KINDS.index(key[0]), -len(rows[key]), key[1]))
        return draw_sheet(
            [
                SheetRow(
                    title,
                    f"{kind}, {len(rows[kind, title]):,}" + (": before, after" if kind == "changed" else ""),
                    _files(rows[kind, title]),
                )
                for kind, title in ordered
            ],
            letters=30,
            what="kinds of change",
            sample_bits=sample_bits,
        )


def compare_versions(repository: Path, before: str, after: str, *, home: Path) -> Difference:
    """Compares two tags of a repository; both are checked out.

    Raises:
        UnknownDatasetVersionError, InvalidDatasetError, DatasetError: see `versions.checkout_version`.
    """
    return _compared(before, after, *(_images(repository, tag, home) for tag in (before, after)))


def _images(repository: Path, tag: str, home: Path) -> dict[str, StoredImage]:
    """Returns the images of a version by their paths."""
    version, directory = check_out_images(repository, tag, home=home)
    root = directory / version.data_path
    entries = stored_entries(version, directory)
    with ThreadPoolExecutor(available_cores()) as pool:
        digests = pool.map(lambda entry: file_sha256(root / entry.path), entries)
        return {
            entry.path: StoredImage(
                *(entry.path, root / entry.path, digest, entry.split, tuple(sorted(entry.labels))),
                tuple(sorted(entry.unknown_labels)),
            )
            for entry, digest in zip(entries, digests, strict=True)
        }


def changes_since(
    previous: DatasetVersion | None, version: DatasetVersion, repository: Path, home: Path
) -> Difference | None:
    """Compares a version with the one that was used before; None: there is no other one any more."""
    if previous is None or previous.provenance.ds_name != version.provenance.ds_name:
        return None
    before, after = previous.provenance, version.provenance
    stored = list_versions(repository).get(before.dvc_tag)
    if before.dvc_md5 == after.dvc_md5 or stored is None or stored.dvc_md5 != before.dvc_md5:
        return None
    return compare_versions(repository, before.dvc_tag, after.dvc_tag, home=home)


def stored_entries(version: StoredVersion, directory: Path) -> tuple[ImageEntry, ...]:
    """Returns the images of a checkout with their labels as they are stored."""
    return read_layout(walk(directory / version.data_path), version.annotations, LabelRules(is_stored=True)).entries


def _files(changes: Sequence[Change]) -> list[Path]:
    return [image.file for change in changes for image in _shown(change) if image]


def _shown(change: Change) -> tuple[StoredImage | None, ...]:
    return (change.before, change.after) if change.kind == "changed" else (change.after or change.before,)


def _compared(tag: str, other: str, before: dict[str, StoredImage], after: dict[str, StoredImage]) -> Difference:
    pairs: list[tuple[StoredImage, StoredImage]] = []

    def pair(path: str, other_path: str) -> None:
        pairs.append((before.pop(path), after.pop(other_path)))

    for path in sorted(before.keys() & after.keys()):
        if before[path].sha256 == after[path].sha256:
            pair(path, path)
    elsewhere: dict[str, list[str]] = defaultdict(list)
    for path in sorted(after, reverse=True):
        elsewhere[after[path].sha256].append(path)
    renamed = 0
    for path in sorted(before):
        if same := elsewhere[before[path].sha256]:
            pair(path, same.pop())
            renamed += pairs[-1][0].is_labelled_as(pairs[-1][1]) and pairs[-1][0].split == pairs[-1][1].split
    changes = [
        Change("moved" if one.is_labelled_as(two) else "relabelled", one, two)
        for one, two in pairs
        if not one.is_labelled_as(two) or one.split != two.split
    ]
    unchanged = len(pairs) - len(changes)
    for path in sorted(before.keys() & after.keys()):
        changes.append(Change("changed", before.pop(path), after.pop(path)))
    changes += [Change("removed", image, None) for image in before.values()]
    changes += [Change("added", None, image) for image in after.values()]
    changes.sort(
        key=lambda change: (KINDS.index(change.kind), *(i.path if i else "" for i in (change.before, change.after)))
    )
    return Difference(tag, other, unchanged, renamed, tuple(changes))
