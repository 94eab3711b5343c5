from __future__ import annotations

import numpy as np

from cv_platform.evaluation.robustness import measure_robustness


def test_each_corruption_takes_what_it_should_from_a_model_that_reads_brightness():
    images = np.repeat(np.array([100, 160], np.uint8), 20)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    labels = np.repeat([0, 1], 20)

    def predict(batch: np.ndarray) -> np.ndarray:
        is_bright = (batch.mean(axis=(1, 2, 3)) > 130).astype(int)
        return np.eye(2)[is_bright]

    rows = measure_robustness(images, predict, lambda probabilities: probabilities.argmax(axis=1) == labels)
    found = {(row.corruption, row.strength): row.accuracy for row in rows}
    assert rows[0].corruption == "none"
    assert rows[0].accuracy == 1.0
    assert len(rows) == 13
    # 160 × 0.7 = 112 is dark, 100 × 1.3 = 130 is not above 130, 100 × 1.6 = 160 is; the mean survives all the rest.
    assert found[("darker", "by 30%")] == 0.5
    assert found[("brighter", "by 60%")] == 0.5
    assert all(found[key] == 1.0 for key in found if key[0] in {"noise", "blur", "JPEG", "rotation"})
    assert all(row.low <= row.accuracy <= row.high for row in rows)


def test_images_are_changed_and_the_change_is_the_same_again():
    images = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3), dtype=np.uint8)
    seen: list[np.ndarray] = []

    def predict(batch: np.ndarray) -> np.ndarray:
        seen.append(batch.copy())
        return np.zeros((len(batch), 2))

    for _ in range(2):
        measure_robustness(images, predict, lambda probabilities: np.ones(len(probabilities), bool))
    assert all((first == second).all() for first, second in zip(seen[:13], seen[13:], strict=True))
    assert all((changed != images).any() for changed in seen[1:13])
    assert all(changed.shape == images.shape and changed.dtype == np.uint8 for changed in seen)
