import numpy as np
import pytest
from sklearn.metrics import f1_score

from cv_platform.config import Threshold
from cv_platform.evaluation.thresholds import FEWEST, best_thresholds
from cv_platform.predictions import decide
from cv_platform.serving.routes.answer import predicted_classes
from cv_platform_tests.support.tiny_models import tiny_metadata


def test_each_class_gets_the_threshold_of_its_best_f1_and_a_rare_class_the_common_one():
    rng = np.random.default_rng(0)
    truth = rng.random((400, 3)) < np.array([0.5, 0.12, 0.02])
    probabilities = np.clip(0.25 * truth + rng.normal(0.2, 0.1, truth.shape), 0.001, 0.999).astype(np.float32)
    found = best_thresholds(truth, probabilities, 0.5)
    assert truth[:, 2].sum() < FEWEST <= truth[:, 1].sum()
    assert found[2] == 0.5
    for index in (0, 1):
        scores = [f1_score(truth[:, index], probabilities[:, index] >= cut) for cut in np.linspace(0.01, 0.99, 99)]
        ours = f1_score(truth[:, index], decide(probabilities, found)[:, index])
        assert ours >= max(scores) - 1e-9
        assert found[index] < 0.5


def test_of_equally_good_thresholds_the_one_next_to_the_common_one_is_taken():
    truth = np.repeat([True, False], 30)[:, None]
    # Whatever lies between 0.2 and 0.9 is without a mistake; what is between two equal ones is no cut.
    probabilities = np.repeat([0.9, 0.2], 30)[:, None].astype(np.float32)
    assert best_thresholds(truth, probabilities, 0.5) == pytest.approx((0.55,), abs=1e-6)


@pytest.mark.parametrize(("threshold", "named"), [(0.5, ("dog",)), ((0.2, 0.7, 0.1), ("cat", "owl"))])
def test_the_service_names_classes_by_the_thresholds_of_its_bundle(threshold: Threshold, named: tuple[str, ...]):
    metadata = tiny_metadata(classifier_type="multi-label", threshold=threshold)
    again = type(metadata).model_validate_json(metadata.model_dump_json())
    assert predicted_classes(np.array([0.3, 0.6, 0.2], np.float32), again) == named


def test_unknown_labels_choose_no_threshold():
    truth = np.array([[True]] * 20 + [[False]] * 20 + [[False]] * 30)
    probabilities = np.concatenate([np.tile([0.8, 0.6], 10), np.full(20, 0.2), np.full(30, 0.7)])[:, None]
    known = np.array([[True]] * 40 + [[False]] * 30)
    assert best_thresholds(truth, probabilities, 0.5, known) == pytest.approx((0.4,), abs=1e-6)
    # As if the thirty were negative: all that is above them has an F1 of 2/3, and all from 0.6 on of 4/7.
    assert best_thresholds(truth, probabilities, 0.5) == pytest.approx((0.75,), abs=1e-6)
    assert best_thresholds(truth, probabilities, 0.3, known & ~truth) == (0.3,)
