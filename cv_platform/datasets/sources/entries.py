"""What reading a source comes to: its images with splits and labels, and what was left out, by reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

SPLIT_ALIASES = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "testset", "eval", "evaluation"), "test"),
    **dict.fromkeys(("reference", "ref"), "reference"),
}
"""As Hugging Face reads them: https://huggingface.co/docs/hub/datasets-file-names-and-splits"""
_FILLERS = frozenset({"set", "data", "dataset", "split", "image", "images", "img", "imgs", "seg"})
UNLABELLED = frozenset({"no_label", "unlabeled", "unlabelled"})
"""Names that CVAT, Datumaro and Roboflow give to images without a label."""

NOT_AN_IMAGE = "no image that can be decoded"
UNREADABLE = "that cannot be read"
ACCOMPANYING = "no image, beside the images"
NO_CLASS_FOLDER = "directly in a split's folder, in no class folder"
NOT_IN_LABEL_FILE = "not named by the label file"
NOTHING_KNOWN = "of which no label is known"
UNWANTED_CLASS = "of no class that --classes names"
"""Reasons to leave a file out."""


def split_of(name: str) -> str | None:
    """Returns the split that a folder or cell names: in any case, with or without numbers and words such as `set`."""
    words = [word for word in re.split(r"[\W\d_]+", name.lower()) if word and word not in _FILLERS]
    return SPLIT_ALIASES.get(words[0]) if len(words) == 1 else None


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image: POSIX path relative to its folder, split (None without splits), class names and group, if it has one.

    A group is what splits never divide: a patient, a video, a product. Of the classes in `unknown_labels` nobody knows
    whether the image shows them; of all others that are not in `labels` it shows none.
    """

    path: str
    split: str | None
    labels: tuple[str, ...]
    group: str | None = None
    unknown_labels: tuple[str, ...] = ()


def contradict(*labellings: tuple[Collection[str], Collection[str]]) -> bool:
    """Says whether one of some labellings has a label that another one is known not to have.

    Args:
        labellings: labels and unknown labels, of what should be labelled alike.
    """
    said = {name for labels, _ in labellings for name in labels}
    return any(name not in labels and name not in unknown for labels, unknown in labellings for name in said)


class LeftOut:
    """Paths that were left out, by reason."""

    def __init__(self) -> None:
        self.paths: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, paths: Iterable[str]) -> None:
        """Adds paths to those of a reason."""
        self.paths[reason] += paths

    def lost(self) -> LeftOut:
        """Returns of them what cannot be decoded or read, where images are."""
        found = LeftOut()
        for reason, paths in self.paths.items():
            if reason.startswith((NOT_AN_IMAGE, UNREADABLE)):
                found.add(reason, paths)
        return found

    def counts(self) -> dict[str, int]:
        """Returns how many there are by reason, and by suffix where it is the reason; each with an example."""
        groups: dict[str, list[str]] = defaultdict(list)
        for reason, paths in self.paths.items():
            for path in paths:
                suffix = f" ({PurePosixPath(path).suffix.lower() or 'no suffix'})" if reason in _BY_SUFFIX else ""
                groups[reason + suffix].append(path)
        return {f"{reason}, such as {printable(min(paths))}": len(paths) for reason, paths in sorted(groups.items())}


_BY_SUFFIX = (NOT_AN_IMAGE, ACCOMPANYING)


def printable(path: str) -> str:
    """Returns a path in UTF-8: U+FFFD stands for each byte of its name that is none."""
    return path.encode(errors="surrogateescape").decode(errors="replace")


LabelSource = Literal["class columns", "folders", "label column"]


@dataclass(frozen=True)
class Layout:
    """What a source holds.

    Attributes:
        name: which layout it is.
        entries: the images by path.
        class_names: all classes, also those without images; sorted, or in the order of the label file's columns.
        left_out: what is in the source and not in `entries`.
        notes: how it was understood, as sentences.
        labels_from: where the labels were found: where it is no folder, images keep their paths.
    """

    name: str
    entries: tuple[ImageEntry, ...]
    class_names: tuple[str, ...]
    left_out: LeftOut
    notes: tuple[str, ...] = ()
    labels_from: LabelSource = "folders"
