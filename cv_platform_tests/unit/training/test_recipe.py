"""What a recipe may ask for beside its optimizer: averages, mixtures, balance, limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cv_platform.config import TrainConfig
from cv_platform.datasets.packing import PackedSplit, open_split
from cv_platform.errors import ConfigError
from cv_platform.records import PackedImages
from cv_platform.training.augmentation import Augmenter
from cv_platform.training.batches import ShuffledBatches
from cv_platform.training.callbacks import TrainingMonitor
from cv_platform.training.fitting import _chosen, epochs_of, fit_model
from cv_platform.training.imbalance import balance_of, balanced_cross_entropy
from cv_platform.training.mixing import Mixing
from cv_platform.training.schedules import build_optimizer
from cv_platform.training.transfer import fit_head
from cv_platform_tests.support.tiny_training import experiment

RARE = np.array([0] * 90 + [1] * 10)


class Interrupted(Exception):
    """Stands for the kill of a process."""


def halves() -> tuple[np.ndarray, np.ndarray]:
    """Returns eight images, four black ones of class 0 and four white ones of class 1."""
    images = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    images[4:] = 255
    return images, np.eye(2, dtype=np.float32)[[0] * 4 + [1] * 4]


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_a_mixture_has_the_shares_of_its_labels(kind: str) -> None:
    images, targets = halves()
    mixing = Mixing.of(TrainConfig.model_validate({kind: 1.0, "seed": 5}))
    for batch in range(5):
        mixed, shares = mixing(images, targets, epoch=0, batch_index=batch)
        # As white is class 1, how bright an image is says how much of class 1 is in it.
        np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)) / 255, shares[:, 1], atol=0.003)
        np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-6)
        again = mixing(images, targets, epoch=0, batch_index=batch)
        np.testing.assert_array_equal(mixed, again[0])
    assert (images[:4] == 0).all()
    assert (images[4:] == 255).all()


def test_without_mixing_a_batch_stays_as_it_is() -> None:
    images, targets = halves()
    assert Mixing.of(TrainConfig())(images, targets, epoch=0, batch_index=0)[0] is images


def test_weights_make_classes_count_equally_and_images_once_on_average() -> None:
    balance = balance_of(TrainConfig(imbalance="weights"), RARE, 3)
    assert balance.weights.tolist() == pytest.approx([100 / 180, 5.0, 1.0])  # The third class has no image.
    assert balance.weights[RARE].mean() == pytest.approx(1.0)


def test_the_balanced_loss_is_the_cross_entropy_times_weight_and_with_the_prior() -> None:
    targets = np.eye(2, dtype=np.float32)
    probabilities = np.array([[0.8, 0.2], [0.6, 0.4]], dtype=np.float32)
    weighted = balanced_cross_entropy(balance_of(TrainConfig(imbalance="weights"), RARE, 2), 0.0)
    assert np.asarray(weighted(targets, probabilities)) == pytest.approx(
        [-np.log(0.8) * 100 / 180, -np.log(0.4) * 5], rel=1e-4
    )
    adjusted = balanced_cross_entropy(balance_of(TrainConfig(imbalance="logit_adjustment"), RARE, 2), 0.0)
    shares = probabilities * [0.9, 0.1]
    expected = -np.log(np.diag(shares / shares.sum(axis=1, keepdims=True)))
    assert np.asarray(adjusted(targets, probabilities)) == pytest.approx(expected, rel=1e-4)


def test_the_sampler_draws_classes_equally_often() -> None:
    balance = balance_of(TrainConfig(imbalance="sampler"), RARE, 2)
    batches = ShuffledBatches(
        np.zeros((100, 2, 2, 3), np.uint8),
        RARE,
        classes=2,
        batch_size=10,
        augmenter=Augmenter(TrainConfig().augment, seed=1),
        draws=balance.draws,
    )
    drawn = np.concatenate([RARE[batches.order(epoch)] for epoch in range(40)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.03)
    np.testing.assert_array_equal(batches.order(3), batches.order(3))


@pytest.mark.parametrize("imbalance", ["weights", "sampler", "logit_adjustment"])
def test_a_balanced_head_finds_the_rare_class_more_often(imbalance: str) -> None:
    rng = np.random.default_rng(0)
    labels = np.tile(RARE, 4)
    features = (rng.normal(size=(400, 3)) + labels[:, None]).astype(np.float32)
    targets = np.eye(2, dtype=np.float32)[labels]
    recalls = {}
    for name in ("none", imbalance):
        balance = balance_of(TrainConfig.model_validate({"imbalance": name}), labels, 2)
        head = fit_head(features[::2], targets[::2], features[1::2], targets[1::2], "multi-class", balance)
        found = (features @ head.kernel + head.bias).argmax(axis=1)
        recalls[name] = float((found[labels == 1] == 1).mean())
    assert recalls[imbalance] > recalls["none"] + 0.2


def test_several_labels_have_no_balance() -> None:
    with pytest.raises(ConfigError, match=r"train.imbalance: expected none for multi-label"):
        experiment(model__classifier_type="multi-label", train__imbalance="weights")


def test_the_average_of_the_weights_is_what_is_validated_and_goes_back_bit_by_bit(tmp_path: Path) -> None:
    import keras

    keras.utils.set_random_seed(0)
    network: Any = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    train = TrainConfig(optimizer="sgd", schedule="constant", init_lr=0.1, ema_decay=0.5)
    network.compile(optimizer=build_optimizer(train, total_steps=3), loss="mse")
    monitor = TrainingMonitor(network, tmp_path, train=train, epochs=1, images_per_epoch=4, state=None, run=None)
    x, y, reached = np.eye(3, dtype=np.float32), np.ones((3, 2), np.float32), []
    for _ in range(3):
        network.train_on_batch(x, y)
        reached.append(network.get_weights()[0])
    monitor.take_average(True)
    # The first step is all that there is of an average.
    expected = 0.5 * (0.5 * reached[0] + 0.5 * reached[1]) + 0.5 * reached[2]
    np.testing.assert_allclose(network.get_weights()[0], expected, rtol=1e-5)
    monitor.take_average(False)
    np.testing.assert_array_equal(network.get_weights()[0], reached[2])


@pytest.mark.parametrize(("images", "epochs"), [(50, 16), (100, 10), (101, 9), (5000, 1)])
def test_a_large_set_gets_fewer_epochs_but_one(images: int, epochs: int) -> None:
    assert epochs_of(TrainConfig(epochs=16, max_images_shown=1000), images) == epochs
    assert epochs_of(TrainConfig(epochs=16), images) == 16


def test_a_choice_of_images_is_seeded_and_keeps_rows_together() -> None:
    split = PackedSplit(np.arange(10), np.arange(10) * 2, [str(n) for n in range(10)], [f"s{n}" for n in range(10)])
    chosen = _chosen(split, TrainConfig(max_images=4, seed=1))
    assert len(set(chosen.images)) == 4
    assert chosen.targets.tolist() == [2 * n for n in chosen.images]
    assert chosen.paths == [str(n) for n in chosen.images]
    assert _chosen(split, TrainConfig(max_images=4, seed=1)).paths == chosen.paths
    assert _chosen(split, TrainConfig(max_images=10)) is split


def test_a_killed_training_with_averages_mixtures_and_a_sampler_goes_on_to_the_same_weights(
    tiny_packed: PackedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(
        train__ema_decay=0.8, train__mixup_alpha=0.2, train__cutmix_alpha=1.0, train__imbalance="sampler"
    )
    splits = [open_split(tiny_packed, name) for name in ("train", "valid")]
    log = TrainingMonitor._log

    def dying(self: TrainingMonitor, epoch: int, metrics: dict[str, float]) -> None:
        log(self, epoch, metrics)
        if epoch == 0:
            raise Interrupted

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = fit_model(config, *splits, folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingMonitor, "_log", dying)
        with pytest.raises(Interrupted):
            fit_model(config, *splits, folder=tmp_path / "killed")
    resumed = fit_model(config, *splits, folder=tmp_path / "killed")
    np.testing.assert_allclose(resumed.history["val_loss"], whole.history["val_loss"], rtol=1e-3)
    for mine, theirs in zip(resumed.network.get_weights(), whole.network.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


def test_no_epoch_is_begun_that_would_end_too_late(tiny_packed: PackedImages, tmp_path: Path) -> None:
    splits = [open_split(tiny_packed, name) for name in ("train", "valid")]
    fitted = fit_model(experiment(train__max_seconds=1e-6), *splits, folder=tmp_path)
    assert len(fitted.history["loss"]) == 1
