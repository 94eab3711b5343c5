"""Random changes of training images: the only door to imgaug.

imgaug 0.4.0 (https://imgaug.readthedocs.io) is unmaintained; whoever replaces it changes this module alone.

NumPy's removed aliases: imgaug 0.4.0 still reads `np.bool` in `SomeOf`/`OneOf` and in polygon masks, and `np.complex`
in `Power` and frequency noise, always at call time and never at import. No augmenter below reaches these lines, so
NumPy is left unpatched: an alias put into NumPy's namespace would change what other libraries find there. Whoever adds
`OneOf` or `SomeOf` needs `numpy.bool = bool` until imgaug is replaced; a test runs every operation under NumPy as it
is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cv_platform.config import AugmentConfig


class Augmenter:
    """Applies `config` to batches, reproducibly: only the images and (seed, epoch, batch index) decide the result.

    The random state is set anew for each batch, so batches may be made in any order and any process. An instance serves
    one thread at a time.
    """

    def __init__(self, config: AugmentConfig, *, seed: int) -> None:
        self.config = config
        self.seed = seed
        self._sequence = _build(config)

    def __call__(self, images: np.ndarray, *, epoch: int, batch_index: int) -> np.ndarray:
        """Returns changed copies of `images`.

        Args:
            images: `(N, H, W, 3)` uint8, RGB.
            epoch: from 0.
            batch_index: position of the batch in its epoch, from 0.

        Returns:
            `(N, H, W, 3)` uint8, RGB.
        """
        if self._sequence is None or not len(images):
            return images
        entropy = np.random.SeedSequence((self.seed, epoch, batch_index)).generate_state(1)
        self._sequence.seed_(int(entropy[0]) & 0x7FFFFFFF)
        return self._sequence(images=images)


def _build(config: AugmentConfig) -> Any | None:
    """Returns the imgaug sequence, geometry first, or None when nothing is switched on."""
    if config.sometimes == 0:
        return None
    operations = [build(config) for build, is_on in _OPERATIONS if is_on(config)]
    if not operations:
        return None
    # `seed_()` reaches only children in a *list*: given bare, the sequence keeps its own unseeded state.
    return _iaa().Sometimes(config.sometimes, [_iaa().Sequential(operations)])


def _iaa() -> Any:
    """Imports imgaug late: it takes seconds."""
    import imgaug.augmenters

    return imgaug.augmenters


def _flip_horizontal(config: AugmentConfig) -> Any:
    return _iaa().Fliplr(config.flip_horizontal)


def _flip_vertical(config: AugmentConfig) -> Any:
    return _iaa().Flipud(config.flip_vertical)


def _affine(config: AugmentConfig) -> Any:
    """Rotation, shear, zoom and shift in one interpolation: four would blur four times, and cost four times as much."""
    zoom, shift = config.scale_fraction, config.translate_fraction
    return _iaa().Affine(
        rotate=(-config.rotate_degrees, config.rotate_degrees),
        shear=(-config.shear_degrees, config.shear_degrees),
        scale=(1 - zoom, 1 + zoom),
        translate_percent={"x": (-shift, shift), "y": (-shift, shift)},
        order=1,
        mode="constant",
        cval=0,
    )


def _brightness(config: AugmentConfig) -> Any:
    return _iaa().Multiply((1 - config.brightness_fraction, 1 + config.brightness_fraction))


def _contrast(config: AugmentConfig) -> Any:
    return _iaa().LinearContrast((1 - config.contrast_fraction, 1 + config.contrast_fraction))


def _noise(config: AugmentConfig) -> Any:
    return _iaa().AdditiveGaussianNoise(scale=(0, config.noise_std), per_channel=True)


def _blur(config: AugmentConfig) -> Any:
    return _iaa().GaussianBlur(sigma=(0, config.blur_sigma_px))


_OPERATIONS: tuple[tuple[Callable[[AugmentConfig], Any], Callable[[AugmentConfig], bool]], ...] = (
    (_flip_horizontal, lambda c: c.flip_horizontal > 0),
    (_flip_vertical, lambda c: c.flip_vertical > 0),
    (_affine, lambda c: any((c.rotate_degrees, c.shear_degrees, c.scale_fraction, c.translate_fraction))),
    (_brightness, lambda c: c.brightness_fraction > 0),
    (_contrast, lambda c: c.contrast_fraction > 0),
    (_noise, lambda c: c.noise_std > 0),
    (_blur, lambda c: c.blur_sigma_px > 0),
)
