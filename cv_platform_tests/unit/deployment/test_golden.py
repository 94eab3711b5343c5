import numpy as np
import pytest

from cv_platform.deployment.golden import golden_rows

BY_CLASS = np.repeat([0, 1, 2, 3], [50, 30, 3, 1])
"""As a split is: ordered by path, so class by class."""


@pytest.mark.parametrize(
    ("count", "per_class"),
    [(4, [1, 1, 1, 1]), (7, [2, 2, 2, 1]), (10, [3, 3, 3, 1]), (12, [4, 4, 3, 1]), (84, [50, 30, 3, 1])],
)
def test_classes_take_turns_while_they_have_images(count: int, per_class: list[int]) -> None:
    rows = golden_rows(BY_CLASS, count)
    found = np.bincount(BY_CLASS[rows], minlength=4)
    assert len(set(rows)) == len(rows) == count
    assert found.tolist() == per_class


def test_fewer_images_than_classes_are_of_different_classes() -> None:
    rows = golden_rows(np.repeat(np.arange(10), 36), 8)
    assert len({row // 36 for row in rows}) == 8


def test_fewer_images_than_asked_for_are_all_taken() -> None:
    assert golden_rows(np.array([0, 0, 1]), 8) == [0, 1, 2]
    assert golden_rows(np.zeros((3, 2)), 8) == [0, 1, 2]
    assert golden_rows(np.zeros(0, dtype=np.int64), 8) == []


def test_the_choice_is_the_same_each_time_and_not_the_first_ones() -> None:
    rows = golden_rows(BY_CLASS, 8)
    assert golden_rows(BY_CLASS.copy(), 8) == rows
    assert rows != list(range(8))


def test_labels_of_multi_label_images_all_appear_and_no_image_twice() -> None:
    targets = np.zeros((60, 3), dtype=np.float32)
    targets[:50, 0] = 1
    targets[40:50, 1] = 1
    targets[49, 2] = 1  # The only image of its label has the two others, too.
    rows = golden_rows(targets, 4)
    assert len(set(rows)) == 4
    assert 49 in rows
    assert targets[rows].sum(axis=0).min() >= 1
    assert {int(targets[row].sum()) for row in golden_rows(targets, 60)} == {0, 1, 2, 3}
