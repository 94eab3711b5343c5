from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest

from cv_platform.config import ClassifierType, EncoderConfig, ValidateConfig
from cv_platform.encoders.encoder import open_encoder
from cv_platform.records import CheckOutcome
from cv_platform.validation.checks.label_issues import (
    FOLDS,
    RESAMPLES,
    LabelIssues,
    _resampled,
    balanced_accuracy,
    even_folds,
    label_questions,
    probe_labels,
    wrong_label_chances,
)
from cv_platform.validation.sample import ImageSample, principal_components
from cv_platform_tests.unit.validation.conftest import subject

CONFIG = ValidateConfig()


def _sample(components: np.ndarray, labels: list[list[str]], hashes: list[str] | None = None) -> ImageSample:
    count = len(labels)
    rows = pd.DataFrame(
        {
            "path": [f"{i:03d}.png" for i in range(count)],
            "split": "train",
            "labels": labels,
            "unknown_labels": [[] for _ in labels],
            "sha256": hashes or [str(i) for i in range(count)],
        }
    )
    return ImageSample(
        rows=rows,
        images=np.zeros((count, 32, 32, 3), np.uint8),
        properties=np.zeros((count, 7), np.float32),
        components=components.astype(np.float32),
        problems={},
        readable=count,
    )


def _clusters(per_cluster: int, clusters: int = 3) -> np.ndarray:
    generator = np.random.default_rng(0)
    return np.concatenate([generator.normal(10 * np.eye(4)[k], 1.0, (per_cluster, 4)) for k in range(clusters)])


def _labels(per_cluster: int, names: str = "abc") -> list[list[str]]:
    return [[name] for name in names for _ in range(per_cluster)]


def judge(
    sample: ImageSample, names: Sequence[str], kind: ClassifierType, config: ValidateConfig = CONFIG
) -> CheckOutcome:
    with TemporaryDirectory() as folder:
        given = {"sample": sample, "class_names": names, "classifier_type": kind, "directory": Path(folder)}
        return LabelIssues().run(subject(config=config, **given))


def without_chance(offenders: Sequence[str]) -> set[str]:
    return {offender.rpartition(" (")[0] for offender in offenders}


def test_finds_a_planted_wrong_label_and_names_what_it_looks_like():
    labels = _labels(40)
    labels[5], labels[90] = ["b"], ["a"]
    found = judge(_sample(_clusters(40), labels), "abc", "multi-class")
    assert found.value == pytest.approx(2 / 120)
    assert found.passed
    assert without_chance(found.offenders) == {
        "005.png: labelled b, looks like a",
        "090.png: labelled a, looks like c",
    }


def test_counts_which_label_is_taken_for_which():
    labels = _labels(40)
    labels[5], labels[6], labels[90] = ["b"], ["b"], ["a"]
    probe = probe_labels(_sample(_clusters(40), labels), "abc", "multi-class")
    assert probe.confusion() == [("b", "a", 2), ("a", "c", 1)]
    assert [suspicion.labels for suspicion in probe.suspicions] in ([("a",), ("a",), ("c",)], [("c",), ("a",), ("a",)])


def test_fails_above_the_limit():
    labels = _labels(40)
    labels[5], labels[50], labels[90] = ["b"], ["c"], ["a"]
    sample = _sample(_clusters(40), labels)
    assert not judge(sample, "abc", "multi-class", ValidateConfig(max_label_issue_fraction=0.02)).passed
    assert judge(sample, "abc", "multi-class", ValidateConfig(max_label_issue_fraction=0.025)).passed


def test_suspects_nobody_in_clean_clusters():
    probe = probe_labels(_sample(_clusters(40), _labels(40)), "abc", "multi-class")
    assert probe.accuracy == 1.0
    assert probe.judged == 120
    assert probe.suspicions == ()


def test_copies_of_an_image_do_not_vouch_for_its_wrong_label():
    points, labels = _clusters(40), _labels(40)
    hashes = [str(i) for i in range(len(labels))]
    points[1:20] = points[0]
    for i in range(20):
        labels[i], hashes[i] = ["b"], "same"
    suspected = {s.position for s in probe_labels(_sample(points, labels, hashes), "abc", "multi-class").suspicions}
    assert suspected == set(range(20))


def test_does_not_judge_where_images_do_not_predict_the_labels():
    generator = np.random.default_rng(3)
    labels = [[str(name)] for name in generator.choice(list("abc"), 120)]
    found = judge(_sample(_clusters(40), labels), "abc", "multi-class")
    assert found.passed
    assert found.value is None
    assert found.summary.startswith("Not judged: what the images show predicts the labels too poorly")


@pytest.mark.parametrize("count", [0, 1, 5])
def test_does_not_judge_a_handful_of_images(count):
    found = judge(_sample(np.zeros((count, 2)), [["a"]] * count), "ab", "multi-class")
    assert found.summary == "Not judged: too few images."


def test_judges_each_class_of_multi_label_data():
    points = _clusters(40)
    labels = [["a"]] * 40 + [["a", "b"]] * 40 + [[] for _ in range(40)]
    labels[7] = ["a", "b"]
    labels[50] = ["a"]
    found = judge(_sample(points, labels), ("a", "b", "never"), "multi-label")
    assert without_chance(found.offenders) == {
        "007.png: labelled b, looks like no b",
        "050.png: labelled no b, looks like b",
    }


def test_chances_of_a_wrong_label_by_hand():
    # Of the most confident 10 of 50, 2 contradict: e = 2.5 / 11. Of two classes, a label of probability p has the true
    # class at (p - e) / (1 - 2e), and is wrong with 1 - that * (1 - e) / p: at 0.5, where it is half true, with e.
    second = np.array([0.2] * 10 + [0.5] * 40)
    given = np.array([0] * 8 + [1] * 2 + [0] * 40)
    chances = wrong_label_chances(given, np.stack([1.0 - second, second], axis=1))
    assert chances is not None
    np.testing.assert_allclose(chances[8:10], 1.0, atol=1e-9)
    np.testing.assert_allclose(chances[10:], 2.5 / 11, atol=1e-9)
    np.testing.assert_allclose(chances[:8], 0.0, atol=0.05)


def test_of_nine_images_all_count_as_the_most_confident() -> None:
    # One of nine contradicts: e = 0.15. At 0.2 the true class is at 0.05 / 0.7 = 1 / 14.
    second = np.array([0.2] * 8 + [0.5])
    chances = wrong_label_chances(np.array([0] * 7 + [1, 0]), np.stack([1.0 - second, second], axis=1))
    assert chances is not None
    np.testing.assert_allclose(chances[7:], [1 - 0.85 * 5 / 14, 0.15], atol=1e-9)


def test_judges_a_dozen_images_of_which_three_are_there_twice() -> None:
    points, hashes = _clusters(6, clusters=2), list("012345678678")
    points[9:] = points[6:9]
    assert probe_labels(_sample(points, _labels(6, "ab"), hashes), "ab", "multi-class").judged == 12


def test_labels_that_contradict_everywhere_are_not_judged():
    second = np.array([0.1] * 50)
    assert wrong_label_chances(np.array([0, 1] * 25), np.stack([1.0 - second, second], axis=1)) is None


def test_of_images_that_are_as_confident_the_first_are_counted() -> None:
    # The most confident 10 of 50 are one of 0.9 and the first nine of 0.8, of which two contradict: e = 2.5 / 11.
    second = np.array([0.8] * 20 + [0.9] + [0.5] * 29)
    given = np.array([1] * 7 + [0] * 13 + [1] * 30)
    chances = wrong_label_chances(given, np.stack([1.0 - second, second], axis=1))
    assert chances is not None
    np.testing.assert_allclose(chances[21:], 2.5 / 11, atol=1e-9)


def test_the_interval_is_that_of_images_drawn_anew() -> None:
    generator = np.random.default_rng(1)
    probabilities = generator.dirichlet(np.ones(4) / 4, 300).round(1)  # So that many are alike.
    given = np.array([generator.choice(4, p=row / row.sum()) for row in probabilities])
    chances, weights = wrong_label_chances(given, probabilities), generator.integers(1, 4, 300)
    assert chances is not None
    shares = [np.average(chances, weights=weights)]
    draws = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        drawn = draws.integers(0, 300, 300)
        found = wrong_label_chances(given[drawn], probabilities[drawn])
        shares.append(shares[0] if found is None else np.average(found, weights=weights[drawn]))
    np.testing.assert_allclose(_resampled(given, probabilities, weights, chances), shares, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_each_fold_has_as_many_of_each_class(seed: int) -> None:
    generator = np.random.default_rng(seed)
    given = generator.permutation(np.repeat(np.arange(5), [5, 7, 300, 61, 12]))
    folds = even_folds(given, np.arange(len(given)))
    counts = np.array([np.bincount(folds[given == label], minlength=FOLDS) for label in range(5)])
    assert (np.ptp(counts, axis=1) <= 1).all()
    assert np.ptp(counts.sum(axis=0)) <= 1
    assert counts[0].tolist() == [1] * FOLDS, "a class of five has an image in each fold, and four that are fitted on"


def test_copies_are_in_one_fold_and_the_rest_makes_up_for_them() -> None:
    # Two images with ten copies each go to two folds; the other 40 of their class to where fewer are, first.
    given = np.array([0] * 60 + [1] * 10)
    groups = np.array([7] * 10 + [3] * 10 + list(range(100, 150)))
    folds = even_folds(given, groups)
    assert len(set(folds[:10])) == len(set(folds[10:20])) == 1
    assert np.bincount(folds[given == 0]).tolist() == [12] * FOLDS
    assert np.bincount(folds[given == 1]).tolist() == [2] * FOLDS
    assert np.array_equal(folds, even_folds(given, groups)), "the same for the same images"


def test_finds_wrong_labels_of_digits_with_the_encoder(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits
    from sklearn.metrics import average_precision_score

    digits: Any = load_digits()
    grey = (digits.images[:1000] * (255 / 16)).astype(np.uint8)
    images = np.stack([cv2.resize(cv2.merge([one] * 3), (32, 32)) for one in grey])
    generator = np.random.default_rng(0)
    labels = digits.target[:1000].copy()
    wrong = generator.random(1000) < 0.05
    labels[wrong] = (labels[wrong] + generator.integers(1, 10, wrong.sum())) % 10
    encoder = open_encoder(EncoderConfig(input_px=64), tmp_path)
    vectors = encoder.embed(np.stack([cv2.resize(image, (64, 64)) for image in images]))
    sample = replace(
        _sample(principal_components(images), [[str(label)] for label in labels]), embeddings=vectors.astype(np.float16)
    )
    probe = probe_labels(sample, [str(digit) for digit in range(10)], "multi-class")
    suspected = [suspicion.position for suspicion in probe.suspicions]
    assert suspected == sorted(suspected, key=lambda at: (-probe.chances[at], at))
    assert sorted(suspected) == np.flatnonzero(probe.chances > 0.5).tolist()
    assert wrong[suspected].mean() >= 0.9, "of those suspected, that many are wrong"
    assert average_precision_score(wrong, probe.chances) >= 0.9
    assert abs(probe.wrong_fraction - wrong.mean()) <= 0.03
    low, high = probe.wrong_interval
    assert low <= wrong.mean() <= high
    assert 0.005 <= high - low <= 0.08, "an interval that says something"


def test_balanced_accuracy_weighs_classes_the_same():
    given = np.array([0, 0, 0, 0, 1])
    probabilities = np.array([[1.0, 0.0]] * 5)
    assert balanced_accuracy(given, probabilities) == 0.5


def test_principal_components_do_not_depend_on_their_sign_convention():
    images = np.random.default_rng(4).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    first, again = principal_components(images), principal_components(images.copy())
    assert first == pytest.approx(again, abs=1e-3)
    assert first.shape == (30, 29)
    variances = first.var(axis=0)
    assert (np.diff(variances) <= 1e-6).all()


def test_principal_components_keep_distances_when_all_are_kept():
    images = np.random.default_rng(5).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    projected = principal_components(images)
    flat = images.reshape(8, -1) / 255.0
    expected = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    assert np.linalg.norm(projected[:, None] - projected[None], axis=2) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("count", [0, 1])
def test_principal_components_of_one_image_or_none_are_zero(count):
    assert principal_components(np.full((count, 32, 32, 3), 7, np.uint8)).shape == (count, 1)


def test_asks_of_a_class_only_the_images_of_which_it_is_known():
    points = _clusters(40)
    labels = [["a"]] * 40 + [["a", "b"]] * 40 + [[] for _ in range(40)]
    labels[50] = ["a"]
    hidden = [["b"] if at in {7, 50, 60} else [] for at in range(120)]
    sample = _sample(points, labels)
    sample.rows["unknown_labels"] = pd.Series(hidden, dtype=object)
    assert judge(sample, ("a", "b"), "multi-label").offenders == ()
    positions, given, _ = list(label_questions(labels, ("a", "b"), "multi-label", hidden))[1]
    assert (len(positions), len(given), {7, 50, 60} & set(positions.tolist())) == (117, 117, set())
