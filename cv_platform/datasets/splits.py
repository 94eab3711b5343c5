"""Which split an image belongs to when the dataset does not say: seeded, stratified, and the same for copies.

Membership depends on the content, the labels and the seed, never on file names, order or a random state: the same
images give the same splits on every machine, and two copies of one image never end up on both sides of a split.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from cv_platform.config import DatasetConfig
from cv_platform.errors import InvalidDatasetError

SPLITS: tuple[str, ...] = ("train", "valid", "test", "reference")
GIVEN = "given"
TAKEN = "taken from train"


def complete_splits(
    given: Sequence[str | None],
    sha256s: Sequence[str],
    labels: Sequence[Sequence[str]],
    dataset: DatasetConfig,
    *,
    by_size: bool = False,
) -> tuple[list[str], list[str]]:
    """Fills in the splits that a dataset does not have.

    A missing test, valid or reference split is taken from train, or of all images where there is no split at all.

    Args:
        given: the split of each image, or all None.
        sha256s: of each image's file, or what it shares with near-copies or its group: images of one go together.
        labels: the class names of each image.
        dataset: fractions (of train, or of all images without splits) and seed.
        by_size: see `split_identical_together`.

    Returns:
        The split of each image, and its origin: `given` or `taken from train`.

    Raises:
        InvalidDatasetError: some images have a split and others none, train is missing, or the fractions leave nothing
            for it.
    """
    present = set(given)
    if None in present and len(present) > 1:
        without = sum(split is None for split in given)
        raise InvalidDatasetError(
            f"Expected a split for every image, or for none. Received: {without} of {len(given)} images without one. "
            "Fill in the split column, or remove it."
        )
    if None not in present and "train" not in present:
        raise InvalidDatasetError(
            f"Expected the split train, from which the others can be taken. Received: "
            f"{', '.join(sorted(str(split) for split in present))}. Add it, or give the images without splits."
        )
    wanted = tuple(split for split in ("test", "reference", "valid") if split not in present)
    fractions = {split: float(getattr(dataset, f"{split}_fraction")) for split in wanted}
    pool = [row for row, split in enumerate(given) if split in (None, "train")]
    taken = split_identical_together(
        [sha256s[row] for row in pool],
        [labels[row] for row in pool],
        fractions,
        seed=dataset.split_seed,
        remainder="train",
        by_size=by_size,
    )
    splits = [split or "train" for split in given]
    origins = [GIVEN] * len(splits)
    for row, split in zip(pool, taken, strict=True):
        if split != "train":
            splits[row], origins[row] = split, TAKEN
    return splits, origins


def split_identical_together(
    sha256s: Sequence[str],
    labels: Sequence[Sequence[str]],
    fractions: Mapping[str, float],
    *,
    seed: int,
    remainder: str,
    by_size: bool = False,
) -> list[str]:
    """Deals images out to splits, the same share of every class, identical images together.

    The class that counts is the image's rarest one. Of `n` distinct images of a class, each split gets
    `round(fraction * n)`, at least one when there are enough for all splits, and `remainder` the rest.

    Args:
        sha256s: identity of each image.
        labels: the class names of each image.
        fractions: the share of each split; must leave something for `remainder`.
        seed: which images go where.
        remainder: the split that gets the rest.
        by_size: what is dealt together are groups of many sizes: a split's share is of the images, and what a class
            has too few groups for is made up for by the next class.

    Returns:
        The split of each image, in order.

    Raises:
        InvalidDatasetError: the fractions add up to 1 or more.
    """
    if sum(fractions.values()) >= 1:
        parts = ", ".join(f"{split} {share:g}" for split, share in fractions.items())
        raise InvalidDatasetError(
            f"Expected split fractions that leave something for {remainder}. Received: {parts}. Lower them."
        )
    classes_of: dict[str, set[str]] = defaultdict(set)
    for sha256, names in zip(sha256s, labels, strict=True):
        classes_of[sha256].update(names)
    frequency = Counter(name for names in classes_of.values() for name in names)
    strata: dict[str, list[str]] = defaultdict(list)
    for sha256, names in classes_of.items():
        strata[min(names, key=lambda name: (frequency[name], name), default="")].append(sha256)
    split_of: dict[str, str] = {}
    for members in strata.values():
        members.sort(key=lambda sha256: hashlib.sha256(f"{seed}:{sha256}".encode()).digest())
    if by_size:
        return list(map(_deal_by_size(strata, Counter(sha256s), fractions, remainder).__getitem__, sha256s))
    for members in strata.values():
        counts = _counts(len(members), fractions)
        dealt = [split for split, count in counts.items() for _ in range(count)]
        split_of.update(zip(members, dealt + [remainder] * (len(members) - len(dealt)), strict=True))
    return [split_of[sha256] for sha256 in sha256s]


def deal_additions(
    sha256s: Sequence[str], labels: Sequence[Sequence[str]], before: Sequence[tuple[str, Sequence[str]]], *, seed: int
) -> list[str]:
    """Deals new images out to the splits of a dataset, whose own images stay where they are.

    Each class comes as close as it can to the shares that the splits have in the whole dataset; train gets the rest.
    The class that counts is the image's rarest one.

    Args:
        sha256s: of the new images; no two are copies of each other, or of an image that is there.
        labels: the class names of each.
        before: split and class names of the images that are there.
        seed: which images go where.

    Returns:
        The split of each image, in order.
    """
    frequency = Counter(name for names in (*labels, *(names for _, names in before)) for name in names)

    def stratum(names: Sequence[str]) -> str:
        return min(names, key=lambda name: (frequency[name], name), default="")

    shares = {split: count / len(before) for split, count in Counter(split for split, _ in before).items()}
    there = Counter((stratum(names), split) for split, names in before)
    members: dict[str, list[str]] = defaultdict(list)
    for sha256, names in zip(sha256s, labels, strict=True):
        members[stratum(names)].append(sha256)
    split_of: dict[str, str] = {}
    for name, new in members.items():
        new.sort(key=lambda sha256: hashlib.sha256(f"{seed}:{sha256}".encode()).digest())
        total = len(new) + sum(there[name, split] for split in SPLITS)
        dealt = [
            split
            for split in ("test", "reference", "valid")
            for _ in range(int(shares.get(split, 0.0) * total + 0.5) - there[name, split])
        ]
        split_of.update(zip(new, (dealt + ["train"] * len(new))[: len(new)], strict=True))
    return [split_of[sha256] for sha256 in sha256s]


def _deal_by_size(
    strata: Mapping[str, Sequence[str]], sizes: Mapping[str, int], fractions: Mapping[str, float], remainder: str
) -> dict[str, str]:
    """Returns the split of each group: in order, the split that lacks the most images, if the group fits by half."""
    shares = {**fractions, remainder: 1 - sum(fractions.values())}
    lacking = dict.fromkeys(shares, 0.0)
    split_of: dict[str, str] = {}
    for _, members in sorted(strata.items()):
        total = sum(sizes[member] for member in members)
        for split, share in shares.items():
            lacking[split] += share * total
        for member in members:
            fitting = [split for split in shares if lacking[split] >= sizes[member] / 2]
            split = max(fitting, key=lambda name: lacking[name], default=remainder)
            split_of[member] = split
            lacking[split] -= sizes[member]
    return split_of


def _counts(members: int, fractions: Mapping[str, float]) -> dict[str, int]:
    least = 1 if members > len(fractions) else 0
    counts = {split: max(least, int(share * members + 0.5)) for split, share in fractions.items()}
    # Rounding up may have left nothing for the remainder.
    while counts and sum(counts.values()) >= max(members, 1):
        largest = max(counts, key=lambda split: counts[split])
        if counts[largest] == 0:
            break
        counts[largest] -= 1
    return counts
