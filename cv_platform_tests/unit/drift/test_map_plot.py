from __future__ import annotations

import cv2
import numpy as np

from cv_platform.drift.map_plot import draw_map, places
from cv_platform.drift.sample import DriftSample
from cv_platform_tests.support.drift_samples import draw_sample


def test_what_differs_lies_apart_and_what_does_not_lies_together() -> None:
    rng = np.random.default_rng(0)
    reference, same, moved = draw_sample(rng, 700), draw_sample(rng, 200), draw_sample(rng, 200, shift=4.0)

    def distance(current: DriftSample) -> float:
        left, right = places(reference, current, seed=0)
        assert (left.shape, right.shape) == ((500, 2), (200, 2))
        return float(np.linalg.norm(left.mean(axis=0) - right.mean(axis=0)) / np.concatenate([left, right]).std())

    assert distance(moved) > 1.0 > 3 * distance(same)


def test_constant_and_single_features_have_a_map_too() -> None:
    sample = draw_sample(np.random.default_rng(0), 20)
    for features in (np.ones((20, 3), np.float32), np.ones((20, 1), np.float32)):
        flat = DriftSample(sample.bbsd, features, sample.uae, sample.properties)
        left, right = places(flat, flat, seed=0)
        assert np.isfinite(left).all()
        assert right.shape == (20, 2)


def test_the_picture_is_one() -> None:
    sample = draw_sample(np.random.default_rng(0), 20)
    picture = cv2.imdecode(np.frombuffer(draw_map(sample, sample, seed=0), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (506, 770, 3)
