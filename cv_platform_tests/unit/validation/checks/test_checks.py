from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats.contingency import association

from cv_platform.config import ValidateConfig
from cv_platform.properties import PROPERTY_NAMES
from cv_platform.validation.checks.copies import Duplicates, TrainTestLeakage
from cv_platform.validation.checks.images import (
    BitDepth,
    ClippedSamples,
    ConstantImages,
    DamagedImages,
    NarrowRange,
    UnreadableImages,
)
from cv_platform.validation.checks.labels import ClassCoverage, ClassImbalance, ConflictingLabels, DividedGroups
from cv_platform.validation.checks.shift import LabelDrift, PropertyDrift, cramers_v
from cv_platform.validation.verdict import MAX_OFFENDERS
from cv_platform_tests.unit.validation.conftest import subject

CONFIG = ValidateConfig()
SPLITS = ("train", "valid", "test", "reference")


def test_finds_the_test_image_that_is_in_train_and_names_both(make_manifest):
    manifest = make_manifest(
        ("train/a.png", "train", ["cat"], "one"),
        ("train/b.png", "train", ["cat"], "two"),
        ("test/c.png", "test", ["cat"], "one"),
        ("test/d.png", "test", ["cat"], "three"),
        ("valid/e.png", "valid", ["cat"], "three"),
    )
    found = TrainTestLeakage().run(subject(manifest))
    assert not found.passed
    assert found.value == 0.5
    assert found.offenders == ("test/c.png = train/a.png",)


def test_leakage_up_to_the_limit_passes(make_manifest):
    rows = [("train/a.png", "train", ["cat"], "one"), ("test/c.png", "test", ["cat"], "one")]
    rows += [(f"test/{i}.png", "test", ["cat"], str(i)) for i in range(9)]
    assert TrainTestLeakage().run(subject(make_manifest(*rows), ValidateConfig(max_leakage_fraction=0.1))).passed
    refused = TrainTestLeakage().run(subject(make_manifest(*rows), ValidateConfig(max_leakage_fraction=0.09)))
    assert not refused.passed
    # What is said beside the number mends it.
    assert "dataset.quarantine.duplicate: quarantine" in refused.finding()


def test_leakage_without_test_images_is_not_judged(make_manifest):
    found = TrainTestLeakage().run(subject(make_manifest(("a.png", "train", ["cat"], "one"))))
    assert found.passed
    assert found.value is None
    assert found.summary.startswith("Not judged")


def test_identical_images_with_other_labels_conflict(make_manifest):
    manifest = make_manifest(
        ("a.png", "train", ["cat"], "one"),
        ("b.png", "valid", ["dog"], "one"),
        ("c.png", "train", ["cat"], "two"),
        ("d.png", "train", ["cat"], "two"),
    )
    found = ConflictingLabels().run(subject(manifest))
    assert not found.passed
    assert found.value == 0.5
    assert found.offenders == ("a.png (cat), b.png (dog)",)


def test_the_order_of_several_labels_is_no_conflict(make_manifest):
    manifest = make_manifest(("a.png", "train", ["cat", "dog"], "one"), ("b.png", "train", ["dog", "cat"], "one"))
    assert ConflictingLabels().run(subject(manifest)).passed


def test_counts_each_repetition_of_an_image_once(make_manifest):
    manifest = make_manifest(
        ("a.png", "train", ["cat"], "one"),
        ("b.png", "train", ["cat"], "one"),
        ("c.png", "valid", ["cat"], "one"),
        ("d.png", "test", ["cat"], "two"),
    )
    found = Duplicates().run(subject(manifest))
    assert not found.passed
    assert found.severity == "warn"
    assert found.value == 0.5
    assert found.offenders == ("b.png = a.png", "c.png = a.png")


def test_names_the_class_and_split_without_images(make_manifest):
    rows = [(f"{split}/{name}.png", split, [name], f"{split}{name}") for split in SPLITS for name in ("cat", "dog")]
    complete = ClassCoverage().run(subject(make_manifest(*rows), class_names=("cat", "dog")))
    assert complete.passed
    assert complete.value == 1.0
    short = ClassCoverage().run(subject(make_manifest(*rows[:-1]), class_names=("cat", "dog")))
    assert not short.passed
    assert short.offenders == ("reference/dog: 0 images",)


def test_names_the_split_without_images(make_manifest):
    rows = [(f"{split}.png", split, ["cat"], split) for split in ("train", "valid", "reference")]
    found = ClassCoverage().run(subject(make_manifest(*rows), class_names=("cat",)))
    assert found.offenders == ("test: no images",)


def test_names_unknown_classes_and_images_with_two_labels(make_manifest):
    rows = [(f"{split}.png", split, ["cat"], split) for split in SPLITS]
    rows += [("x.png", "train", ["cow"], "x"), ("y.png", "train", ["cat", "cow"], "y"), ("z.png", "train", [], "z")]
    found = ClassCoverage().run(subject(make_manifest(*rows), class_names=("cat",)))
    assert not found.passed
    assert found.offenders == (
        "unknown class 'cow': 2 images",
        "y.png: 2 labels, expected 1",
        "z.png: 0 labels, expected 1",
    )


def test_several_or_no_labels_are_right_in_multi_label_data(make_manifest):
    rows = [(f"{split}.png", split, ["cat", "dog"], split) for split in SPLITS] + [("z.png", "train", [], "z")]
    assert (
        ClassCoverage()
        .run(subject(make_manifest(*rows), class_names=("cat", "dog"), classifier_type="multi-label"))
        .passed
    )


def unread(count: int) -> pd.DataFrame:
    """Rows of images that do not decode, as validation sees them."""
    names = [f"{at}.png" for at in range(count)]
    problem = {"is_readable": False, "problem": "truncated", "status": "quarantined", "reason": "unreadable: truncated"}
    return pd.DataFrame({"path": names, **problem})


@pytest.mark.parametrize(("bad", "passed"), [(0, True), (1, True), (2, False)])
def test_unreadable_images_fail_above_the_limit(make_manifest, bad, passed):
    readable = make_manifest(*[(f"r{i}.png", "train", ["cat"], str(i)) for i in range(100 - bad)])
    found = UnreadableImages().run(subject(readable, quarantined=unread(bad)))
    assert found.passed is passed
    assert found.value == bad / 100
    assert len(found.offenders) == bad


def test_offenders_are_cut_and_the_summary_has_the_full_count(make_manifest):
    found = UnreadableImages().run(subject(make_manifest(), quarantined=unread(500)))
    assert len(found.offenders) == MAX_OFFENDERS
    assert found.summary.startswith("500 of 500 ")


def test_cramers_v_agrees_with_scipy_for_large_groups_of_equal_size():
    first, second = np.array([400_000, 300_000, 300_000]), np.array([200_000, 300_000, 500_000])
    expected = association(np.stack([first, second]), method="cramer")
    assert cramers_v(first, second) == pytest.approx(expected, abs=1e-5)


def test_cramers_v_does_not_depend_on_the_size_of_the_test_split():
    first = np.array([4_000_000, 3_000_000, 3_000_000])
    drifts = [cramers_v(first, np.array([2, 3, 5]) * size) for size in (1_000_000, 100_000)]
    assert drifts[0] == pytest.approx(drifts[1], abs=1e-4)


def test_cramers_v_of_disjoint_labels_is_nearly_one_and_of_equal_shares_zero():
    # phi² = ½(1 + 1) = 1; by chance (2 − 1)(1/500 + 1/500)/4 = 0.001.
    assert cramers_v(np.array([500, 0]), np.array([0, 500])) == pytest.approx(np.sqrt(0.999))
    assert cramers_v(np.array([50, 50]), np.array([7, 7])) == 0.0
    assert cramers_v(np.array([0, 0]), np.array([7, 7])) == 0.0


def test_small_splits_of_one_population_do_not_drift():
    generator = np.random.default_rng(0)
    shares = np.full(10, 0.1)
    drifts = [cramers_v(generator.multinomial(500, shares), generator.multinomial(100, shares)) for _ in range(2000)]
    # Uncorrected, V is sqrt(9 × (1/500 + 1/100)/4) = .16 on average, and above the limit of .2 in a sixth of the draws.
    assert np.mean(drifts) < 0.06
    assert np.mean(np.array(drifts) > CONFIG.max_label_drift) < 0.02


def test_label_drift_names_the_class_that_moved_most(make_manifest):
    rows = [(f"a{i}", "train", ["cat" if i < 80 else "dog"], f"a{i}") for i in range(100)]
    rows += [(f"b{i}", "test", ["cat" if i < 20 else "dog"], f"b{i}") for i in range(100)]
    found = LabelDrift().run(subject(make_manifest(*rows), class_names=("cat", "dog")))
    # p = (.8, .2), q = (.2, .8): phi² = ½(.36/1 + .36/1) = .36; by chance 1 × (1/100 + 1/100)/4 = .005.
    assert found.value == pytest.approx(np.sqrt(0.355))
    assert not found.passed
    assert found.offenders[0] == "cat: 80.0% of train, 20.0% of test"


def test_label_drift_of_multi_label_data_looks_at_each_class(make_manifest):
    rows = [(f"a{i}", "train", ["sky"] if i % 2 else ["sky", "tree"], f"a{i}") for i in range(200)]
    rows += [(f"b{i}", "test", ["sky"], f"b{i}") for i in range(200)]
    found = LabelDrift().run(subject(make_manifest(*rows), class_names=("sky", "tree"), classifier_type="multi-label"))
    assert not found.passed
    assert found.offenders == ("tree: 50.0% of train, 0.0% of test",)


def _with_properties(train: np.ndarray, test: np.ndarray) -> pd.DataFrame:
    manifest = pd.DataFrame(np.concatenate([train, test]).astype(np.float32), columns=pd.Index(PROPERTY_NAMES))
    return manifest.assign(split=["train"] * len(train) + ["test"] * len(test))


def test_property_drift_names_the_property_that_moved():
    generator = np.random.default_rng(2)
    train, test = generator.normal(size=(300, 7)), generator.normal(size=(300, 7))
    assert PropertyDrift().run(subject(_with_properties(train, test))).passed
    test[:, 1] += 2.0
    found = PropertyDrift().run(subject(_with_properties(train, test)))
    assert not found.passed
    assert len(found.offenders) == 1
    assert found.offenders[0].startswith(PROPERTY_NAMES[1])


def test_property_drift_without_test_images_is_not_judged():
    found = PropertyDrift().run(subject(_with_properties(np.zeros((5, 7)), np.zeros((0, 7)))))
    assert found.passed
    assert found.summary == "Not judged: test has no images (see class_coverage)."


@pytest.mark.parametrize(
    ("check", "column", "limit"),
    [
        (DamagedImages, "damage", "max_damaged_fraction"),
        (ConstantImages, "constant", "max_constant_fraction"),
        (NarrowRange, "narrow_range", "max_narrow_range_fraction"),
        (ClippedSamples, "clipped", "max_clipped_fraction"),
    ],
)
def test_images_with_a_remark_in_the_manifest_are_named(make_manifest, check, column: str, limit: str):
    manifest = make_manifest(*[(f"{i}.png", "train", ["cat"], str(i)) for i in range(4)])
    assert check().run(subject(manifest)).passed
    manifest[column] = [None, "what it is", None, None]
    found = check().run(subject(manifest))
    assert (found.severity, found.passed, found.value) == ("warn", False, 0.25)
    assert found.offenders == ("1.png: what it is",)
    assert found.summary.startswith("1 of 4 images ")
    assert check().run(subject(manifest, CONFIG.model_copy(update={limit: 0.25}))).passed
    assert check().run(subject(manifest.iloc[:0])).passed


@pytest.mark.parametrize(("most", "passed"), [(30, True), (31, False)])
def test_a_class_at_less_than_one_to_thirty_is_named(make_manifest, most, passed):
    rows = [(f"{at}.png", "train", ["cat"], str(at)) for at in range(most)] + [("d.png", "train", ["dog"], "d")]
    rows += [(f"t{at}.png", "test", ["dog"], f"t{at}") for at in range(40)]
    found = ClassImbalance().run(subject(make_manifest(*rows), class_names=("cat", "dog")))
    assert (found.passed, found.value) == (passed, most)
    assert found.offenders == (() if passed else ("dog: 1 images",))


def test_groups_that_given_splits_divide_are_named(make_manifest):
    manifest = make_manifest(*[(f"{at}.png", split, ["cat"], str(at)) for at, split in enumerate(SPLITS * 2)])
    assert DividedGroups().run(subject(manifest)).summary.startswith("Not judged: the dataset has no groups")
    manifest["group"] = ["a", "b", "c", "d", "a", "b", None, "c"]
    found = DividedGroups().run(subject(manifest))
    assert not found.passed
    assert found.value == pytest.approx(2 / 7)
    assert found.offenders == ("c: 1 in reference, 1 in test",)


@pytest.mark.parametrize(
    ("largest", "advice"),
    [
        ([4080, 900], "No sample exceeds 4095: set model.sample_bits: 12, or what the camera records if that is more"),
        ([16383, 900], "No sample exceeds 16383: set model.sample_bits: 14,"),
        ([256, 300], "No sample exceeds 511: set model.sample_bits: 9,"),
        ([255, 200], "No sample exceeds 255: save all images with 8 bits"),
        ([65000, 900], "Other images use more of it: scale the samples to 0–65535"),
    ],
)
def test_narrow_samples_come_with_the_bits_that_they_use(make_manifest, largest: list[int], advice: str):
    manifest = make_manifest(*[(f"{i}.png", "train", ["cat"], str(i)) for i in range(3)])
    manifest["largest_sample"], manifest["narrow_range"] = [None, *largest], [None, None, "samples"]
    found = NarrowRange().run(subject(manifest))
    assert (found.passed, found.value) == (False, pytest.approx(1 / 3))
    assert advice in found.summary


def test_declared_bits_are_enough_said_unless_they_are_far_too_many(make_manifest):
    manifest = make_manifest(*[(f"{i}.png", "train", ["cat"], str(i)) for i in range(4)])
    manifest["largest_sample"] = [None, 4080, 900, 30]
    for bits in (12, 13):
        found = NarrowRange().run(subject(manifest, sample_bits=bits))
        assert (found.passed, found.value) == (True, 0)
    found = NarrowRange().run(subject(manifest, sample_bits=14))
    assert (found.passed, found.value) == (False, 0.75)
    assert "model.sample_bits is 14" in found.summary
    assert "No sample exceeds 4095: set model.sample_bits: 12" in found.summary
    manifest["clipped"] = [None, "what it is", None, None]
    found = ClippedSamples().run(subject(manifest, sample_bits=11))
    assert found.summary.endswith("The largest has 12 bits: correct model.sample_bits, unless these are marks.")


def test_images_of_another_bit_depth_than_most_are_named(make_manifest):
    manifest = make_manifest(*[(f"{at}.png", "train", ["cat"], str(at)) for at in range(4)])
    manifest["bit_depth"] = [8, 1, 16, 8]
    found = BitDepth().run(subject(manifest))
    assert (found.passed, found.offenders) == (False, ("2.png: 16 bits",))
    assert found.summary == "3 of 4 images have 8 bits a sample, 1 16."


def test_an_unknown_label_contradicts_nothing(make_manifest):
    manifest = make_manifest(
        ("a.png", "train", ["cat"], "one", ["dog"]),
        ("b.png", "valid", ["cat", "dog"], "one"),
        ("c.png", "train", [], "two", ["dog"]),
        ("d.png", "train", ["cat"], "two"),
    )
    found = ConflictingLabels().run(subject(manifest))
    assert found.offenders == ("c.png (no label), d.png (cat)",)


def test_a_class_of_which_a_split_says_nothing_is_named(make_manifest):
    rows = [
        (f"{split}/{name}.png", split, [name], f"{split}{name}", ["dog"] if name == "cat" and split == "test" else [])
        for split in SPLITS
        for name in ("cat", "dog")
    ]
    kinds = {"class_names": ("cat", "dog"), "classifier_type": "multi-label"}
    one_sided = ClassCoverage().run(subject(make_manifest(*rows), **kinds))
    assert not one_sided.passed
    assert one_sided.offenders == ("test/dog: no image is known not to show it, 1 of 2 leave it open",)
    assert one_sided.summary.endswith("1 classes of which a split's labels tell nothing.")
    rows[5] = ("test/dog.png", "test", [], "testdog", ["dog"])
    nothing = ClassCoverage().run(subject(make_manifest(*rows), **kinds))
    assert nothing.offenders == ("test/dog: no label is known, all 2 images leave it open", "test/dog: 0 images")


def test_a_class_that_the_model_does_not_have_may_stay_open(make_manifest):
    rows = [
        (f"{split}/{name}.png", split, [name], f"{split}{name}", ["emu"]) for split in SPLITS for name in ("cat", "dog")
    ]
    kinds = {"class_names": ("cat", "dog"), "classifier_type": "multi-label"}
    found = ClassCoverage().run(subject(make_manifest(*rows), **kinds))
    assert (found.passed, found.offenders) == (True, ())


def test_label_drift_compares_the_shares_of_known_labels(make_manifest):
    rows = [(f"train/{i}.png", "train", ["cat"] if i < 50 else [], f"a{i}") for i in range(100)]
    rows += [
        (f"test/{i}.png", "test", ["cat"] if i < 25 else [], f"b{i}", ["cat"] if i >= 50 else []) for i in range(100)
    ]
    kinds = {"class_names": ("cat", "dog"), "classifier_type": "multi-label"}
    assert LabelDrift().run(subject(make_manifest(*rows), **kinds)).value == pytest.approx(0.0)
    as_no = [row[:4] for row in rows]
    assert not LabelDrift().run(subject(make_manifest(*as_no), **kinds)).passed
