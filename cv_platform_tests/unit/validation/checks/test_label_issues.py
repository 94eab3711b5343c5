from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest

from cv_platform.config import ClassifierType, ValidateConfig
from cv_platform.records import CheckOutcome
from cv_platform.validation.checks.label_issues import (
    LabelIssues,
    balanced_accuracy,
    confident_disagreements,
    probe_labels,
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
    return np.concatenate([generator.normal(10 * k, 1.0, (per_cluster, 4)) for k in range(clusters)])


def _labels(per_cluster: int, names: str = "abc") -> list[list[str]]:
    return [[name] for name in names for _ in range(per_cluster)]


def judge(
    sample: ImageSample, names: Sequence[str], kind: ClassifierType, config: ValidateConfig = CONFIG
) -> CheckOutcome:
    return LabelIssues().run(subject(config=config, sample=sample, class_names=names, classifier_type=kind))


def test_finds_a_planted_wrong_label_and_names_what_it_looks_like():
    labels = _labels(40)
    labels[5], labels[90] = ["b"], ["a"]
    found = judge(_sample(_clusters(40), labels), "abc", "multi-class")
    assert found.value == pytest.approx(2 / 120)
    assert found.passed
    assert found.offenders == (
        "005.png: labelled b, looks like a (1.00)",
        "090.png: labelled a, looks like c (1.00)",
    )


def test_fails_above_the_limit():
    labels = _labels(40)
    for i in range(3):
        labels[i] = ["b"]
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


def test_does_not_judge_where_look_alikes_do_not_predict_the_labels():
    generator = np.random.default_rng(3)
    labels = [[str(name)] for name in generator.choice(list("abc"), 120)]
    found = judge(_sample(_clusters(40), labels), "abc", "multi-class")
    assert found.passed
    assert found.value is None
    assert found.summary.startswith("Not judged: look-alikes predict the labels too poorly")


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
    assert set(found.offenders) == {
        "007.png: labelled b, looks like no b (1.00)",
        "050.png: labelled no b, looks like b (1.00)",
    }


def test_the_rule_of_confident_learning_by_hand():
    given = np.array([0] * 5 + [1] * 5)
    second = np.array([0.1, 0.1, 0.1, 0.3, 0.95, 0.9, 0.9, 0.9, 0.9, 0.4])
    probabilities = np.stack([1 - second, second], axis=1)
    # Thresholds: class 0 (.9 + .9 + .9 + .7 + .05)/5 = .69; class 1 (.9 × 4 + .4)/5 = .8.
    # Image 4 reaches class 1's (.95 ≥ .8); image 9 is more likely 0 (.6), but does not reach class 0's (.6 < .69).
    assert confident_disagreements(given, probabilities) == [(4, 1)]


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
