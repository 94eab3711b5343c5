"""The temperature: found again where it is known, bounded where the split says nothing, and never for the worse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import expit, softmax

from cv_platform.config import ClassifierType
from cv_platform.training.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    calibrate,
    calibrated_cross_entropy,
    fit_temperature,
    negative_log_likelihood,
    predict_logits,
    scale_logits,
)


def drawn(kind: ClassifierType, rows: int, seed: int = 0, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits, and targets drawn from the probabilities that those logits say."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (rows, classes))
    if kind == "multi-label":
        return logits, (generator.random(logits.shape) < expit(logits)).astype(np.float32)
    cumulated = softmax(logits, axis=1).cumsum(axis=1)
    return logits, (generator.random((rows, 1)) > cumulated).sum(axis=1)


@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
def test_an_epoch_is_judged_as_its_model_would_be_at_its_temperature(kind: ClassifierType) -> None:
    logits, targets = drawn(kind, 4000)
    truth = targets if kind == "multi-label" else np.eye(logits.shape[1])[targets]
    best = negative_log_likelihood(logits / fit_temperature(logits, targets, kind), targets, kind)
    for factor in (0.5, 1.0, 2.0):  # Timid, as with label smoothing; honest; bold.
        probabilities = expit(logits * factor) if kind == "multi-label" else softmax(logits * factor, axis=1)
        metric: Any = calibrated_cross_entropy(kind)
        for start in range(0, 4000, 1500):
            metric.update_state(truth[start : start + 1500], probabilities[start : start + 1500])
        assert float(metric.result()) == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
def test_finds_a_known_temperature_again(kind: ClassifierType, true_temperature: float) -> None:
    logits, targets = drawn(kind, 20_000)

    assert fit_temperature(logits * true_temperature, targets, kind) == pytest.approx(true_temperature, rel=0.04)


@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
def test_never_raises_the_negative_log_likelihood_of_the_valid_split(kind: ClassifierType) -> None:
    for seed in range(40):
        logits, targets = drawn(kind, rows=3 + seed, seed=seed)
        logits = logits * np.random.default_rng(seed).uniform(0.05, 20)
        before = negative_log_likelihood(logits, targets, kind)

        temperature = fit_temperature(logits, targets, kind)

        assert negative_log_likelihood(logits / temperature, targets, kind) <= before
        assert MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE


def test_the_likelihood_is_that_of_the_definition() -> None:
    two = np.array([[np.log(3.0), 0.0]])

    # softmax gives 3/4; the sigmoids give 3/4 and 1/2.
    assert negative_log_likelihood(two, np.array([0]), "multi-class") == pytest.approx(-np.log(0.75))
    labels = negative_log_likelihood(two, np.array([[1.0, 0.0]]), "multi-label")
    assert labels == pytest.approx((-np.log(0.75) - np.log(0.5)) / 2)


@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
def test_a_split_without_a_mistake_does_not_make_the_model_certain(kind: ClassifierType) -> None:
    targets = np.arange(60) % 3
    logits = np.where(np.eye(3)[targets] > 0, 1.0, -1.0)

    temperature = fit_temperature(logits, targets if kind == "multi-class" else np.eye(3)[targets], kind)

    # After 60 right answers of 60 the next is right with 61/62; with 60 positives and 120 negatives, the mean of both.
    expected = 61 / 62 if kind == "multi-class" else (60 * 61 / 62 + 120 * 121 / 122) / 180
    sharpened = logits / temperature
    p = softmax(sharpened, axis=1).max() if kind == "multi-class" else 1 - expit(sharpened).min()
    assert temperature < 1
    assert p == pytest.approx(expected, abs=1e-4)


def test_logits_that_separate_everything_by_far_stay_bounded() -> None:
    targets = np.arange(30) % 3

    assert fit_temperature(np.eye(3)[targets] * 1e-6, targets, "multi-class") == pytest.approx(MIN_TEMPERATURE, 1e-3)
    assert fit_temperature(np.eye(3)[targets] * 1e6, targets, "multi-class") == 1.0


@pytest.mark.xdist_group("training")
@pytest.mark.parametrize("kind", ["multi-class", "multi-label"])
def test_scales_a_network_in_place_and_keeps_every_answer(kind: ClassifierType) -> None:
    import keras

    image = keras.Input((2, 2, 3), dtype="uint8", name="image")
    vector = keras.layers.Flatten()(keras.layers.Rescaling(1 / 25)(image))
    initializer: Any = keras.initializers.RandomNormal(seed=1)
    dense = keras.layers.Dense(4, name="logits", kernel_initializer=initializer)
    activation = "softmax" if kind == "multi-class" else "sigmoid"
    network = keras.Model(image, keras.layers.Activation(activation, name="probabilities")(dense(vector)))
    dense.set_weights([dense.get_weights()[0] * 3, np.array([0.5, -0.5, 0.25, 0.0], np.float32)])
    images = np.random.default_rng(2).integers(0, 256, (300, 2, 2, 3), dtype=np.uint8)
    before = predict_logits(network, images)
    truth = (before + np.random.default_rng(3).normal(0, before.std(), before.shape)).argmax(axis=1)
    targets = truth if kind == "multi-class" else np.eye(4)[truth]

    temperature = calibrate(network, images, targets, kind)

    after = predict_logits(network, images)
    assert temperature != 1.0
    np.testing.assert_allclose(after, before / temperature, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after.argmax(axis=1), before.argmax(axis=1))
    np.testing.assert_array_equal(after > 0, before > 0)  # The labels from a threshold of 0.5 on.
    # Fitted again, there is nothing left to find.
    assert fit_temperature(after, targets, kind) == pytest.approx(1.0, abs=1e-3)
    scale_logits(network, 1 / temperature)
    np.testing.assert_allclose(predict_logits(network, images), before, rtol=1e-4, atol=1e-5)


def test_the_temperature_is_fitted_to_known_labels_alone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(500, 3))
    targets = (rng.random((500, 3)) < 1 / (1 + np.exp(-logits / 2))).astype(np.float32)
    hidden = rng.random((500, 3)) < 0.4
    doubtful = np.where(hidden, np.nan, targets)
    spoilt = np.where(hidden, 50.0, logits)
    found = fit_temperature(logits, doubtful, "multi-label")
    assert found == pytest.approx(fit_temperature(spoilt, doubtful, "multi-label"))
    kept = logits[~hidden][:, None], targets[~hidden][:, None]
    assert found == pytest.approx(fit_temperature(*kept, "multi-label"))
    assert negative_log_likelihood(logits, doubtful, "multi-label") == pytest.approx(
        negative_log_likelihood(*kept, "multi-label")
    )
    assert fit_temperature(logits, np.full((500, 3), np.nan), "multi-label") == 1.0


def test_the_calibrated_cross_entropy_is_that_of_known_labels():
    probabilities = np.array([[0.9, 0.2], [0.3, 0.6]], np.float32)
    metric = calibrated_cross_entropy("multi-label")
    metric.update_state(np.array([[1, np.nan], [np.nan, 0]], np.float32), probabilities)
    other = calibrated_cross_entropy("multi-label")
    other.update_state(np.array([[1], [0]], np.float32), probabilities[[0, 1], [0, 1]][:, None])
    assert float(metric.result()) == pytest.approx(float(other.result()), rel=1e-5)
