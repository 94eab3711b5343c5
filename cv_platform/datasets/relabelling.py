"""Makes a new version of a dataset from reviewed labels, which the pages of validation write as a CSV.

Pixels are not touched. The review itself is kept in the version's commit, beside the DVC file, and its message counts
what it changed.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from cv_platform.config import ClassifierType
from cv_platform.datasets.importing import check_names
from cv_platform.datasets.repository import StoredVersion
from cv_platform.datasets.sources.entries import ImageEntry
from cv_platform.datasets.sources.label_files import LabelRules
from cv_platform.datasets.sources.layouts import read_layout
from cv_platform.datasets.sources.tree import walk
from cv_platform.datasets.successors import SuccessorImage, store_successor
from cv_platform.datasets.versions import check_out_images
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import file_sha256
from cv_platform.predictions import LABEL_SEPARATOR

COLUMNS = ("path", "sha256", "given", "decision", "label")
DECISIONS = ("keep", "relabel", "leave out")
_SHOWN = 10


@dataclass(frozen=True)
class Decision:
    """One row of a review: what is to become of an image.

    Attributes:
        path: of the manifest of the version that was reviewed.
        sha256: of the image file.
        given: the labels that it had then, sorted.
        labels: that it is to have, sorted; None: it is left out.
    """

    path: str
    sha256: str
    given: tuple[str, ...]
    labels: tuple[str, ...] | None


@dataclass(frozen=True)
class RelabelledVersion:
    """A version that `relabel` made, or found to be there already.

    Attributes:
        base: the version that was reviewed.
        version: the new one; `base` where the review changes nothing.
        summary: what it changed, a sentence a line.
    """

    base: StoredVersion
    version: StoredVersion
    summary: tuple[str, ...]


def read_review(content: bytes, class_names: Sequence[str], classifier_type: ClassifierType) -> list[Decision]:
    """Reads the CSV of a review.

    Raises:
        InvalidDatasetError: columns, decisions or classes are not those that there may be; all mistakes are listed.
    """
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as err:
        raise InvalidDatasetError(f"Expected a review as a CSV in UTF-8. Received: {err}. Download it again.") from err
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise InvalidDatasetError(
            f"Expected a review with the columns {', '.join(COLUMNS)}. Received: none called {', '.join(missing)}. "
            "Download it from the page label_issues.html of a validation report."
        )
    mistakes: list[str] = []
    decisions: dict[str, Decision] = {}
    for number, row in enumerate(rows, start=2):
        path = row["path"]
        labels = _split(row["label"])
        if any(row[name] is None for name in COLUMNS):
            mistakes.append(f"row {number}: fewer cells than columns")
        elif row["decision"] not in DECISIONS:
            mistakes.append(f"row {number}: the decision {row['decision']!r} instead of {', '.join(DECISIONS)}")
        elif path in decisions:
            mistakes.append(f"row {number}: {path} for the second time")
        elif row["decision"] == "relabel" and (unknown := sorted(set(labels) - set(class_names))):
            mistakes.append(f"row {number}: {path} as {', '.join(unknown)}, which model.classes does not name")
        elif row["decision"] == "relabel" and classifier_type == "multi-class" and len(labels) != 1:
            mistakes.append(f"row {number}: {path} with {len(labels)} labels instead of one")
        else:
            given = _split(row["given"])
            becomes = {"keep": given, "relabel": labels, "leave out": None}[row["decision"]]
            decisions[path] = Decision(path, row["sha256"], given, becomes)
    _refuse(mistakes, "one correct decision per image")
    return list(decisions.values())


def relabel(
    repository: Path, tag: str, review: bytes, decisions: Sequence[Decision], *, home: Path, new_tag: str | None = None
) -> RelabelledVersion:
    """Adds the version that a review makes of the version `tag`.

    The same review of the same version gives the same new one, however often.

    Args:
        repository: of the dataset.
        tag: the version that was reviewed.
        review: the CSV, which is kept.
        decisions: what it says, see `read_review`.
        home: the version is checked out there.
        new_tag: of the new version; by default `<tag>-reviewed-<8 hex digits>`, which follow from the decisions.

    Raises:
        InvalidDatasetError: the review is of other images or labels, would leave a class without images, or `new_tag`
            has other content already; nothing was changed.
        DatasetError: git or DVC fails.
    """
    base, directory = check_out_images(repository, tag, home=home)
    layout = read_layout(walk(directory / base.data_path), base.annotations, LabelRules(is_stored=True))
    before = {entry.path: entry for entry in layout.entries}
    changes = _changes(decisions, before, directory, base)
    after = tuple(_relabelled(before, changes, by_folder=layout.labels_from == "folders"))
    summary = _summary(changes, before, len(decisions))
    if not changes:
        return RelabelledVersion(base, base, summary)
    new_tag = new_tag or f"{tag}-reviewed-{_digest(changes)}"
    check_names(repository.name, new_tag)
    message = "\n".join(
        [
            f"Relabel {tag} as {new_tag}",
            "",
            *summary,
            f"base: {tag}, {base.dvc_md5}, commit {base.commit}",
            f"review: sha256 {hashlib.sha256(review).hexdigest()}",
        ]
    )
    images = (SuccessorImage(directory / base.data_path / origin, entry) for origin, entry in after)
    reviews = {f"reviews/{new_tag.replace('/', '-')}.csv": review}
    version = store_successor(repository, new_tag, images, message, before=layout, beside=reviews)
    return RelabelledVersion(base, version, summary)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(sorted(name for name in (text or "").split(LABEL_SEPARATOR) if name))


def _refuse(mistakes: Sequence[str], expected: str) -> None:
    if mistakes:
        shown = "\n".join(f"  {mistake}" for mistake in mistakes[:_SHOWN])
        more = f"\n  and {len(mistakes) - _SHOWN} more" if len(mistakes) > _SHOWN else ""
        raise InvalidDatasetError(
            f"Expected {expected}. Received:\n{shown}{more}\n"
            "Nothing was changed: correct the review, or download it again."
        )


def _changes(
    decisions: Sequence[Decision], before: Mapping[str, ImageEntry], directory: Path, base: StoredVersion
) -> dict[str, Decision]:
    """Returns the decisions that change something, by the path of the image as it is stored."""
    root = directory / base.data_path
    mistakes: list[str] = []
    changes: dict[str, Decision] = {}
    by_content: dict[str, list[str]] | None = None
    for decision in decisions:
        path = decision.path.removeprefix(f"{base.data_path}/")
        if path not in before:  # With class folders, an earlier review has moved it.
            by_content = by_content or _by_content(before, root)
            path = only[0] if len(only := by_content.get(decision.sha256, [])) == 1 else path
        entry = before.get(path)
        if entry is None:
            mistakes.append(f"{decision.path}: no such image in {base.tag}")
        elif file_sha256(root / path) != decision.sha256:
            mistakes.append(f"{decision.path}: another image in {base.tag} than the one that was reviewed")
        elif decision.labels is not None and set(entry.labels) == set(decision.labels):
            continue
        elif set(entry.labels) != set(decision.given):
            said, has = (
                LABEL_SEPARATOR.join(sorted(labels)) or "no label" for labels in (decision.given, entry.labels)
            )
            mistakes.append(f"{decision.path}: reviewed as {said}, but it is {has} in {base.tag}")
        else:
            changes[path] = decision
    _refuse(mistakes, f"a review of the images of {base.tag} ({base.dvc_md5})")
    return changes


def _by_content(paths: Iterable[str], root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        found[file_sha256(root / path)].append(path)
    return found


def _relabelled(
    before: Mapping[str, ImageEntry], changes: Mapping[str, Decision], *, by_folder: bool
) -> Iterator[tuple[str, ImageEntry]]:
    """Yields each image that stays: where it was, and what it is now. With class folders it moves to another one."""
    taken = {path for path in before if path not in changes}
    for path, entry in before.items():
        decision = changes.get(path)
        if decision is None:
            yield path, entry
        elif decision.labels is not None:
            name = path
            if by_folder:
                file = PurePosixPath(path)
                folder = file.parents[1] / decision.labels[0]
                name = (folder / file.name).as_posix()
                if name in taken:
                    name = (folder / f"{file.stem}-{decision.sha256[:12]}{file.suffix}").as_posix()
                if name in taken:
                    raise InvalidDatasetError(
                        f"Expected a place for {path} in {folder}. Received: {name} is there. Rename one."
                    )
                taken.add(name)
            # What a reviewer says is known from now on; of the other unknown labels nobody has said anything.
            left_open = tuple(label for label in entry.unknown_labels if label not in decision.labels)
            yield path, replace(entry, path=name, labels=decision.labels, unknown_labels=left_open)


def _digest(changes: Mapping[str, Decision]) -> str:
    rows = sorted((path, change.sha256, change.labels) for path, change in changes.items())
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:8]


def _summary(changes: Mapping[str, Decision], before: Mapping[str, ImageEntry], reviewed: int) -> tuple[str, ...]:
    pairs: Counter[str] = Counter()
    for path, change in changes.items():
        given = LABEL_SEPARATOR.join(sorted(before[path].labels)) or "no label"
        if change.labels is not None:
            pairs[f"{given} → {LABEL_SEPARATOR.join(change.labels) or 'no label'}"] += 1
    left_out = sum(change.labels is None for change in changes.values())
    first = (
        f"{reviewed} reviewed: {len(changes) - left_out} relabelled, {left_out} left out, the others stay as they are."
    )
    return (first, *(f"{pair}: {count}" for pair, count in pairs.most_common()))
