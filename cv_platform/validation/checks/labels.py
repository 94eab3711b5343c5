"""Checks of the labels as they are written: every class in every split, and no two for one image."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from typing_extensions import override

from cv_platform.datasets.sources.entries import contradict
from cv_platform.datasets.splits import SPLITS
from cv_platform.validation.checks import Check, Finding, Subject, share


class ClassCoverage(Check):
    """Counts the images of each class in each split; names what is short, unknown or wrong in number.

    Where labels are unknown, each split also needs images that are known not to show a class.
    """

    name, limit = "class_coverage", "min_images_per_class"

    @override
    def look(self, subject: Subject) -> Finding:
        manifest, fewest = subject.manifest, subject.config.min_images_per_class
        counts = {(split, name): 0 for split in SPLITS for name in subject.class_names}
        unknown = Counter[str]()
        mislabelled: list[str] = []
        for path, split, labels in zip(manifest["path"], manifest["split"], manifest["labels"], strict=True):
            for label in labels:
                if (split, label) in counts:
                    counts[split, label] += 1
                else:
                    unknown[str(label)] += 1
            if subject.classifier_type == "multi-class" and len(labels) != 1:
                mislabelled.append(f"{path}: {len(labels)} labels, expected 1")
        present = set(manifest["split"])
        empty = [f"{split}: no images" for split in SPLITS if split not in present]
        short = [
            f"{split}/{name}: {count} images"
            for (split, name), count in counts.items()
            if split in present and count < fewest
        ]
        strange = [f"unknown class {label!r}: {count} images" for label, count in sorted(unknown.items())]
        smallest = min(counts.values(), default=0)
        untold = _untold(subject, counts)
        offenders = [*empty, *untold, *short, *strange, *mislabelled]
        summary = (
            f"Expected at least {fewest} images per class and split: {len(short)} short, {len(empty)} splits empty, "
            f"{len(unknown)} unknown labels, {len(mislabelled)} images with a wrong number of labels"
            + (f", {len(untold)} classes of which a split's labels tell nothing." if untold else ".")
            if offenders
            else f"{len(subject.class_names)} classes in {len(SPLITS)} splits; the smallest has {smallest} images."
        )
        return Finding(summary, float(smallest), offenders, passed=not offenders)


def _untold(subject: Subject, counts: Mapping[tuple[str, str], int]) -> list[str]:
    """Names the classes of which a split's labels can neither teach nor measure anything, as too many are unknown."""
    doubts = Counter[tuple[str, str]]()
    manifest = subject.manifest
    for split, unknown in zip(manifest["split"], manifest["unknown_labels"], strict=True):
        doubts.update((split, name) for name in unknown if name in subject.class_names)
    sizes = Counter(manifest["split"])
    untold: list[str] = []
    for (split, name), count in sorted(doubts.items()):
        absent = sizes[split] - count - counts.get((split, name), 0)
        if count == sizes[split]:
            untold.append(f"{split}/{name}: no label is known, all {count} images leave it open")
        elif not absent:
            untold.append(f"{split}/{name}: no image is known not to show it, {count} of {sizes[split]} leave it open")
    return untold


class ClassImbalance(Check):
    """Compares the largest class of train with the smallest: what is rare is learned badly, and said seldom."""

    name, limit = "class_imbalance", "max_class_ratio"

    @override
    def look(self, subject: Subject) -> Finding:
        train = Counter(name for labels in subject.split("train")["labels"] for name in labels)
        counts = {name: train[name] for name in subject.class_names if train[name]}
        if len(counts) < 2:
            return Finding("Not judged: train has images of fewer than two classes (see class_coverage).")
        (largest, most), *_, (smallest, fewest) = Counter(counts).most_common()
        limit = subject.config.max_class_ratio
        return Finding(
            f"Of {largest}, train has {most} images, of {smallest} {fewest}: {most / fewest:.1f} to 1.",
            most / fewest,
            [
                f"{name}: {count} images"
                for name, count in sorted(counts.items(), key=lambda row: row[1])
                if most > limit * count
            ],
        )


class DividedGroups(Check):
    """Finds groups (the import's column: a patient, a video) with images in several splits."""

    name, limit = "divided_groups", "max_divided_group_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        grouped = subject.manifest.dropna(subset=["group"])
        if grouped.empty:
            return Finding("Not judged: the dataset has no groups (see --group of the import).")
        splits = grouped.groupby("group")["split"].nunique()
        divided = sorted(str(group) for group, count in splits.items() if count > 1)
        rows = grouped.loc[grouped["group"].isin(divided)]
        counts = rows.groupby(["group", "split"]).size().unstack(fill_value=0)
        return Finding(
            f"{len(divided)} of {len(splits)} groups are in several splits, with {len(rows)} of {len(grouped)} images.",
            share(len(rows), len(grouped)),
            [
                f"{name}: " + ", ".join(f"{n} in {split}" for split, n in row.items() if n)
                for name, row in counts.iterrows()
            ],
        )


class ConflictingLabels(Check):
    """Finds identical images (sha256) whose labels contradict each other; an unknown label contradicts nothing."""

    name, limit = "conflicting_labels", "max_conflicting_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        manifest = subject.manifest
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        labellings: dict[str, list[tuple[list[str], list[str]]]] = defaultdict(list)
        columns = (manifest[name] for name in ("path", "sha256", "labels", "unknown_labels"))
        for path, sha, labels, unknown in zip(*columns, strict=True):
            groups[sha].append((str(path), " | ".join(sorted(map(str, labels))) or "no label"))
            labellings[sha].append((labels, unknown))
        conflicts = [sorted(group) for sha, group in groups.items() if contradict(*labellings[sha])]
        images = sum(map(len, conflicts))
        return Finding(
            f"{images} of {len(manifest)} images equal another with other labels ({len(conflicts)} groups).",
            share(images, len(manifest)),
            [", ".join(f"{path} ({labels})" for path, labels in group) for group in sorted(conflicts)],
        )
