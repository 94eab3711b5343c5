"""Shuffled, augmented batches of packed images, and how they reach Keras.

A batch is a pure function of (images, seed, epoch, batch index): shuffling permutes indices and never images, gathering
reads the shards, augmentation is seeded per batch. Hence a resumed training sees the batches that an
uninterrupted one would have seen. Ordered batches for evaluation and reference data come from `datasets.packing`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from cv_platform.cores import available_cores
from cv_platform.datasets.shards.reading import Images
from cv_platform.training.augmentation import Augmenter
from cv_platform.training.mixing import Mixing

if TYPE_CHECKING:
    import tensorflow as tf

PREFETCHED_BATCHES = 4
"""Bound of the queue between what makes batches and the training step."""
MOST_WORKERS = 8
"""Threads that make batches at the same time; more would be held up by the interpreter's lock."""


class ShuffledBatches:
    """The batches of one epoch after another, in a seeded order of their own for each epoch.

    The last incomplete batch of an epoch is left out (batch normalisation suffers from tiny batches); as the order
    changes, other images are left out each time. Fewer images than `batch_size` make one batch.

    Args:
        images: `(N, H, W, 3)` uint8, RGB; of a pack or in memory; maybe larger than those of the batches.
        targets: `(N,)` integer class indices or `(N, C)` float 0/1.
        classes: number of classes C.
        batch_size: images in a batch.
        augmenter: changes the images, and crops larger ones to the size of the batches; its seed is the order's, too.
        workers: threads that make batches, which decides nothing about them; by default as many as there are cores.
        draws: `(C,)` how often an image is drawn, by its class, relative to others; None: each once an epoch.
        mixing: mixes the changed images; None: nothing is mixed.
    """

    def __init__(
        self,
        images: Images,
        targets: np.ndarray,
        *,
        classes: int,
        batch_size: int,
        augmenter: Augmenter,
        workers: int | None = None,
        draws: np.ndarray | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        if len(images) == 0 or len(images) != len(targets):
            raise ValueError(
                f"Expected as many targets as images, at least one. Received: {len(images)}, {len(targets)}."
            )
        self.images = images
        self.targets = targets
        self.classes = classes
        self.batch_size = min(batch_size, len(images))
        self.augmenter = augmenter
        self.workers = workers or min(MOST_WORKERS, available_cores())
        self.mixing = mixing
        drawn = None if draws is None else draws[np.asarray(targets)]
        self._draws = None if drawn is None else drawn / drawn.sum()
        self.epoch = 0
        """The epoch that the next iteration walks; the training loop sets it."""
        self.share: tuple[int, int] = (0, 1)
        """Which part of each batch is made here, and of how many: others make the rest."""
        self.error: Exception | None = None
        """What stopped the last iteration: TensorFlow passes on its text only."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // self.batch_size

    @property
    def images_per_epoch(self) -> int:
        """Images that an epoch shows."""
        return self.steps * self.batch_size

    def batch(self, epoch: int, batch_index: int, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns one batch: `(B, H, W, 3)` uint8 images and `(B, C)` float32 targets (one-hot, or 0/1 per class).

        Args:
            epoch: from 0.
            batch_index: from 0.
            order: `self.order(epoch)`, when the caller has it already.
        """
        order = self.order(epoch) if order is None else order
        # Sorted, so that a memory-mapped file is read forwards; which images meet in a batch stays random.
        chosen = np.sort(order[batch_index * self.batch_size : (batch_index + 1) * self.batch_size])
        part, parts = self.share
        # As many in each part: their gradients count the same.
        chosen = chosen[part::parts][: self.batch_size // parts]
        batch_index = batch_index * parts + part
        images = self.augmenter(self.images[chosen], epoch=epoch, batch_index=batch_index)
        targets = as_probabilities(self.targets[chosen], self.classes)
        if self.mixing is None:
            return images, targets
        return self.mixing(images, targets, epoch=epoch, batch_index=batch_index)

    def order(self, epoch: int) -> np.ndarray:
        """Returns the seeded order of the image indices of `epoch`, `(N,)` int32 (4 MB per million images).

        A permutation; with `draws`, some images come twice and others not at all.
        """
        rng, rows = np.random.default_rng((self.augmenter.seed, epoch)), np.arange(len(self.images), dtype=np.int32)
        return rng.permutation(rows) if self._draws is None else rng.choice(rows, len(rows), p=self._draws)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Walks the batches of `self.epoch`, in their order."""
        return self.walk(self.epoch + 1)

    def walk(self, epochs: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Walks the batches from `self.epoch` on, in their order, to the end of the last of `epochs`.

        As many as there are workers are made at the same time, those of the next epoch too.
        """
        self.error = None
        try:
            made: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
            with ThreadPoolExecutor(self.workers, thread_name_prefix="batches") as pool:
                try:
                    for epoch in range(self.epoch, epochs):
                        order = self.order(epoch)
                        for batch_index in range(self.steps):
                            made.append(pool.submit(self.batch, epoch, batch_index, order))
                            if len(made) == self.workers:
                                yield made.popleft().result()
                    while made:
                        yield made.popleft().result()
                finally:
                    for waiting in made:  # An epoch that is left in its middle.
                        waiting.cancel()
        except Exception as err:
            self.error = err
            raise

    def dataset(self, epochs: int) -> tf.data.Dataset:
        """Returns the batches of `walk` as a `tf.data.Dataset`, asked for ahead by a thread of TensorFlow's.

        One iterator is for all epochs, with `steps_per_epoch`: a new one costs as much as making hundreds of small
        batches, and the first step of an epoch would wait. Keras wraps Python iterables (generators, PyDataset) into
        the same `from_generator`; made here, the queue is bounded, no batch is drawn to guess shapes, and the thread
        ends with its iterator.
        """
        import tensorflow as tf

        signature = (
            tf.TensorSpec((None, *(self.augmenter.image_size or self.images.shape[1:3]), 3), tf.uint8),
            tf.TensorSpec((None, self.classes), tf.float32),
        )
        dataset = tf.data.Dataset.from_generator(lambda: self.walk(epochs), output_signature=signature)
        return dataset.prefetch(PREFETCHED_BATCHES)


def ordered_dataset(
    images: Images, targets: np.ndarray, *, classes: int, batch_size: int, multiple_of: int = 1
) -> tf.data.Dataset:
    """Returns all images once, in order and unchanged, as a `tf.data.Dataset` of `(images uint8, targets float32)`.

    With `multiple_of`, a divisor of `batch_size`, each batch has a multiple of images: fewer at the end are left out.
    """
    import tensorflow as tf

    count = len(images) - len(images) % multiple_of

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            yield np.asarray(images[start:stop]), as_probabilities(np.asarray(targets[start:stop]), classes)

    signature = (tf.TensorSpec((None, *images.shape[1:]), tf.uint8), tf.TensorSpec((None, classes), tf.float32))
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    steps = -(-count // batch_size)
    return dataset.apply(tf.data.experimental.assert_cardinality(steps)).prefetch(PREFETCHED_BATCHES)


def as_probabilities(targets: np.ndarray, classes: int) -> np.ndarray:
    """Returns `(N, C)` float32: one-hot rows for `(N,)` class indices, and 0/1 rows as they are."""
    if targets.ndim == 2:
        return np.asarray(targets, dtype=np.float32)
    return np.eye(classes, dtype=np.float32)[targets]
