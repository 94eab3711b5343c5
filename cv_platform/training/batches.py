"""Shuffled, augmented batches of packed images, and how they reach Keras.

A batch is a pure function of (images, seed, epoch, batch index): shuffling permutes indices and never images, gathering
reads the shards, augmentation is seeded per batch. Hence a resumed training sees the batches that an
uninterrupted one would have seen. Ordered batches for evaluation and reference data come from `datasets.packing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cv_platform.cores import available_cores
from cv_platform.datasets.shards.reading import Images, views
from cv_platform.training.augmentation import Augmenter
from cv_platform.training.fused import empty_images
from cv_platform.training.mixing import Mixing

if TYPE_CHECKING:
    import tensorflow as tf

PREFETCHED_BATCHES = 4
"""Bound of the queue between what makes batches and the training step."""
MOST_TOGETHER, CHUNK_BYTES = 8, 4_000_000
"""Batches that are made, or learned from, by one call, and bytes of them: larger batches one by one."""
MOST_WORKERS = 8
"""Threads that make batches at the same time; more would be held up by the interpreter's lock."""


class ShuffledBatches:
    """The batches of one epoch after another, in a seeded order of their own for each epoch.

    The last incomplete batch of an epoch is left out (batch normalisation suffers from tiny batches); as the order
    changes, other images are left out each time. Fewer images than `batch_size` make one batch.

    Args:
        images: `(N, H, W, 3)` uint8, RGB; of a pack or in memory; maybe larger than those of the batches.
        targets: `(N,)` integer class indices or `(N, C)` float 0/1, NaN where unknown.
        classes: number of classes C.
        batch_size: images in a batch.
        augmenter: changes the images, and crops larger ones to the size of the batches; its seed is the order's, too.
        workers: threads that make batches, which decides nothing about them; by default as many as there are cores, and
            one for small images, as more would take the interpreter's lock from each other (a fifth more CPU time).
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
        self.workers = workers
        self.mixing = mixing
        drawn = None if draws is None else draws[np.asarray(targets)]
        self._draws = None if drawn is None else drawn / drawn.sum()
        self.share: tuple[int, int] = (0, 1)
        """Which part of each batch is made here, and of how many: others make the rest."""
        self.error: Exception | None = None
        """What stopped the last dataset: TensorFlow passes on its text only."""

    @property
    def steps(self) -> int:
        """Batches in an epoch."""
        return len(self.images) // self.batch_size

    @property
    def images_per_epoch(self) -> int:
        """Images that an epoch shows."""
        return self.steps * self.batch_size

    @property
    def together(self) -> int:
        """Batches that are worth one call of Python, to be made or to be learned from: several small ones."""
        return max(1, min(MOST_TOGETHER, CHUNK_BYTES // (self.batch_size * math.prod(self._image_shape))))

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        height, width = self.augmenter.image_size or self.images.shape[1:3]
        return height, width, 3

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
        images = self.augmenter(views(self.images, chosen), epoch=epoch, batch_index=batch_index)
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

    def dataset(self, first: int, epochs: int) -> tf.data.Dataset:
        """Returns the batches of the epochs from `first` to the last of `epochs`, in their order.

        Threads of TensorFlow's make them ahead, as many at the same time as there are workers. One iterator is for all
        epochs, with `steps_per_epoch`: a new one costs as much as making hundreds of small batches, and the first step
        of an epoch would wait. Small batches are made several by one call of Python, within `CHUNK_BYTES`: what a call
        costs is then shared, and the training step seldom has to wait for the interpreter's lock.
        """
        import tensorflow as tf

        total, shape, together = (epochs - first) * self.steps, self._image_shape, self.together
        workers = self.workers or (1 if together == MOST_TOGETHER else min(MOST_WORKERS, available_cores()))
        order = lru_cache(maxsize=2)(self.order)
        self.error = None

        def make(chunk: np.int64) -> tuple[np.ndarray, np.ndarray]:
            wanted = range(int(chunk) * together, min((int(chunk) + 1) * together, total))
            epochs_and_indices = [divmod(position, self.steps) for position in wanted]
            try:
                made = [self.batch(first + epoch, index, order(first + epoch)) for epoch, index in epochs_and_indices]
            except Exception as err:
                self.error = err
                raise
            if together == 1:
                return made[0]
            images = empty_images((len(made), *made[0][0].shape))
            return np.stack([one for one, _ in made], out=images), np.stack([targets for _, targets in made])

        leading = (None,) if together == 1 else (None, None)
        chunks = tf.data.Dataset.range(-(-total // together))
        dataset = _made(chunks, make, (*leading, *shape), (*leading, self.classes), workers=workers)
        return (dataset if together == 1 else dataset.unbatch()).prefetch(PREFETCHED_BATCHES)


def ordered_dataset(
    images: Images, targets: np.ndarray, *, classes: int, batch_size: int, multiple_of: int = 1
) -> tf.data.Dataset:
    """Returns all images once, in order and unchanged, as a `tf.data.Dataset` of `(images uint8, targets float32)`.

    With `multiple_of`, a divisor of `batch_size`, each batch has a multiple of images: fewer at the end are left out.
    """
    import tensorflow as tf

    count = len(images) - len(images) % multiple_of

    def make(start: np.int64) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(int(start), min(int(start) + batch_size, count))
        return np.asarray(images[rows]), as_probabilities(np.asarray(targets[rows]), classes)

    starts = tf.data.Dataset.range(0, count, batch_size)
    return _made(starts, make, (None, *images.shape[1:]), (None, classes), workers=1).prefetch(PREFETCHED_BATCHES)


def _made(
    numbers: tf.data.Dataset,
    make: Callable[[np.int64], tuple[np.ndarray, np.ndarray]],
    images_shape: tuple[int | None, ...],
    targets_shape: tuple[int | None, ...],
    *,
    workers: int,
) -> tf.data.Dataset:
    """Returns what `make` makes of each number, uint8 images and float32 targets, in their order.

    `from_generator`, into which Keras wraps Python iterables, costs more by itself than augmentation does, and has the
    process give memory back to the system after each batch.
    """
    import tensorflow as tf

    def load(number: Any) -> tuple[Any, Any]:
        images, targets = tf.numpy_function(make, [number], (tf.uint8, tf.float32), stateful=False)
        return tf.ensure_shape(images, images_shape), tf.ensure_shape(targets, targets_shape)

    options = tf.data.Options()
    # Threads of their own: calls that wait for the interpreter's lock would hold up the operations of a step.
    options.threading.private_threadpool_size = workers
    options.autotune.enabled = False  # There is nothing to tune, and its model of the pipeline costs CPU time.
    return numbers.map(load, num_parallel_calls=workers, deterministic=True).with_options(options)


def as_probabilities(targets: np.ndarray, classes: int) -> np.ndarray:
    """Returns `(N, C)` float32: one-hot rows for `(N,)` class indices, and 0/1 rows as they are."""
    if targets.ndim == 2:
        return np.asarray(targets, dtype=np.float32)
    return np.eye(classes, dtype=np.float32)[targets]
