"""Training that begins with a network that has learned from other images."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cv_platform.config import ExperimentConfig, ModelConfig, TransferConfig
from cv_platform.datasets.packing import open_split
from cv_platform.errors import ConfigError, TrainingError
from cv_platform.records import PackedImages
from cv_platform.training.callbacks import read_state
from cv_platform.training.fitting import fit_model
from cv_platform.training.network import build_model, feature_map_layer
from cv_platform.training.trainer import weights_sha256
from cv_platform.training.transfer import fit_head, layer_rates
from cv_platform_tests.support.tiny_training import experiment, pack_tiny

# One worker: each would train the network anew.
pytestmark = pytest.mark.xdist_group("transfer")

LITE0 = {
    "model__architecture": "efficientnet_lite0",
    "model__input_size": {"h": 32, "w": 32},
    "train__optimizer": "adamw",
    "train__init_lr": 0.001,
    "train__epochs": 2,
    "train__transfer": {"freeze_until": 6},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedImages:
    return pack_tiny(tmp_path_factory.mktemp("packed"), experiment(**LITE0))


def fit(packed: PackedImages, config: ExperimentConfig, folder: Path):
    folder.mkdir(exist_ok=True)
    return fit_model(config, open_split(packed, "train"), open_split(packed, "valid"), folder=folder)


def clouds(count: int, *, classes: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Returns features whose classes overlap, and one-hot targets."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(1).normal(0, 1.2, (classes, 8))
    # Of different scales and places, as features are.
    features = (rng.normal(0, 1, (count, 8)) + centres[labels]) * np.logspace(-2, 2, 8) + 3
    return features.astype(np.float32), np.eye(classes, dtype=np.float32)[labels]


def test_the_head_is_what_scikit_learn_finds_with_the_same_penalty() -> None:
    from sklearn.linear_model import LogisticRegression

    (features, targets), (valid, valid_targets) = (clouds(n, classes=4, seed=n) for n in (400, 300))
    head = fit_head(features, targets, valid, valid_targets, "multi-class")

    scaled, valid_scaled = ((x - features.mean(0)) / (features.std(0) + 1e-3) for x in (features, valid))
    theirs = LogisticRegression(C=1 / (head.penalty * len(features)), max_iter=1000)
    expected = theirs.fit(scaled, targets.argmax(1)).predict_proba(valid_scaled)
    logits = valid @ head.kernel + head.bias
    received = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(received, expected, atol=0.02)
    assert head.accuracy == pytest.approx(theirs.score(scaled, targets.argmax(1)), abs=0.01)


def test_the_penalty_is_strong_where_features_say_nothing_and_weak_where_they_say_all() -> None:
    rng = np.random.default_rng(0)
    noise, guesses = rng.normal(size=(120, 60)).astype(np.float32), np.eye(2, dtype=np.float32)[rng.integers(0, 2, 120)]
    says_nothing = fit_head(noise[:60], guesses[:60], noise[60:], guesses[60:], "multi-class")
    clear = np.concatenate([guesses * 3, noise[:, :4] * 0.1], axis=1).astype(np.float32)
    says_all = fit_head(clear[:60], guesses[:60], clear[60:], guesses[60:], "multi-class")

    assert says_nothing.penalty > 100 * says_all.penalty
    assert says_all.accuracy == 1.0


def test_a_head_of_several_labels_judges_each_by_itself_and_bears_one_that_never_occurs() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (200, 3)).astype(np.float32)
    targets[:, 2] = 0
    features = (targets @ rng.normal(size=(3, 6)) + rng.normal(0, 0.1, (200, 6))).astype(np.float32)
    head = fit_head(features[:120], targets[:120], features[120:], targets[120:], "multi-label")

    logits = features[120:] @ head.kernel + head.bias
    assert ((logits > 0) == (targets[120:] > 0.5)).mean() > 0.99
    assert (logits[:, 2] < 0).all()


def test_frozen_stages_do_not_learn_and_early_ones_learn_slowly() -> None:
    config = experiment(**LITE0).model
    network = build_model(config, seed=1)
    rates = layer_rates(network, config.architecture, TransferConfig(freeze_until=6, rate_decay=0.5))

    frozen = {layer.name for layer in network.layers if layer.weights and not layer.trainable}
    assert {"conv_stem", "blocks.10._project_conv"} <= frozen
    assert not {"blocks.11._expand_conv", "conv_head", "logits"} & frozen
    assert rates["conv_head/kernel"] == 1.0
    assert rates["blocks.15._project_conv/kernel"] == 0.5
    assert rates["blocks.11._expand_conv/bias"] == 0.25
    assert "logits/kernel" not in rates


def test_wide_kernels_stay_as_they_are_when_asked_and_their_biases_learn() -> None:
    config = experiment(**LITE0).model
    network = build_model(config, seed=1)
    rates = layer_rates(network, config.architecture, TransferConfig(freeze_wide_kernels=True))

    assert {"blocks.3._depthwise_conv/bias", "blocks.5._depthwise_conv/kernel"} <= set(rates)
    wide = network.get_layer("blocks.3._depthwise_conv").kernel  # 5×5; that of block 5 is 3×3.
    assert wide.path not in {variable.path for variable in network.trainable_variables}
    assert wide.path not in rates


@pytest.fixture(scope="module")
def head_alone(packed: PackedImages, tmp_path_factory: pytest.TempPathFactory):
    return fit(packed, experiment(**{**LITE0, "train__epochs": 0}), tmp_path_factory.mktemp("head"))


def test_the_head_alone_is_a_model_on_the_features_of_the_package(packed: PackedImages, head_alone) -> None:
    import keras

    fresh = build_model(experiment(**LITE0).model, seed=9)
    images = open_split(packed, "valid").images[:4]
    maps = [keras.Model(net.input, feature_map_layer(net).output)(images) for net in (fresh, head_alone.network)]
    np.testing.assert_array_equal(*maps)
    assert head_alone.best_epoch == 1
    assert {len(values) for values in head_alone.history.values()} == {1}
    # One channel of its images is brighter: a linear head sees it.
    assert head_alone.history["val_accuracy"] == [1.0]


KILLED = """
import json, os, signal, sys
from pathlib import Path
from cv_platform.config import parse_experiment
from cv_platform.datasets.packing import open_split
from cv_platform.records import PackedImages
from cv_platform.training.callbacks import TrainingMonitor
from cv_platform.training.fitting import fit_model

check = TrainingMonitor.check_loss

def dying(self, batches, loss):
    check(self, batches, loss)
    if self.state is not None and self.state.epochs_done == 2 and batches == 2:
        os.kill(os.getpid(), signal.SIGKILL)

TrainingMonitor.check_loss = dying
packed, config, folder = sys.argv[1:]
splits = PackedImages.model_validate_json(packed, context={"home": "/"})
fit_model(
    parse_experiment(json.loads(config), origin="test"),
    open_split(splits, "train"),
    open_split(splits, "valid"),
    folder=Path(folder),
)
"""


@pytest.mark.timeout(600)  # Another process loads TensorFlow first.
def test_a_fine_tuning_that_is_killed_in_the_middle_of_an_epoch_goes_on_to_the_same_weights(
    packed: PackedImages, head_alone, tmp_path: Path
) -> None:
    config = experiment(**LITE0)
    whole = fit(packed, config, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    given = packed.model_dump_json(context={"home": "/"}), config.model_dump_json(), str(tmp_path / "killed")
    killed = subprocess.run([sys.executable, "-c", KILLED, *given], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    left = read_state(tmp_path / "killed")
    assert left is not None
    assert left.epochs_done == 2
    resumed = fit(packed, config, tmp_path / "killed")

    assert {len(values) for values in whole.history.values()} == {3}
    assert whole.history["loss"][0] == pytest.approx(head_alone.history["loss"][0], rel=1e-4)
    assert weights_sha256(resumed.network) == weights_sha256(whole.network)
    # The best epoch may be the head alone: what was fine-tuned is in the last.
    last = [last_weights(tmp_path / name, config) for name in ("whole", "killed")]
    for name in ("conv_head", "logits"):
        np.testing.assert_array_equal(last[0][name], last[1][name])
        assert not np.array_equal(last[0][name], head_alone.network.get_layer(name).get_weights()[0])
    np.testing.assert_array_equal(last[0]["conv_stem"], head_alone.network.get_layer("conv_stem").get_weights()[0])


def last_weights(folder: Path, config: ExperimentConfig) -> dict[str, NDArray[np.float32]]:
    """Returns the kernels by layer that a training has reached, of whichever epoch it kept."""
    state = read_state(folder)
    assert state is not None
    network = build_model(config.model)
    with np.load(folder / state.last_weights) as arrays:
        network.set_weights([arrays[f"arr_{index}"] for index in range(len(network.weights))])
    return {layer.name: layer.get_weights()[0] for layer in network.layers if layer.weights}


def test_a_network_that_knows_nothing_cannot_be_left_as_it_is() -> None:
    with pytest.raises(ConfigError, match="expected at least 1 for small_cnn"):
        experiment(train__epochs=0)
    assert experiment(train__epochs=0, train__transfer={"head": "fit"}).transfer == TransferConfig(head="fit")
    assert experiment(**LITE0).transfer == TransferConfig(freeze_until=6)
    assert experiment(**{**LITE0, "train__transfer": {"head": "keep"}}).transfer is None
    assert experiment().transfer is None


def test_lite0_refuses_images_that_leave_no_map() -> None:
    small = ModelConfig.model_validate(
        {**experiment().model.model_dump(), "architecture": "efficientnet_lite0", "input_size": {"h": 31, "w": 64}}
    )
    with pytest.raises(TrainingError, match=r"at least 32×32 for efficientnet_lite0.*Received: 31×64"):
        build_model(small)


def test_a_head_is_fitted_to_known_labels_alone():
    rng = np.random.default_rng(5)
    features = rng.normal(size=(600, 6)).astype(np.float32)
    targets = (features[:, :2] + 0.3 * rng.normal(size=(600, 2)) > 0).astype(np.float32)
    hidden = rng.random(targets.shape) < 0.3
    doubtful = np.where(hidden, np.nan, targets).astype(np.float32)
    fitted = fit_head(features[:400], doubtful[:400], features[400:], doubtful[400:], "multi-label")
    assert np.isfinite(fitted.kernel).all()
    # Class by class, the regression is that of the rows of which the class is known.
    whole = fit_head(features[:400], targets[:400], features[400:], targets[400:], "multi-label")
    as_no = fit_head(
        features[:400], np.nan_to_num(doubtful[:400]), features[400:], np.nan_to_num(doubtful[400:]), "multi-label"
    )
    gap, worse = (np.abs(head.bias - whole.bias).max() for head in (fitted, as_no))
    assert gap < 0.5 * worse
    assert fitted.accuracy > 0.9
    assert fitted.accuracy == pytest.approx(
        ((features[:400] @ fitted.kernel + fitted.bias > 0) == (targets[:400] > 0.5))[~hidden[:400]].mean(), abs=0.01
    )
