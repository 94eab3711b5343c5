"""Replica of the original's training input, for comparison only; written from its description, not from its code.

What each stage of `dataset` stands for in the original:

* a tf.data pipeline over *paths*, shuffled anew in each epoch with a buffer as long as the list;
* every image read and decoded from its file in every epoch, by TensorFlow, three channels, and resized by
  `tf.image.resize`, in a parallel map;
* with augmentation, one `tf.numpy_function` per image that hands a single uint8 image to imgaug: a share of the images
  (`Sometimes`) gets all the operations in random order;
* scaling to 0–1 in the pipeline, one-hot labels, `batch`, `prefetch`.

The operations and their ranges are those of the platform's `AugmentConfig`, so that both sides change images equally.
imgaug is imported here, beside the platform's only door to it, because a replica must not profit from what that door
does better; only a set that is named by `operations` is read there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cv_platform.config import AugmentConfig
from cv_platform.training.augmentation import build_imgaug, declared

if TYPE_CHECKING:
    import tensorflow as tf


def dataset(
    paths: Sequence[Path],
    labels: np.ndarray,
    *,
    classes: int,
    image_size: tuple[int, int],
    batch_size: int,
    augment: AugmentConfig | None,
    seed: int = 0,
) -> tf.data.Dataset:
    """Returns the original's pipeline; each iteration over it is an epoch.

    Args:
        paths: image files.
        labels: `(N,)` class indices.
        classes: number of classes C.
        image_size: (height, width) in pixels.
        batch_size: images in a batch.
        augment: what is changed at random; None: nothing.
        seed: of the order; imgaug stays unseeded, as it was.

    Returns:
        Batches `(images, targets)`: `(B, H, W, 3)` float32 in 0–1, and `(B, C)` float32 one-hot.
    """
    import tensorflow as tf

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.image.resize(image, image_size), tf.one_hot(label, classes)

    def scale(image: Any, target: Any) -> tuple[Any, Any]:
        return tf.ensure_shape(tf.cast(image, tf.float32), (*image_size, 3)) / 255.0, target

    names = [str(path) for path in paths]
    images = tf.data.Dataset.from_tensor_slices((names, labels)).shuffle(len(names), seed=seed)
    images = images.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    if augment is not None:
        change = augmenter(augment)

        def change_one(image: Any, target: Any) -> tuple[Any, Any]:
            return tf.numpy_function(lambda one: change(image=one), [tf.cast(image, tf.uint8)], tf.uint8), target

        images = images.map(change_one, num_parallel_calls=tf.data.AUTOTUNE)
    images = images.map(scale, num_parallel_calls=tf.data.AUTOTUNE)
    return images.batch(batch_size).prefetch(tf.data.AUTOTUNE)


def augmenter(config: AugmentConfig) -> Any:
    """Returns imgaug's augmenter: the operations of `config` in random order, for a share `sometimes` of the images."""
    import imgaug.augmenters

    if config.operations:
        return build_imgaug(declared(config), as_it_is=True)
    iaa: Any = imgaug.augmenters
    zoom, shift = config.scale_fraction, config.translate_fraction
    operations: list[Any] = []
    if config.flip_horizontal:
        operations.append(iaa.Fliplr(config.flip_horizontal))
    if config.flip_vertical:
        operations.append(iaa.Flipud(config.flip_vertical))
    if any((config.rotate_degrees, config.shear_degrees, zoom, shift)):
        operations.append(
            iaa.Affine(
                rotate=(-config.rotate_degrees, config.rotate_degrees),
                shear=(-config.shear_degrees, config.shear_degrees),
                scale=(1 - zoom, 1 + zoom),
                translate_percent={"x": (-shift, shift), "y": (-shift, shift)},
            )
        )
    if config.brightness_fraction:
        operations.append(iaa.Multiply((1 - config.brightness_fraction, 1 + config.brightness_fraction)))
    if config.contrast_fraction:
        operations.append(iaa.LinearContrast((1 - config.contrast_fraction, 1 + config.contrast_fraction)))
    if config.noise_std:
        operations.append(iaa.AdditiveGaussianNoise(scale=(0, config.noise_std), per_channel=True))
    if config.blur_sigma_px:
        operations.append(iaa.GaussianBlur(sigma=(0, config.blur_sigma_px)))
    return iaa.Sometimes(config.sometimes, iaa.Sequential(operations, random_order=True))
