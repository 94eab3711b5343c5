"""Checks of the labels as they are written: every class in every split, and no two for one image."""

from __future__ import annotations

from collections import Counter, defaultdict

from typing_extensions import override

from cv_platform.datasets.splits import SPLITS
from cv_platform.validation.checks import Check, Finding, Subject, share


class ClassCoverage(Check):
    """Counts the images of each class in each split; names what is short, unknown or wrong in number."""

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
        offenders = [*empty, *short, *strange, *mislabelled]
        summary = (
            f"Expected at least {fewest} images per class and split: {len(short)} short, {len(empty)} splits empty, "
            f"{len(unknown)} unknown labels, {len(mislabelled)} images with a wrong number of labels."
            if offenders
            else f"{len(subject.class_names)} classes in {len(SPLITS)} splits; the smallest has {smallest} images."
        )
        return Finding(summary, float(smallest), offenders, passed=not offenders)


class ConflictingLabels(Check):
    """Finds identical images (sha256) that carry different sets of labels."""

    name, limit = "conflicting_labels", "max_conflicting_fraction"

    @override
    def look(self, subject: Subject) -> Finding:
        manifest = subject.manifest
        groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for path, sha, labels in zip(manifest["path"], manifest["sha256"], manifest["labels"], strict=True):
            groups[sha].append((str(path), " | ".join(sorted(map(str, labels))) or "no label"))
        conflicts = [sorted(group) for group in groups.values() if len({labels for _, labels in group}) > 1]
        images = sum(map(len, conflicts))
        return Finding(
            f"{images} of {len(manifest)} images equal another with other labels ({len(conflicts)} groups).",
            share(images, len(manifest)),
            [", ".join(f"{path} ({labels})" for path, labels in group) for group in sorted(conflicts)],
        )
