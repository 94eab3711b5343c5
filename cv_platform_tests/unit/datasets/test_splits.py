from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cv_platform.datasets.splits import complete_splits, split_identical_together
from cv_platform.errors import InvalidDatasetError

from .conftest import dataset


def sha(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()


def test_deals_the_rounded_share_of_every_class() -> None:
    labels = [("cat",)] * 20 + [("dog",)] * 10
    splits = split_identical_together(
        [sha(i) for i in range(30)], labels, {"valid": 0.15, "reference": 0.2}, seed=0, remainder="train"
    )
    # cat: 20 * 0.15 = 3, 20 * 0.2 = 4; dog: 10 * 0.15 = 1.5 -> 2, 10 * 0.2 = 2.
    assert Counter(zip([name for (name,) in labels], splits, strict=True)) == {
        ("cat", "valid"): 3,
        ("cat", "reference"): 4,
        ("cat", "train"): 13,
        ("dog", "valid"): 2,
        ("dog", "reference"): 2,
        ("dog", "train"): 6,
    }


def test_membership_depends_on_content_and_seed_not_on_order() -> None:
    hashes = [sha(i) for i in range(40)]
    labels = [("cat",) if i % 2 else ("dog",) for i in range(40)]
    first = dict(zip(hashes, split_identical_together(hashes, labels, {"v": 0.3}, seed=1, remainder="t"), strict=True))
    again = split_identical_together(hashes[::-1], labels[::-1], {"v": 0.3}, seed=1, remainder="t")
    assert dict(zip(hashes[::-1], again, strict=True)) == first
    assert split_identical_together(hashes, labels, {"v": 0.3}, seed=2, remainder="t") != list(first.values())


def test_small_class_reaches_every_split_before_any_gets_a_second() -> None:
    splits = split_identical_together(
        [sha(i) for i in range(4)],
        [("cat",)] * 4,
        {"test": 0.1, "reference": 0.1, "valid": 0.1},
        seed=0,
        remainder="train",
    )
    assert sorted(splits) == ["reference", "test", "train", "valid"]


def test_too_small_class_stays_with_the_remainder() -> None:
    splits = split_identical_together([sha(0)], [("cat",)], {"valid": 0.4}, seed=0, remainder="train")
    assert splits == ["train"]


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 15), st.sets(st.sampled_from(["a", "b", "c"]), max_size=3)), min_size=1, max_size=60
    ),
    shares=st.tuples(st.floats(0.01, 0.32), st.floats(0.01, 0.32), st.floats(0.01, 0.32)),
    seed=st.integers(0, 5),
)
def test_identical_images_are_never_on_two_sides(
    rows: list[tuple[int, set[str]]], shares: tuple[float, float, float], seed: int
) -> None:
    hashes = [sha(index) for index, _ in rows]
    fractions: dict[str, float] = dict(zip(("test", "reference", "valid"), shares, strict=True))
    splits = split_identical_together(
        hashes, [tuple(sorted(names)) for _, names in rows], fractions, seed=seed, remainder="train"
    )
    assert len({(sha256, split) for sha256, split in zip(hashes, splits, strict=True)}) == len(set(hashes))
    assert "train" in splits


@given(sizes=st.lists(st.integers(5, 60), min_size=1, max_size=4), share=st.floats(0.05, 0.45), seed=st.integers(0, 3))
def test_every_class_keeps_its_share_within_one_image(sizes: list[int], share: float, seed: int) -> None:
    labels = [(str(name),) for name, size in enumerate(sizes) for _ in range(size)]
    splits = split_identical_together(
        [sha(i) for i in range(len(labels))], labels, {"valid": share}, seed=seed, remainder="train"
    )
    taken = Counter(name for (name,), split in zip(labels, splits, strict=True) if split == "valid")
    for name, size in enumerate(sizes):
        assert abs(taken[str(name)] - share * size) <= 1


def test_takes_missing_valid_and_reference_from_train_and_says_so() -> None:
    given_splits = ["train"] * 20 + ["test"] * 5
    splits, origins = complete_splits(
        given_splits, [sha(i) for i in range(25)], [("cat",)] * 25, dataset(valid_fraction=0.1, reference_fraction=0.2)
    )
    assert Counter(splits) == {"train": 14, "valid": 2, "reference": 4, "test": 5}
    assert splits[20:] == ["test"] * 5
    expected = {"train": "given", "test": "given", "valid": "taken from train", "reference": "taken from train"}
    assert origins == [expected[split] for split in splits]


def test_takes_only_the_missing_split() -> None:
    splits, origins = complete_splits(
        ["train"] * 20 + ["test", "valid"], [sha(i) for i in range(22)], [("cat",)] * 22, dataset()
    )
    assert Counter(splits) == {"train": 16, "reference": 4, "test": 1, "valid": 1}
    assert Counter(origins) == {"given": 18, "taken from train": 4}


def test_takes_test_too_when_there_are_no_splits() -> None:
    splits, _ = complete_splits([None] * 20, [sha(i) for i in range(20)], [("cat",)] * 20, dataset())
    assert Counter(splits) == {"test": 3, "reference": 4, "valid": 3, "train": 10}


def test_given_splits_stay_as_they_are() -> None:
    names = ["train", "valid", "test", "reference"]
    splits, origins = complete_splits(names, [sha(i) for i in range(4)], [("cat",)] * 4, dataset())
    assert (splits, set(origins)) == (names, {"given"})


@pytest.mark.parametrize(
    ("given_splits", "message"),
    [
        (["valid", "test"], "the split train, .* Received: test, valid"),
        (["train", None], "1 of 2 images without one"),
    ],
)
def test_refuses_splits_that_cannot_be_completed(given_splits: list[str | None], message: str) -> None:
    with pytest.raises(InvalidDatasetError, match=message):
        complete_splits(given_splits, [sha(0), sha(1)], [("cat",)] * 2, dataset())


def test_refuses_fractions_that_leave_nothing() -> None:
    config = dataset(valid_fraction=0.4, reference_fraction=0.4, test_fraction=0.4)
    with pytest.raises(InvalidDatasetError, match="leave something for train"):
        complete_splits([None], [sha(0)], [("cat",)], config)
