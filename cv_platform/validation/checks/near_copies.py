"""Checks of pairs of splits: an image of one shows what an image of the other shows, though its bytes differ.

Copies of train in `test` flatter the model, in `valid` they spoil the choice of the epoch, in `reference` they raise
false drift. What is identical byte for byte counts, too, but between train and test: `train_test_leakage` says it.
"""

from __future__ import annotations

from itertools import combinations

import pandas as pd
from typing_extensions import override

from cv_platform.datasets.contact_sheet import SheetRow, draw_sheet
from cv_platform.datasets.sources.entries import contradict
from cv_platform.datasets.splits import SPLITS
from cv_platform.validation.checks import Check, Finding, Subject, share


class NearCopiesBetween(Check):
    """The share of a split's images that show what an image of another one shows; a check for each pair of splits."""

    limit = "max_near_copy_fraction"

    def __init__(self, first: str, second: str) -> None:
        self.name = f"near_copies_{first}_{second}"
        self.splits = first, second

    @override
    @classmethod
    def variants(cls) -> list[Check]:
        return [cls(first, second) for first, second in combinations(SPLITS, 2)]

    @override
    def look(self, subject: Subject) -> Finding:
        first, second = self.splits
        counts = [int((subject.manifest["split"] == split).sum()) for split in self.splits]
        if not min(counts):
            return Finding(f"Not judged: {second if counts[0] else first} has no images (see class_coverage).")
        found = self._pairs(subject)
        copies = len({copy for _, copy, _ in found})
        paths = subject.manifest["path"].tolist()
        if found:
            rows = [
                SheetRow(f"{1 - distance:.1%} alike", "", [subject.root / paths[one], subject.root / paths[copy]])
                for one, copy, distance in found
            ]
            sheet = draw_sheet(rows, columns=2, what="pairs", sample_bits=subject.sample_bits)
            (subject.directory / f"{self.name}.png").write_bytes(sheet)
        fraction = copies / counts[1]
        return Finding(
            f"{copies} of {counts[1]} images of {second} show what an image of {first} shows ({fraction:.2%}).",
            fraction,
            [f"{paths[copy]} ~ {paths[one]} ({1 - distance:.1%} alike)" for one, copy, distance in found],
        )

    def _pairs(self, subject: Subject) -> list[tuple[int, int, float]]:
        """Returns rows of the first split and of the second, and their distance; the most alike first."""
        split = subject.manifest["split"]
        contents = pd.factorize(subject.manifest["sha256"])[0]
        where = [contents[(split == name).to_numpy()] for name in self.splits]
        rows = [(split == name).to_numpy().nonzero()[0] for name in self.splits]
        one_of = dict(zip(where[0][::-1].tolist(), rows[0][::-1].tolist(), strict=True))
        near = subject.near_copies
        links = [(int(a), int(b), float(d)) for (a, b), d in zip(near.pairs, near.distances, strict=True)]
        links += [(b, a, distance) for a, b, distance in links]
        if self.splits != ("train", "test"):
            links += [(content, content, 0.0) for content in one_of]
        copies = pd.Series(rows[1]).groupby(where[1]).agg(list).to_dict()
        found = [(one_of[a], copy, d) for a, b, d in links if a in one_of for copy in copies.get(b, [])]
        return sorted(found, key=lambda pair: (pair[2], pair[1], pair[0]))


class ConflictingNearCopies(Check):
    """Finds images that show the same, though their bytes differ, and whose labels contradict each other."""

    name, limit = "conflicting_near_copies", "max_conflicting_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        manifest, near = subject.manifest, subject.near_copies
        first = manifest.drop_duplicates("sha256")
        paths = first["path"].tolist()
        labels = [" | ".join(sorted(map(str, names))) or "no label" for names in first["labels"]]
        known = list(zip(first["labels"], first["unknown_labels"], strict=True))
        order = near.distances.argsort(kind="stable")
        pairs = [(int(a), int(b)) for a, b in near.pairs[order] if contradict(known[a], known[b])]
        images = len({at for pair in pairs for at in pair})
        return Finding(
            f"{images} of {len(manifest)} images show what another with other labels shows.",
            share(images, len(manifest)),
            [f"{paths[a]} ({labels[a]}) ~ {paths[b]} ({labels[b]})" for a, b in pairs],
        )
