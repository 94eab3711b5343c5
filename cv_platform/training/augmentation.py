"""Random changes of training images: what a config says of them, by one of two engines; and the only door to imgaug.

imgaug 0.4.0 (https://imgaug.readthedocs.io) is unmaintained; whoever replaces it changes this module alone. The other
engine is `fused`, which knows the common operations. What may be named is in `config.augmentation`.

NumPy's removed aliases: imgaug 0.4.0 still reads `np.bool` in `SomeOf` and `OneOf`, and `np.complex` in `Power` and
frequency noise, always at call time. An alias put into NumPy's namespace would change what other libraries find there,
so imgaug's one module that needs it gets a NumPy of its own; `np.complex` is reached by nothing that a config may name.
It can go when imgaug is replaced.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from cv_platform.config import AugmentConfig
from cv_platform.config.augmentation import Operation, parse_operations
from cv_platform.datasets.contact_sheet import SheetRow, draw_sheet
from cv_platform.datasets.packing import PackedSplit
from cv_platform.training.fused import (
    BORDERS,
    INTERPOLATIONS,
    FusedEngine,
    Pixels,
    about_corner,
    affine_matrices,
    empty_images,
)


class Augmenter:
    """Applies `config` to batches, reproducibly: only the images and (seed, epoch, batch index) decide the result.

    The random state is set anew for each batch, so batches may be made in any order, by any thread or process.

    Args:
        config: the random changes.
        seed: of all draws.
        image_size: (height, width) that larger images are cropped to at random, before they are changed; None: all have
            the size that they are to have.
    """

    def __init__(self, config: AugmentConfig, *, seed: int, image_size: tuple[int, int] | None = None) -> None:
        self.config = config
        self.seed = seed
        self.image_size = image_size
        steps = declared(config)
        self._engine: Callable[[Pixels, np.random.SeedSequence], np.ndarray] | None = None
        if steps:
            self._engine = FusedEngine(steps) if config.engine == "fused" else _ImgaugEngine(steps)

    def __call__(self, images: Pixels, *, epoch: int, batch_index: int) -> np.ndarray:
        """Returns changed copies of `images`.

        Args:
            images: `(N, H, W, 3)` uint8, RGB, or views of each image.
            epoch: from 0.
            batch_index: position of the batch in its epoch, from 0.

        Returns:
            `(N, H, W, 3)` uint8, RGB; of `image_size`, where that is given.
        """
        if not len(images):
            return np.asarray(images)
        if self.image_size is not None and images[0].shape[:2] != self.image_size:
            images = _random_parts(images, self.image_size, np.random.default_rng((self.seed, epoch, batch_index, 2)))
        if self._engine is None:
            return np.stack(list(images), out=empty_images((len(images), *images[0].shape)))
        return self._engine(images, np.random.SeedSequence((self.seed, epoch, batch_index)))


def declared(config: AugmentConfig) -> tuple[Operation, ...]:
    """Returns everything that a config switches on, in its order."""
    single = _single_fields(config)
    sometimes = {"Sometimes": {"p": config.sometimes, "then_list": [{"Sequential": {"children": single}}]}}
    listed = [*([sometimes] if single and config.sometimes else []), *config.operations, *_auto(config.auto)]
    return parse_operations(listed) if listed else ()


def _single_fields(config: AugmentConfig) -> list[Any]:
    """Returns the operations that the single fields switch on, geometry first.

    Rotation, shear, zoom and shift are one: four interpolations would blur four times.
    """
    zoom, shift = config.scale_fraction, config.translate_fraction
    affine = {
        "rotate": [-config.rotate_degrees, config.rotate_degrees],
        "shear": [-config.shear_degrees, config.shear_degrees],
        "scale": [1 - zoom, 1 + zoom],
        "translate_percent": {"x": [-shift, shift], "y": [-shift, shift]},
    }
    brightness, contrast = config.brightness_fraction, config.contrast_fraction
    listed: list[tuple[float, Any]] = [
        (config.flip_horizontal, {"Fliplr": config.flip_horizontal}),
        (config.flip_vertical, {"Flipud": config.flip_vertical}),
        (max(config.rotate_degrees, config.shear_degrees, zoom, shift), {"Affine": affine}),
        (brightness, {"Multiply": [1 - brightness, 1 + brightness]}),
        (contrast, {"LinearContrast": [1 - contrast, 1 + contrast]}),
        (config.noise_std, {"AdditiveGaussianNoise": {"scale": [0, config.noise_std], "per_channel": True}}),
        (config.blur_sigma_px, {"GaussianBlur": [0, config.blur_sigma_px]}),
    ]
    return [operation for strength, operation in listed if strength]


def _auto(strength: str) -> list[Any]:
    """Returns a set after RandAugment: some of twelve operations for each image, all at one strength.

    Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space", section 3. The
    paper's operations that flatten a histogram are left out; there is no mirror image among them.
    """
    if strength == "none":
        return []
    at = {"light": 1, "medium": 2, "strong": 3}[strength]
    border = {"cval": 128}
    members: list[Any] = [
        "Identity",
        {"Rotate": {"rotate": [-10 * at, 10 * at], **border}},
        {"ShearX": {"shear": [-6 * at, 6 * at], **border}},
        {"ShearY": {"shear": [-6 * at, 6 * at], **border}},
        {"TranslateX": {"percent": [-0.08 * at, 0.08 * at], **border}},
        {"TranslateY": {"percent": [-0.08 * at, 0.08 * at], **border}},
        {"Multiply": [1 - 0.2 * at, 1 + 0.2 * at]},
        {"LinearContrast": [1 - 0.2 * at, 1 + 0.2 * at]},
        {"GammaContrast": [1 - 0.15 * at, 1 + 0.3 * at]},
        {"MultiplySaturation": [1 - 0.3 * at, 1 + 0.3 * at]},
        {"Posterize": [8 - at, 8]},
        {"Solarize": {"p": 1.0, "threshold": [256 - 40 * at, 256]}},
    ]
    return [{"SomeOf": {"n": at, "random_order": True, "children": members}}]


def _random_parts(images: Pixels, image_size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Shows a part of each image, of the images' own proportions, at `image_size`.

    Its sides are drawn between `image_size` and the whole image, so that what the service shows, the whole, is among
    what is learned from: with parts of one size, objects would be larger in training than anywhere else (Touvron et
    al. 2019, "Fixing the train-test resolution discrepancy").
    """
    whole, least = np.array(images[0].shape[:2]), np.array(image_size)
    sides = np.rint(least + rng.random((len(images), 1)) * (whole - least)).astype(int)
    corners = np.floor(rng.random((len(images), 2)) * (whole - sides + 1)).astype(int)
    parts = empty_images((len(images), *image_size, 3))
    for part, image, (height, width), (top, left) in zip(parts, images, sides.tolist(), corners.tolist(), strict=True):
        box = image[top : top + height, left : left + width]
        cv2.resize(box, image_size[::-1], dst=part, interpolation=cv2.INTER_LINEAR)
    return parts


def augmented_sheet(split: PackedSplit, class_names: Sequence[str], augmenter: Augmenter, *, draws: int = 7) -> bytes:
    """Draws the first image of each class as the model sees it, then as `draws` epochs would, and returns a PNG.

    Args:
        split: the training images; with several labels an image is in the row of each of its classes.
        class_names: in the order of the indices.
        augmenter: changes the images.
        draws: columns beside the first.
    """
    targets = split.targets
    members = targets > 0 if targets.ndim == 2 else targets[:, None] == np.arange(len(class_names))
    rows_of = {name: np.flatnonzero(members[:, index]) for index, name in enumerate(class_names)}
    found = [(name, rows[0]) for name, rows in rows_of.items() if len(rows)]
    seen, stored = (np.stack([images[row] for _, row in found]) for images in (split.images, split.stored))
    epochs = [seen, *(augmenter(stored, epoch=epoch, batch_index=0) for epoch in range(draws))]
    rows = [SheetRow(name, "as it is →", [epoch[at] for epoch in epochs]) for at, (name, _) in enumerate(found)]
    return draw_sheet(rows, columns=1 + draws, what="classes")


class _ImgaugEngine:
    """imgaug's augmenters; each thread has its own, as they keep their random state."""

    def __init__(self, steps: Sequence[Operation]) -> None:
        self._steps = steps
        self._of_thread = threading.local()

    def __call__(self, images: Pixels, entropy: np.random.SeedSequence) -> np.ndarray:
        from imgaug.augmentables.batches import _BatchInAugmentation

        augmenter = getattr(self._of_thread, "augmenter", None)
        if augmenter is None:
            augmenter = self._of_thread.augmenter = build_imgaug(self._steps)
        augmenter.seed_(int(entropy.generate_state(1)[0]) & 0x7FFFFFFF)
        own = np.stack(list(images), out=empty_images((len(images), *images[0].shape)))
        # In place: `augmenter(images=…)` copies them first, an eighth of its time for a batch of 224 px.
        return augmenter.augment_batch_(_BatchInAugmentation(images=own)).images


def build_imgaug(steps: Sequence[Operation], *, as_it_is: bool = False) -> Any:
    """Returns imgaug's augmenter for operations; `as_it_is`: without what is faster here."""
    built = [_build(step, as_it_is) for step in steps]
    return built[0] if len(built) == 1 else _iaa().Sequential(built)


def _build(operation: Operation, as_it_is: bool) -> Any:
    # `seed_()` reaches only children in a *list*: given bare, they keep an unseeded state of their own.
    children = {key: [_build(child, as_it_is) for child in below] for key, below in operation.children.items()}
    kind = getattr(_iaa(), operation.name)
    if issubclass(kind, _iaa().Affine) and not as_it_is:
        kind = type(operation.name, (_WarpsBatches, kind), {})
    return kind(**operation.arguments, **children)


class _WarpsBatches:
    """Before one of imgaug's affine augmenters: makes the matrices of a batch at once, of what imgaug draws.

    imgaug makes each by ten objects of scikit-image, which takes longer than it takes OpenCV to warp the image.
    """

    def _augment_images_by_samples(self: Any, images: Any, samples: Any, *others: Any, **more: Any) -> Any:
        is_batch = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[3] == 3
        if not is_batch or others or more or self.fit_output:
            parent: Any = super()
            return parent._augment_images_by_samples(images, samples, *others, **more)
        height, width = images.shape[1:3]
        shift, (x_shear, y_shear) = np.asarray(samples.translate, float), np.deg2rad(samples.shear)
        if samples.translate_mode == "percent":
            shift *= [[width], [height]]
        about_centre = affine_matrices(
            np.asarray(samples.scale), shift, np.deg2rad(samples.rotate), np.stack([x_shear, y_shear])
        )
        changed = empty_images(images.shape)
        drawn = zip(samples.order, samples.mode, samples.cval.astype(int).tolist(), strict=True)
        matrices = about_corner(about_centre, height, width)
        for image, matrix, target, (order, mode, cval) in zip(images, matrices, changed, drawn, strict=True):
            cv2.warpAffine(
                image,
                matrix,
                (width, height),
                dst=target,
                flags=INTERPOLATIONS[order],
                borderMode=BORDERS[mode],
                borderValue=cval,
            )
        return changed


def _iaa() -> Any:
    """Imports imgaug late: it takes seconds."""
    import imgaug.augmenters

    if imgaug.augmenters.meta.np is np:
        imgaug.augmenters.meta.np = _NumpyWithBool(np.__name__)
    return imgaug.augmenters


class _NumpyWithBool(types.ModuleType):
    """NumPy as imgaug's `meta` expects it."""

    bool = bool

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)
