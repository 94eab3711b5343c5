"""Batches: every image at its label, shuffled, reproducible, made ahead, and loud when they fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cv_platform.config import AugmentConfig
from cv_platform.training.augmentation import Augmenter
from cv_platform.training.batches import (
    MOST_TOGETHER,
    PREFETCHED_BATCHES,
    ShuffledBatches,
    as_probabilities,
    ordered_dataset,
)
from cv_platform.training.fused import Pixels
from cv_platform.training.mixing import Mixing

UNTOUCHED = AugmentConfig()


def numbered_images(count: int) -> np.ndarray:
    """Returns images whose pixels are all their own index."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 4, 3)).copy()


def batches_of(
    images: np.ndarray, targets: np.ndarray, *, batch_size: int = 8, augment: AugmentConfig = UNTOUCHED, seed: int = 1
) -> ShuffledBatches:
    return ShuffledBatches(images, targets, classes=5, batch_size=batch_size, augmenter=Augmenter(augment, seed=seed))


def epoch_of(batches: ShuffledBatches, epoch: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [batches.batch(epoch, index) for index in range(batches.steps)]


def test_an_epoch_has_each_image_once_with_its_own_label() -> None:
    images, targets = numbered_images(40), np.arange(40) % 5

    batches = epoch_of(batches_of(images, targets))

    assert [len(x) for x, _ in batches] == [8] * 5
    seen = np.concatenate([x[:, 0, 0, 0] for x, _ in batches])
    labels = np.concatenate([y for _, y in batches])
    assert sorted(seen) == list(range(40))
    np.testing.assert_array_equal(labels.argmax(axis=1), seen % 5)
    assert {x.dtype for x, _ in batches} == {np.dtype(np.uint8)}
    assert labels.dtype == np.float32


def test_each_epoch_has_an_order_of_its_own_that_only_the_seed_decides() -> None:
    images, targets = numbered_images(40), np.zeros(40, np.int64)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [x[:, 0, 0, 0].tolist() for x, _ in epoch_of(batches_of(images, targets, seed=seed), epoch)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_the_rest_that_fills_no_batch_is_left_out_and_changes_with_the_epoch() -> None:
    batches = batches_of(numbered_images(21), np.zeros(21, np.int64))

    left_out = set()
    for epoch in range(20):
        seen = {int(i) for x, _ in epoch_of(batches, epoch) for i in x[:, 0, 0, 0]}
        assert len(seen) == batches.images_per_epoch == 16
        left_out |= set(range(21)) - seen
    assert left_out == set(range(21))


def test_fewer_images_than_a_batch_make_one_batch() -> None:
    batches = batches_of(numbered_images(3), np.zeros(3, np.int64))

    assert batches.steps == 1
    assert [len(x) for x, _ in epoch_of(batches)] == [3]


@pytest.mark.parametrize("engine", ["imgaug", "fused"])
def test_batches_that_threads_make_are_those_that_one_makes_bit_by_bit(engine: Any) -> None:
    config = AugmentConfig(rotate_degrees=20, noise_std=20, auto="strong", engine=engine)
    images = np.random.default_rng(2).integers(0, 256, (96, 12, 12, 3), dtype=np.uint8)

    def made(workers: int) -> list[np.ndarray]:
        batches = ShuffledBatches(
            images,
            np.arange(96) % 5,
            classes=5,
            batch_size=4,
            augmenter=Augmenter(config, seed=3),
            workers=workers,
        )
        alone = [x for epoch in (2, 3) for x, _ in epoch_of(batches, epoch)]
        received = [x.numpy() for x, _ in batches.dataset(2, 4)]
        assert len(alone) == len(received) == 48
        for one, other in zip(alone, received, strict=True):
            np.testing.assert_array_equal(one, other)
        return received

    for one, other in zip(made(1), made(6), strict=True):
        np.testing.assert_array_equal(one, other)


def test_augmentation_does_not_reach_the_source() -> None:
    images = numbered_images(40)

    epoch_of(batches_of(images, np.zeros(40, np.int64), augment=AugmentConfig(sometimes=1.0, brightness_fraction=0.5)))

    np.testing.assert_array_equal(images, numbered_images(40))


def test_a_memory_mapped_file_is_read_without_being_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", numbered_images(16))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")

    images, _ = batches_of(mapped, np.zeros(16, np.int64)).batch(0, 0)

    assert not isinstance(images, np.memmap)
    assert images.flags.writeable


@pytest.mark.parametrize("side", [4, 900])
def test_the_dataset_walks_the_epochs_from_the_first_that_is_asked_for(side: int) -> None:
    # Of 4 pixels each call makes 8 batches, which is none of 14's parts; of 900 it makes one.
    images = np.broadcast_to(numbered_images(21)[:, :1, :1], (21, side, side, 3))
    batches = batches_of(images, np.arange(21) % 5, batch_size=3)

    expected = [batches.batch(epoch, index) for epoch in (3, 4) for index in range(7)]
    received = [(x.numpy(), y.numpy()) for x, y in batches.dataset(3, 5)]

    assert len(received) == len(expected) == 14
    for (x, y), (expected_x, expected_y) in zip(received, expected, strict=True):
        np.testing.assert_array_equal(x, expected_x)
        np.testing.assert_array_equal(y, expected_y)


class Counting(Augmenter):
    """Notes the batches that it is asked for."""

    def __init__(self) -> None:
        super().__init__(UNTOUCHED, seed=1)
        self.made: list[int] = []

    def __call__(self, images: Pixels, *, epoch: int, batch_index: int) -> np.ndarray:
        self.made.append(batch_index)
        return np.stack(list(images))


@pytest.mark.parametrize(("side", "together"), [(4, MOST_TOGETHER), (900, 1)])
def test_batches_are_made_ahead_only_up_to_the_bound(side: int, together: int) -> None:
    counting = Counting()
    images = np.broadcast_to(numbered_images(200)[:, :1, :1], (200, side, side, 3))
    batches = ShuffledBatches(images, np.zeros(200, np.int64), classes=5, batch_size=2, augmenter=counting, workers=2)
    iterator = iter(batches.dataset(0, 1))
    for _ in range(3):
        next(iterator)

    # Those in the queue, those with the workers, a call's that are handed out one by one, and one on its way.
    assert 3 <= len(counting.made) <= 3 + PREFETCHED_BATCHES + (2 + 1) * together + 1
    del iterator


def test_an_iterator_that_is_left_in_the_middle_makes_no_more() -> None:
    counting = Counting()
    batches = ShuffledBatches(
        numbered_images(200), np.zeros(200, np.int64), classes=5, batch_size=2, augmenter=counting
    )
    iterator = iter(batches.dataset(0, 1000))
    next(iterator)
    del iterator
    before = len(counting.made)

    list(batches.dataset(0, 1))

    assert before < 500
    assert len(counting.made) == before + 100


def test_batches_of_larger_images_have_the_size_of_the_models_input() -> None:
    images = np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None, None], (16, 6, 6, 3))
    augmenter = Augmenter(UNTOUCHED, seed=1, image_size=(4, 4))
    batches = ShuffledBatches(images, np.arange(16) % 5, classes=5, batch_size=8, augmenter=augmenter)
    dataset = batches.dataset(0, 1)
    signature: Any = dataset.element_spec
    assert tuple(signature[0].shape) == (None, 4, 4, 3)
    for seen, targets in dataset.as_numpy_iterator():
        np.testing.assert_array_equal(seen[:, 0, 0, 0] % 5, targets.argmax(axis=1))
        assert seen.shape == (8, 4, 4, 3)


def test_a_failing_batch_stops_the_epoch_and_keeps_its_error() -> None:
    import tensorflow as tf

    class Failing(Augmenter):
        def __call__(self, images: Pixels, *, epoch: int, batch_index: int) -> np.ndarray:
            if batch_index == 2:
                raise OSError("disk gone")
            return np.stack(list(images))

    batches = ShuffledBatches(
        numbered_images(40),
        np.zeros(40, np.int64),
        classes=5,
        batch_size=8,
        augmenter=Failing(UNTOUCHED, seed=1),
    )

    with pytest.raises(tf.errors.OpError):
        list(batches.dataset(0, 1))

    assert isinstance(batches.error, OSError)
    assert str(batches.error) == "disk gone"


def test_ordered_batches_keep_the_order_and_the_rest() -> None:
    images, targets = numbered_images(11), np.arange(11) % 5

    received = list(ordered_dataset(images, targets, classes=5, batch_size=4))

    assert [len(x) for x, _ in received] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([x.numpy() for x, _ in received]), images)
    np.testing.assert_array_equal(np.concatenate([y.numpy() for _, y in received]).argmax(axis=1), targets)


def test_targets_become_rows() -> None:
    np.testing.assert_array_equal(as_probabilities(np.array([2, 0]), 3), [[0, 0, 1], [1, 0, 0]])
    many = np.array([[1, 1, 0], [0, 0, 0]], dtype=np.float32)
    np.testing.assert_array_equal(as_probabilities(many, 3), many)


def test_refuses_targets_of_another_length() -> None:
    with pytest.raises(ValueError, match="as many targets as images"):
        batches_of(numbered_images(3), np.zeros(4, np.int64))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_label_of_a_mixture_is_known_where_those_of_both_images_are(kind: str) -> None:
    mixing = Mixing(mixup_alpha=float(kind == "mixup"), cutmix_alpha=float(kind == "cutmix"), seed=1)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    targets = np.array([[0, 1], [0, 1], [0, 1], [np.nan, 1]], np.float32)
    _, mixed = mixing(images, targets, epoch=0, batch_index=0)
    others = np.random.default_rng((1, 0, 0, 1))
    others.integers(1)
    others.beta(1.0, 1.0)
    partners = others.permutation(4)
    expected = np.isnan(targets[:, 0]) | np.isnan(targets[partners, 0])
    assert np.isnan(mixed[:, 0]).tolist() == expected.tolist()
    assert mixed[:, 1].tolist() == [1.0] * 4
    assert (mixed[~expected, 0] == 0).all()
