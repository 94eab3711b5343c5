"""Augmentation changes what it is told to change, and does so reproducibly."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import pytest

from cv_platform.config import AugmentConfig
from cv_platform.config.augmentation import AUGMENTERS, parse_operations
from cv_platform.datasets.packing import PackedSplit
from cv_platform.training.augmentation import Augmenter, augmented_sheet, build_imgaug, declared
from cv_platform.training.fused import FUSED

EVERYTHING = AugmentConfig(
    sometimes=0.8,
    flip_horizontal=0.5,
    flip_vertical=0.5,
    rotate_degrees=20,
    shear_degrees=10,
    scale_fraction=0.2,
    translate_fraction=0.1,
    brightness_fraction=0.2,
    contrast_fraction=0.2,
    noise_std=10,
    blur_sigma_px=1,
)


NESTED = {
    "Sequential": {
        "random_order": True,
        "children": [
            {"Sometimes": {"p": 0.5, "then_list": [{"Rotate": [-30, 30]}], "else_list": ["Grayscale"]}},
            {"OneOf": [{"GaussianBlur": [0, 2]}, {"AdditiveGaussianNoise": {"scale": [0, 20]}}, "Cutout"]},
            {"SomeOf": {"n": [1, 2], "children": ["Fliplr", {"Posterize": 3}, {"Multiply": {"choice": [0.5, 1.5]}}]}},
        ],
    }
}


def first_batch(config: AugmentConfig, images: np.ndarray) -> np.ndarray:
    return Augmenter(config, seed=1)(images, epoch=0, batch_index=0)


def pictures(count: int = 12) -> np.ndarray:
    """Returns `(count, 16, 16, 3)` uint8 without any symmetry."""
    return np.random.default_rng(5).integers(40, 200, (count, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip_horizontal", 1.0),
        ("flip_vertical", 1.0),
        ("rotate_degrees", 30.0),
        ("shear_degrees", 20.0),
        ("scale_fraction", 0.4),
        ("translate_fraction", 0.3),
        ("brightness_fraction", 0.5),
        ("contrast_fraction", 0.5),
        ("noise_std", 30.0),
        ("blur_sigma_px", 2.0),
    ],
)
@pytest.mark.parametrize("engine", ["imgaug", "fused"])
def test_each_operation_changes_pixels_and_keeps_shape_and_dtype(field: str, value: float, engine: str) -> None:
    images = pictures()
    config = AugmentConfig.model_validate({"sometimes": 1.0, field: value, "engine": engine})
    changed = first_batch(config, images)

    assert changed.dtype == np.uint8
    assert changed.shape == images.shape
    moved = (changed != images).any(axis=(1, 2, 3))
    assert moved.mean() >= 0.75  # A drawn rotation or blur may be next to nothing for a few.
    np.testing.assert_array_equal(images, pictures())  # The input is left alone.


@pytest.mark.parametrize("engine", ["imgaug", "fused"])
def test_horizontal_flip_mirrors_columns_and_vertical_flip_mirrors_rows(engine: Any) -> None:
    images = pictures()

    across = Augmenter(AugmentConfig(sometimes=1.0, flip_horizontal=1.0, engine=engine), seed=1)(
        images, epoch=0, batch_index=0
    )
    upside_down = Augmenter(AugmentConfig(sometimes=1.0, flip_vertical=1.0, engine=engine), seed=1)(
        images, epoch=0, batch_index=0
    )

    np.testing.assert_array_equal(across, images[:, :, ::-1])
    np.testing.assert_array_equal(upside_down, images[:, ::-1])


@pytest.mark.parametrize("engine", ["imgaug", "fused"])
def test_a_flip_of_one_half_flips_about_half_of_the_images(engine: Any) -> None:
    images = pictures(400)

    changed = Augmenter(AugmentConfig(sometimes=1.0, flip_horizontal=0.5, engine=engine), seed=1)(
        images, epoch=0, batch_index=0
    )

    flipped = (changed == images[:, :, ::-1]).all(axis=(1, 2, 3))
    untouched = (changed == images).all(axis=(1, 2, 3))
    assert (flipped | untouched).all()
    assert 150 <= flipped.sum() <= 250  # Binomial(400, 1/2): five standard deviations are 50.


@pytest.mark.parametrize("engine", ["imgaug", "fused"])
def test_sometimes_is_the_share_of_images_that_are_touched(engine: Any) -> None:
    images = pictures(400)

    changed = Augmenter(AugmentConfig(sometimes=0.25, flip_horizontal=1.0, engine=engine), seed=1)(
        images, epoch=0, batch_index=0
    )

    touched = (changed != images).any(axis=(1, 2, 3)).sum()
    assert 57 <= touched <= 143  # Binomial(400, 1/4): 100 ± five standard deviations.


@pytest.mark.parametrize("engine", ["imgaug", "fused"])
def test_brightness_stays_within_its_bounds(engine: Any) -> None:
    grey = np.full((50, 8, 8, 3), 100, dtype=np.uint8)

    changed = Augmenter(AugmentConfig(sometimes=1.0, brightness_fraction=0.2, engine=engine), seed=1)(
        grey, epoch=0, batch_index=0
    )

    assert 79 <= changed.min() < 95
    assert 105 < changed.max() <= 121


@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(sometimes=0.0, flip_horizontal=1.0)])
def test_nothing_switched_on_changes_nothing(config: AugmentConfig) -> None:
    augmenter = Augmenter(config, seed=1)

    np.testing.assert_array_equal(augmenter(pictures(), epoch=3, batch_index=2), pictures())


@pytest.mark.parametrize("engine", ["imgaug", "fused"])
def test_batches_are_the_same_in_any_order_and_from_any_instance(engine: str) -> None:
    images = pictures()
    config = EVERYTHING.model_copy(update={"engine": engine, "operations": (NESTED,), "auto": "medium"})
    first, second = Augmenter(config, seed=9), Augmenter(config, seed=9)
    places = [(epoch, batch) for epoch in range(2) for batch in range(3)]

    forwards = {place: first(images, epoch=place[0], batch_index=place[1]) for place in places}
    backwards = {place: second(images, epoch=place[0], batch_index=place[1]) for place in reversed(places)}

    for place in places:
        np.testing.assert_array_equal(forwards[place], backwards[place])


def test_seed_epoch_and_batch_each_give_other_changes() -> None:
    images = pictures()
    base = Augmenter(EVERYTHING, seed=9)(images, epoch=1, batch_index=2)

    for seed, epoch, batch_index in [(8, 1, 2), (9, 2, 2), (9, 1, 1), (9, 2, 1)]:
        other = Augmenter(EVERYTHING, seed=seed)(images, epoch=epoch, batch_index=batch_index)
        assert (other != base).any()


SCRIPT = """
import hashlib
from cv_platform_tests.unit.training.test_augmentation import EVERYTHING, Augmenter, pictures
import numpy as np
np.random.seed()  # Somebody else's random state must not matter.
augmenter = Augmenter(EVERYTHING, seed=4)
print(hashlib.sha256(b"".join(augmenter(pictures(), epoch=e, batch_index=7).tobytes() for e in (1, 0))).hexdigest())
print("bool" in vars(np))
"""


def test_another_process_makes_the_same_batches_without_warnings_and_leaves_numpy_as_it_is() -> None:
    augmenter = Augmenter(EVERYTHING, seed=4)
    here = hashlib.sha256(b"".join(augmenter(pictures(), epoch=e, batch_index=7).tobytes() for e in (1, 0))).hexdigest()

    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [here, "False"]


def test_the_single_fields_mean_what_they_always_meant() -> None:
    """What imgaug was told before a config could name operations, written out; the same draws, pixel by pixel."""
    import imgaug.augmenters as iaa

    affine = iaa.Affine(
        rotate=(-20, 20),
        shear=(-10, 10),
        scale=(0.8, 1.2),
        translate_percent={"x": (-0.1, 0.1), "y": (-0.1, 0.1)},
        order=1,
        mode="constant",
        cval=0,
    )
    colours = [iaa.Multiply((0.8, 1.2)), iaa.LinearContrast((0.8, 1.2))]
    noise = [iaa.AdditiveGaussianNoise(scale=(0, 10), per_channel=True), iaa.GaussianBlur(sigma=(0, 1))]
    flips: list[Any] = [getattr(iaa, name)(0.5) for name in ("Fliplr", "Flipud")]  # Typed as whole numbers there.
    before = iaa.Sometimes(0.8, [iaa.Sequential([*flips, affine, *colours, *noise])])
    before.seed_(int(np.random.SeedSequence((4, 1, 7)).generate_state(1)[0]) & 0x7FFFFFFF)

    changed = Augmenter(EVERYTHING, seed=4)(pictures(), epoch=1, batch_index=7)

    # Matrices that are made otherwise differ by rounding, and so may a level.
    difference = np.abs(changed.astype(int) - np.asarray(before(images=pictures())))
    assert (difference > 0).mean() < 0.01
    assert difference.max() <= 10


AFFINE: list[Any] = [
    {"Affine": {"rotate": [-90, 90], "shear": {"x": [-20, 20], "y": [-30, 30]}, "translate_px": {"y": [-20, 20]}}},
    {"Affine": {"scale": {"x": [0.5, 1.5]}, "translate_percent": [-0.2, 0.2], "mode": "symmetric", "order": 3}},
    {"Affine": {"rotate": 30, "order": 0, "cval": 77}},
    {"ShearY": [-30, 30]},
    {"TranslateX": {"percent": [-0.2, 0.2]}},
]


@pytest.mark.parametrize("operation", AFFINE, ids=str)
def test_batches_are_warped_as_imgaug_warps_each_image(operation: Any) -> None:
    steps, results = parse_operations([operation]), []
    for as_it_is in (True, False):
        augmenter = build_imgaug(steps, as_it_is=as_it_is)
        augmenter.seed_(3)
        results.append(np.asarray(augmenter(images=smooth_pictures())).astype(int))
    assert (results[0] != smooth_pictures()).any()
    assert (results[0] != results[1]).mean() < 0.01


def smooth_pictures() -> np.ndarray:
    """Returns `(6, 40, 48, 3)` uint8 without edges, in which interpolations agree."""
    rng = np.random.default_rng(0)
    return np.stack(
        [cv2.resize(rng.integers(0, 256, (6, 7, 3), np.uint8), (48, 40), interpolation=2) for _ in range(6)]
    )


# A number for a range, so that both engines draw the same.
FIXED: list[Any] = [
    "Identity",
    "Fliplr",
    {"Flipud": 1.0},
    {"Affine": {"rotate": 20}},
    {"Affine": {"scale": {"x": 1.3, "y": 0.8}, "mode": "wrap"}},
    {"Affine": {"shear": {"x": 10, "y": 20}, "mode": "reflect"}},
    {"Affine": {"translate_percent": {"x": 0.2, "y": -0.1}, "cval": 77}},
    {"Affine": {"translate_px": {"x": 3}, "order": 0}},
    {
        "Affine": {
            "rotate": -15,
            "scale": 0.7,
            "shear": 12,
            "translate_percent": {"x": 0.1, "y": 0.2},
            "mode": "edge",
            "order": 3,
        }
    },
    {"Rotate": {"rotate": 45, "mode": "symmetric"}},
    {"ShearX": 20},
    {"ShearY": 20},
    {"ScaleX": 1.5},
    {"ScaleY": 0.5},
    {"TranslateX": {"px": 5}},
    {"TranslateY": {"percent": 0.2}},
    {"Crop": {"percent": 0.1}},
    {"Pad": {"percent": 0.1, "pad_cval": 50}},
    {"CropAndPad": {"px": 3, "pad_mode": "edge"}},
    {"Multiply": 1.3},
    {"Add": -40.5},
    {"LinearContrast": 1.5},
    {"GammaContrast": 1.4},
    "Invert",
    {"Solarize": {"p": 1.0, "threshold": 100}},
    {"Posterize": 3},
    {"Grayscale": 0.6},
    *({"AddToBrightness": {"add": 25, "to_colorspace": name}} for name in ("YCrCb", "HSV", "HLS", "Lab", "Luv", "YUV")),
    {"MultiplyBrightness": {"mul": 1.2, "to_colorspace": "HSV"}},
    {"AddToHue": -200},
    {"AddToSaturation": 40},
    {"MultiplySaturation": 0.5},
    {"AdditiveGaussianNoise": {"scale": 0, "loc": 20}},
    {"Cutout": {"size": 0}},
    {"GaussianBlur": 4},
    {"OneOf": ["Fliplr"]},
    {"SomeOf": {"n": 2, "children": ["Fliplr", "Flipud"]}},
    {"Sometimes": {"p": 1.0, "then_list": ["Fliplr"], "else_list": ["Invert"]}},
    {"Sequential": ["Fliplr", "Invert"]},
]


def by_engines(operation: Any) -> tuple[np.ndarray, np.ndarray]:
    configs = [AugmentConfig(operations=(operation,), engine=engine) for engine in ("imgaug", "fused")]
    ours, theirs = (first_batch(config, smooth_pictures()) for config in configs)
    return ours.astype(int), theirs.astype(int)


@pytest.mark.parametrize("operation", FIXED, ids=str)
def test_both_engines_do_the_same_with_the_same_numbers(operation: Any) -> None:
    imgaug, fused = by_engines(operation)

    # Crops are cubic in imgaug and linear here, which differs by a few grey levels at most in pictures without edges.
    assert np.abs(imgaug - fused).max() <= 10
    assert np.abs(imgaug - fused).mean() <= 1.5


def test_every_fused_operation_is_compared() -> None:
    assert set(FUSED) == {name for name, kind in AUGMENTERS.items() if kind.is_fused}
    assert {next(iter(one)) if isinstance(one, dict) else one for one in FIXED} == set(FUSED)


@pytest.mark.parametrize("name", [name for name, kind in AUGMENTERS.items() if not kind.is_fused])
def test_every_other_operation_runs_with_imgaugs_defaults(name: str) -> None:
    images = smooth_pictures()

    changed = Augmenter(AugmentConfig(operations=(name,)), seed=3)(images, epoch=0, batch_index=0)

    assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
    assert (changed != images).any()


def test_parameters_are_imgaugs_own() -> None:
    import imgaug.augmenters as iaa

    for name, kind in AUGMENTERS.items():
        known = list(inspect.signature(getattr(iaa, name).__init__).parameters)[1:]
        assert not set(kind.parameters) - set(known), name


def test_adjacent_geometry_and_values_keep_their_order() -> None:
    """A grey border that is inverted afterwards is light; one that comes after is not."""
    shift = {"TranslateX": {"percent": 0.5, "cval": 10}}
    black = np.zeros((3, 8, 8, 3), np.uint8)
    for operations, border, inside in [((shift, "Invert"), 245, 255), (("Invert", shift), 10, 255)]:
        config = AugmentConfig(operations=operations, engine="fused")
        changed = first_batch(config, black)
        assert (changed[:, :, 0] == border).all()
        assert (changed[:, :, 7] == inside).all()


@pytest.mark.parametrize("engine", ["imgaug", "fused"])
def test_draws_have_the_shares_that_they_were_given(engine: Any) -> None:
    tree = {"OneOf": ["Identity", {"SomeOf": {"n": 1, "children": [{"Add": 5}, {"Add": 9}]}}]}
    config = AugmentConfig(operations=(tree,), engine=engine)
    grey = np.full((800, 2, 2, 3), 100, np.uint8)

    added = Augmenter(config, seed=2)(grey, epoch=0, batch_index=0)[:, 0, 0, 0].astype(int) - 100

    for value, expected in [(0, 400), (5, 200), (9, 200)]:
        assert abs((added == value).sum() - expected) <= 71  # Five standard deviations of Binomial(800, 1/2).


@pytest.mark.parametrize("strength", ["light", "medium", "strong"])
def test_a_stronger_auto_changes_more(strength: Any) -> None:
    weaker = {"light": "none", "medium": "light", "strong": "medium"}[strength]
    images = np.tile(smooth_pictures(), (20, 1, 1, 1))

    def change(auto: Any) -> float:
        changed = first_batch(AugmentConfig(auto=auto, engine="fused"), images)
        return float(np.abs(changed.astype(int) - images).mean())

    assert change(strength) > 1.15 * change(weaker)


def test_the_originals_set_is_its_own() -> None:
    (outer,) = declared(AugmentConfig(operations=("original",)))

    assert (outer.name, outer.arguments) == ("Sometimes", {"p": 0.8})
    (sequence,) = outer.children["then_list"]
    assert sequence.arguments == {"random_order": True}
    assert [child.name for child in sequence.children["children"]] == ["Sometimes", "OneOf", "OneOf"]


def test_larger_images_are_cropped_to_parts_between_the_models_input_and_the_whole() -> None:
    rows, columns = np.meshgrid(np.arange(60), np.arange(90), indexing="ij")
    image = np.stack([rows * 4, columns * 2, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    larger = np.broadcast_to(image, (200, *image.shape))
    augmenter = Augmenter(AugmentConfig(), seed=2, image_size=(40, 60))

    parts = augmenter(larger, epoch=3, batch_index=1).astype(float)

    assert parts.shape == (200, 40, 60, 3)
    np.testing.assert_array_equal(parts, augmenter(larger, epoch=3, batch_index=1))
    # Of the red ramp's 60 rows and the green one's 90 columns, first and last that are seen, within a pixel or two.
    tops, bottoms = parts[:, 0, 0, 0] / 4, parts[:, -1, 0, 0] / 4
    lefts, rights = parts[:, 0, 0, 1] / 2, parts[:, 0, -1, 1] / 2
    heights, widths = bottoms - tops + 1, rights - lefts + 1
    assert 38 <= heights.min() < 43
    assert 57 < heights.max() <= 60
    np.testing.assert_allclose(widths / heights, 1.5, atol=0.06)
    assert tops.min() < 1
    assert tops.max() > 15
    assert lefts.max() > 22
    whole = Augmenter(AugmentConfig(), seed=2, image_size=(60, 90))(larger, epoch=3, batch_index=1)
    np.testing.assert_array_equal(whole, larger)


def test_the_sheet_has_a_row_for_each_class_that_has_images() -> None:
    config = AugmentConfig(sometimes=1.0, flip_horizontal=1.0)
    targets = np.array([0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0])

    split = PackedSplit(pictures(), targets, [], [])
    png = augmented_sheet(split, ["a", "b", "c"], Augmenter(config, seed=1), draws=2)

    sheet = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    assert sheet.shape[:2] == (2 * 100 + 4, 14 * 8 + 8 + 3 * 100)
    first, mirrored = sheet[4:100, 120:216], sheet[4:100, 220:316]
    np.testing.assert_array_equal(first[::6, ::6], pictures()[0])
    np.testing.assert_array_equal(mirrored, first[:, ::-1])


@pytest.mark.parametrize(
    ("operations", "mistakes"),
    [
        (["Fliplrr"], ["operations[0]: expected an augmenter, as Fliplr, Flipud", "received Fliplrr"]),
        ([{"Lambda": "os.system('x')"}], ["operations[0]: expected an augmenter", "received Lambda"]),
        (
            [{"Affine": {"rotat": 3}}, {"Sometimes": {"p": 2, "then_list": [{"OneOf": [{"Multiply": "much"}]}]}}],
            [
                "operations[0].Affine: expected parameters scale, ",
                "operations[0].Affine: expected one of scale",
                "operations[1].Sometimes.p: expected a probability from 0 to 1",
                "operations[1].Sometimes.then_list[0].OneOf[0].Multiply: expected a number from 0 to 20",
            ],
        ),
        ([{"Multiply": [1.2, 0.8]}], ["a range [a, b]", "received [1.2, 0.8]"]),
        ([{"Multiply": [0.8, 1, 1.2]}], ["{choice: [a, b, …]}"]),
        ([{"Multiply": float("nan")}], ["received nan"]),
        ([{"Affine": {"translate_px": {"x": 1.5}}}], ["translate_px.x: expected a whole number"]),
        ([{"Crop": {"px": 1, "percent": 0.1}}], ["expected px or percent; received both"]),
        ([{"Fliplr": 0.5, "Flipud": 0.5}], ["operations[0]: expected an augmenter"]),
        ([{"Identity": 3}], ["expected no parameters; received 3"]),
        ([{"Sometimes": {"p": 0.5, "then_list": []}}], ["then_list: expected a list with an operation or more"]),
        (["Fliplr"] * 300, ["at most 200"]),
    ],
)
def test_what_a_config_may_not_say_is_refused_with_its_place(operations: list[Any], mistakes: list[str]) -> None:
    with pytest.raises(ValueError, match="expected operations that imgaug has") as caught:
        AugmentConfig(operations=tuple(operations))

    for mistake in mistakes:
        assert mistake in str(caught.value)


def test_nesting_without_end_is_refused() -> None:
    tree: Any = "Fliplr"
    for _ in range(400):
        tree = {"Sequential": [tree]}

    with pytest.raises(ValueError, match="at most 12 levels"):
        AugmentConfig(operations=(tree,))


def test_the_fused_engine_says_what_it_has_not() -> None:
    with pytest.raises(ValueError, match=r"received MedianBlur, Rot90\. Take engine: imgaug"):
        AugmentConfig(operations=("Rot90", {"Sometimes": {"p": 0.5, "then_list": ["MedianBlur"]}}), engine="fused")
