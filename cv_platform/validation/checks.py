"""Exact checks over the manifest and the sampled pixels; each returns a `CheckOutcome` and raises nothing.

`manifest` is always the readable part of `datasets.manifest.read_manifest`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from cv_platform.config import ClassifierType, ValidateConfig
from cv_platform.datasets.splits import SPLITS
from cv_platform.properties import PROPERTY_NAMES
from cv_platform.records import CheckOutcome
from cv_platform.validation.sample import ImageSample
from cv_platform.validation.verdict import MAX_OFFENDERS


def outcome(
    name: str,
    severity: str,
    *,
    passed: bool,
    summary: str,
    value: float | None = None,
    limit: float | None = None,
    offenders: Sequence[str] = (),
) -> CheckOutcome:
    """Builds an outcome, with its offenders cut to `MAX_OFFENDERS`."""
    return CheckOutcome(
        name=name,
        passed=passed,
        severity="error" if severity == "error" else "warn",
        summary=summary,
        value=value,
        limit=limit,
        offenders=tuple(offenders)[:MAX_OFFENDERS],
    )


def check_unreadable_images(total: int, problems: Mapping[str, str], config: ValidateConfig) -> CheckOutcome:
    """Holds the share of images that do not decode against `max_unreadable_fraction`.

    Args:
        total: images in the manifest, readable or not.
        problems: path → why it does not decode.
        config: limits and severities.
    """
    fraction = len(problems) / total if total else 0.0
    return outcome(
        "unreadable_images",
        config.unreadable_images,
        passed=fraction <= config.max_unreadable_fraction,
        summary=f"{len(problems)} of {total} images do not decode; {config.max_unreadable_fraction:.1%} may "
        "(validate.max_unreadable_fraction), and nothing downstream uses them."
        + (f" The first: {', '.join(sorted(problems)[:3])}." if problems else ""),
        value=fraction,
        limit=config.max_unreadable_fraction,
        offenders=[f"{path}: {problem}" for path, problem in sorted(problems.items())],
    )


def check_damaged_images(manifest: pd.DataFrame, config: ValidateConfig) -> CheckOutcome:
    """Names the images whose decoder went on after damage: part of what they show may be noise or grey."""
    summary = "are damaged, though they decode."
    return _check_remarks("damaged_images", manifest, "damage", config.max_damaged_fraction, config, summary)


def check_constant_images(manifest: pd.DataFrame, config: ValidateConfig) -> CheckOutcome:
    """Names the images of one colour: there is nothing to learn from them, and often a fault behind them."""
    summary = "are of one colour throughout."
    return _check_remarks("constant_images", manifest, "constant", config.max_constant_fraction, config, summary)


def check_narrow_range(manifest: pd.DataFrame, config: ValidateConfig) -> CheckOutcome:
    """Names the images of 16-bit samples that become few grey levels, such as 12-bit data stored as they are."""
    summary = (
        "have 16-bit samples in less than a quarter of their range, and models see the upper 8 bits. Scale the samples "
        "to 0–65535 before the import: all images alike, and what is predicted, too."
    )
    return _check_remarks("narrow_range", manifest, "narrow_range", config.max_narrow_range_fraction, config, summary)


def _check_remarks(
    name: str, manifest: pd.DataFrame, column: str, limit: float, config: ValidateConfig, summary: str
) -> CheckOutcome:
    """Holds the share of images with a remark in one of the manifest's columns against its limit."""
    rows = zip(manifest["path"], manifest[column], strict=True)
    remarked = [f"{path}: {remark}" for path, remark in rows if pd.notna(remark)]
    fraction = len(remarked) / len(manifest) if len(manifest) else 0.0
    return outcome(
        name,
        getattr(config, name),
        passed=fraction <= limit,
        summary=f"{len(remarked)} of {len(manifest)} images {summary}",
        value=fraction,
        limit=limit,
        offenders=remarked,
    )


def check_class_coverage(
    manifest: pd.DataFrame, class_names: Sequence[str], classifier_type: ClassifierType, config: ValidateConfig
) -> CheckOutcome:
    """Counts the images of each class in each split; names what is short, unknown or wrong in number."""
    counts = {(split, name): 0 for split in SPLITS for name in class_names}
    unknown: dict[str, int] = defaultdict(int)
    mislabelled: list[str] = []
    for path, split, labels in zip(manifest["path"], manifest["split"], manifest["labels"], strict=True):
        for label in labels:
            if (split, label) in counts:
                counts[split, label] += 1
            else:
                unknown[str(label)] += 1
        if classifier_type == "multi-class" and len(labels) != 1:
            mislabelled.append(f"{path}: {len(labels)} labels, expected 1")
    present = set(manifest["split"])
    offenders = [f"{split}: no images" for split in SPLITS if split not in present]
    short = [
        f"{split}/{name}: {count} images"
        for (split, name), count in counts.items()
        if split in present and count < config.min_images_per_class
    ]
    offenders += short
    offenders += [f"unknown class {label!r}: {count} images" for label, count in sorted(unknown.items())]
    offenders += mislabelled
    smallest = min(counts.values(), default=0)
    if offenders:
        summary = (
            f"Expected at least {config.min_images_per_class} images per class and split: {len(short)} short, "
            f"{len(set(SPLITS) - present)} splits empty, {len(unknown)} unknown labels, "
            f"{len(mislabelled)} images with a wrong number of labels."
        )
    else:
        summary = f"{len(class_names)} classes in {len(SPLITS)} splits; the smallest has {smallest} images."
    return outcome(
        "class_coverage",
        config.class_coverage,
        passed=not offenders,
        summary=summary,
        value=float(smallest),
        limit=float(config.min_images_per_class),
        offenders=offenders,
    )


def check_train_test_leakage(manifest: pd.DataFrame, config: ValidateConfig) -> CheckOutcome:
    """Finds test images whose content (sha256) is in train too."""
    test = manifest.loc[manifest["split"] == "test"]
    if test.empty:
        return _not_judged(
            "train_test_leakage", config.train_test_leakage, config.max_leakage_fraction, "test has no images"
        )
    train = manifest.loc[manifest["split"] == "train"].sort_values("path")
    origin = dict(zip(train["sha256"][::-1], train["path"][::-1], strict=True))
    leaked = test.loc[test["sha256"].isin(list(origin))].sort_values("path")
    fraction = len(leaked) / len(test)
    return outcome(
        "train_test_leakage",
        config.train_test_leakage,
        passed=fraction <= config.max_leakage_fraction,
        summary=f"{len(leaked)} of {len(test)} test images are in train too ({fraction:.2%}).",
        value=fraction,
        limit=config.max_leakage_fraction,
        offenders=[f"{path} = {origin[sha]}" for path, sha in zip(leaked["path"], leaked["sha256"], strict=True)],
    )


def check_conflicting_labels(manifest: pd.DataFrame, config: ValidateConfig) -> CheckOutcome:
    """Finds identical images (sha256) that carry different sets of labels."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, sha, labels in zip(manifest["path"], manifest["sha256"], manifest["labels"], strict=True):
        groups[sha].append((str(path), " | ".join(sorted(map(str, labels))) or "no label"))
    conflicts = [sorted(group) for group in groups.values() if len({labels for _, labels in group}) > 1]
    images = sum(map(len, conflicts))
    fraction = images / len(manifest) if len(manifest) else 0.0
    return outcome(
        "conflicting_labels",
        config.conflicting_labels,
        passed=fraction <= config.max_conflicting_fraction,
        summary=f"{images} of {len(manifest)} images equal another with other labels ({len(conflicts)} groups).",
        value=fraction,
        limit=config.max_conflicting_fraction,
        offenders=[", ".join(f"{path} ({labels})" for path, labels in group) for group in sorted(conflicts)],
    )


def check_duplicates(manifest: pd.DataFrame, config: ValidateConfig) -> CheckOutcome:
    """Counts the images, over all splits, that repeat another one byte for byte."""
    ordered = manifest.sort_values("path")
    first = ordered.drop_duplicates("sha256").set_index("sha256")["path"]
    copies = ordered.loc[ordered["sha256"].duplicated()]
    fraction = len(copies) / len(manifest) if len(manifest) else 0.0
    return outcome(
        "duplicates",
        config.duplicates,
        passed=fraction <= config.max_duplicate_fraction,
        summary=f"{len(copies)} of {len(manifest)} images repeat another one ({fraction:.2%}).",
        value=fraction,
        limit=config.max_duplicate_fraction,
        offenders=[f"{path} = {first[sha]}" for path, sha in zip(copies["path"], copies["sha256"], strict=True)],
    )


def check_label_drift(
    manifest: pd.DataFrame, class_names: Sequence[str], classifier_type: ClassifierType, config: ValidateConfig
) -> CheckOutcome:
    """Compares the labels of train and test by Cramér's V; for multi-label, class by class, the largest counting."""
    train, test = (manifest.loc[manifest["split"] == split, "labels"] for split in ("train", "test"))
    if train.empty or test.empty:
        empty = "train" if train.empty else "test"
        return _not_judged("label_drift", config.label_drift, config.max_label_drift, f"{empty} has no images")
    first, second = (
        np.array([sum(name in labels for labels in rows) for name in class_names], float) for rows in (train, test)
    )
    shares = np.abs(first / len(train) - second / len(test))
    if classifier_type == "multi-class":
        drift = cramers_v(first, second)
        drifted = list(np.argsort(-shares, kind="stable")) if drift > config.max_label_drift else []
    else:
        per_class = np.array(
            [
                cramers_v(np.array([a, len(train) - a]), np.array([b, len(test) - b]))
                for a, b in zip(first, second, strict=True)
            ]
        )
        drift = float(per_class.max(initial=0.0))
        drifted = [i for i in np.argsort(-per_class, kind="stable") if per_class[i] > config.max_label_drift]
    return outcome(
        "label_drift",
        config.label_drift,
        passed=drift <= config.max_label_drift,
        summary=f"Cramér's V between the labels of train and test is {drift:.3f}"
        + (" for the class that differs most." if classifier_type == "multi-label" else "."),
        value=drift,
        limit=config.max_label_drift,
        offenders=[
            f"{class_names[i]}: {first[i] / len(train):.1%} of train, {second[i] / len(test):.1%} of test"
            for i in drifted
            if shares[i] > 0
        ],
    )


def check_property_drift(sample: ImageSample, config: ValidateConfig) -> CheckOutcome:
    """Compares the pixel statistics of train and test by the Kolmogorov–Smirnov distance, the largest counting."""
    train, test = (sample.properties[sample.positions(split)] for split in ("train", "test"))
    if not len(train) or not len(test):
        empty = "test" if len(train) else "train"
        return _not_judged("property_drift", config.property_drift, config.max_property_drift, f"{empty} has no images")
    distances = np.array([ks_distance(train[:, i], test[:, i]) for i in range(len(PROPERTY_NAMES))])
    largest = int(distances.argmax())
    limit = config.max_property_drift
    return outcome(
        "property_drift",
        config.property_drift,
        passed=bool(distances[largest] <= limit),
        summary=f"The largest distance between train and test is {distances[largest]:.3f} ({PROPERTY_NAMES[largest]}), "
        f"over {sample.description}.",
        value=float(distances[largest]),
        limit=limit,
        offenders=[
            f"{PROPERTY_NAMES[i]}: distance {distances[i]:.3f}, median {np.median(train[:, i]):.1f} in train, "
            f"{np.median(test[:, i]):.1f} in test"
            for i in np.argsort(-distances, kind="stable")
            if distances[i] > limit
        ],
    )


def cramers_v(first: np.ndarray, second: np.ndarray) -> float:
    """Returns Cramér's V between the group (first or second) and the category, both groups weighing the same.

    Without equal weights, V would depend on how large the test split is. What chance alone gives on average is
    subtracted (Bergsma 2013), so that small splits of one population come out near 0.

    Args:
        first: `(K,)` counts per category.
        second: `(K,)` counts per category.

    Returns:
        0 (same distribution) to 1 (no category in common); 0 when a group is empty.
    """
    sizes = float(first.sum()), float(second.sum())
    if min(sizes) == 0:
        return 0.0
    p, q = first / sizes[0], second / sizes[1]
    used = (p + q) > 0
    phi_squared = 0.5 * float((((p - q) ** 2)[used] / (p + q)[used]).sum())
    by_chance = (int(used.sum()) - 1) * (1 / sizes[0] + 1 / sizes[1]) / 4
    return float(np.sqrt(max(phi_squared - by_chance, 0.0)))


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the largest distance between the distribution functions of two samples that are not empty, 0 to 1."""
    values = np.concatenate([first, second])
    steps = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(steps[0] - steps[1]).max())


def _not_judged(name: str, severity: str, limit: float, reason: str) -> CheckOutcome:
    return outcome(name, severity, passed=True, summary=f"Not judged: {reason} (see class_coverage).", limit=limit)
