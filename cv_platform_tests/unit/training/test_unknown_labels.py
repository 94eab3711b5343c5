"""Loss and metrics on known labels, and a training that sees nothing of the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from cv_platform.datasets.packing import PackedSplit
from cv_platform.errors import TrainingError
from cv_platform.training.fitting import FittedModel, fit_model
from cv_platform.training.unknown_labels import known_cross_entropy, known_metrics
from cv_platform_tests.support.tiny_training import experiment

TARGETS = np.array([[1, np.nan], [0, 1], [np.nan, np.nan]], np.float32)
PROBABILITIES = np.array([[0.8, 0.9], [0.4, 0.5], [0.1, 0.2]], np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_over_known_labels_and_has_no_other_gradient(smoothing: float) -> None:
    answers = tf.Variable(tf.constant(PROBABILITIES))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(known_cross_entropy(smoothing)(tf.constant(TARGETS), answers))
    yes, no = 1 - smoothing / 2, smoothing / 2
    each = [(yes, 0.8), (no, 0.4), (yes, 0.5)]
    expected = np.mean([-t * np.log(p) - (1 - t) * np.log(1 - p) for t, p in each])
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    gradient = np.asarray(tape.gradient(loss, answers))
    assert np.isfinite(gradient).all()
    assert (gradient != 0).tolist() == [[True, False], [True, True], [False, False]]
    nothing = known_cross_entropy(smoothing)(tf.fill((2, 2), np.nan), tf.fill((2, 2), 0.5))
    assert np.asarray(nothing).tolist() == [0.0, 0.0]


def test_metrics_are_means_over_the_known_labels_of_all_batches() -> None:
    accuracy, cross_entropy = known_metrics(0.5)
    for rows in (slice(0, 1), slice(1, 3)):
        accuracy.update_state(TARGETS[rows], PROBABILITIES[rows])
        cross_entropy.update_state(TARGETS[rows], PROBABILITIES[rows])
    assert float(accuracy.result()) == pytest.approx(2 / 3)  # 0.5 is not above the threshold.
    assert float(cross_entropy.result()) == pytest.approx(-np.log([0.8, 0.6, 0.5]).mean(), rel=1e-5)


def _split(targets: np.ndarray, seed: int) -> PackedSplit:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 120, (len(targets), 16, 16, 3), dtype=np.uint8)
    images += (np.nan_to_num(targets)[:, None, None, :] * 120).astype(np.uint8)
    names = [str(at) for at in range(len(targets))]
    return PackedSplit(images, targets, names, names)


def _fit(folder: Path, train: PackedSplit, valid: PackedSplit, **changes: object) -> FittedModel:
    folder.mkdir(parents=True)
    config = experiment(model__classifier_type="multi-label", train__epochs=2, **changes)
    return fit_model(config, train, valid, folder=folder)


def _splits() -> tuple[PackedSplit, PackedSplit]:
    rng = np.random.default_rng(7)
    train, valid = ((rng.random((count, 3)) < 0.5).astype(np.float32) for count in (48, 16))
    return _split(train, 1), _split(valid, 2)


def _hidden(split: PackedSplit, value: float) -> PackedSplit:
    """Returns the split with `value` in the place of a third of its labels."""
    return replace(
        split, targets=np.where(np.random.default_rng(3).random(split.targets.shape) < 0.3, value, split.targets)
    )


@pytest.mark.parametrize("recipe", [{}, {"train__mixup_alpha": 0.4, "train__label_smoothing": 0.1}])
def test_a_training_with_unknown_labels_has_finite_losses_of_known_ones(tmp_path: Path, recipe: dict) -> None:
    train, valid = _splits()
    fitted = _fit(tmp_path / "one", _hidden(train, np.nan), _hidden(valid, np.nan), **recipe)
    assert all(np.isfinite(values).all() for values in fitted.history.values())
    assert all(np.isfinite(weight).all() for weight in fitted.network.get_weights())
    probabilities = fitted.network.predict(valid.images, verbose=0)
    targets = _hidden(valid, np.nan).targets
    known = ~np.isnan(targets)
    right = ((probabilities > 0.5) == (targets > 0.5))[known].mean()
    assert fitted.history["val_accuracy"][fitted.best_epoch - 1] == pytest.approx(float(right), abs=1e-6)


def test_a_training_without_unknown_labels_has_kerass_own_loss_and_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[object] = []
    compile_ = keras.Model.compile

    def compiled(self: keras.Model, *args: object, **options: object) -> None:
        losses.append(options.get("loss"))
        compile_(self, *args, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(keras.Model, "compile", compiled)
    train, valid = _splits()
    _fit(tmp_path / "one", train, valid)
    assert isinstance(losses[0], keras.losses.BinaryCrossentropy)


def test_the_masked_loss_trains_as_keras_does_where_all_is_known_but_for_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, valid = _splits()
    own = _fit(tmp_path / "one", train, valid)
    monkeypatch.setattr("cv_platform.training.fitting._has_unknown", lambda *splits: True)
    masked = _fit(tmp_path / "two", train, valid)
    for one, other in zip(own.network.get_weights(), masked.network.get_weights(), strict=True):
        assert other == pytest.approx(one, abs=1e-3)
    for name in ("loss", "val_loss", "val_accuracy", "val_cross_entropy"):
        assert masked.history[name] == pytest.approx(own.history[name], abs=1e-4), name


def test_a_split_of_which_no_label_is_known_is_refused(tmp_path: Path) -> None:
    train, valid = _splits()
    with pytest.raises(TrainingError, match="Received: a split of which no label is known"):
        _fit(tmp_path / "one", train, replace(valid, targets=np.full_like(valid.targets, np.nan)))
