"""Several devices share a batch and take the step of one: two logical CPUs, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cv_platform.errors import TrainingError
from cv_platform.training.devices import devices_of, require_equal_parts
from cv_platform.training.network import resolve_precision
from cv_platform_tests.support.tiny_training import experiment

BOTH_WAYS = """
import json, sys, tempfile
from pathlib import Path
import keras, numpy as np, tensorflow as tf
from cv_platform.datasets.packing import PackedSplit
from cv_platform.training.devices import devices_of, sharing
from cv_platform.training.fitting import fit_model
from cv_platform.training.schedules import build_optimizer
from cv_platform_tests.support.tiny_training import experiment

processor, = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
rng = np.random.default_rng(0)

def split(count):
    targets = np.arange(count) % 3
    images = rng.integers(0, 120, (count, 16, 16, 3), dtype=np.uint8)
    images[np.arange(count), :, :, targets] += 120
    return PackedSplit(images, targets, [], [])

train, valid = split(48), split(20)
for devices in ("one", "all"):
    config = experiment(train__devices=devices, train__optimizer="adamw", model__dropout=0.0, train__epochs=1)
    # Of those of `valid`, a last one that has no pair is left out where two share a batch.
    if devices == "all":
        valid = PackedSplit(np.concatenate([valid.images, valid.images[:1]]), np.append(valid.targets, 0), [], [])
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit_model(config, train, valid, folder=Path(folder))
    weights = np.concatenate([weight.ravel() for weight in fitted.network.get_weights()])
    print(json.dumps([fitted.history, weights.tolist()]))

# A second network in the process, a rate of its own for a variable: each device must keep to it.
plain = config.train.model_copy(update={"optimizer": "sgd"})
with sharing(devices_of(config.train))():
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="slow")], name="small")
    network.compile(build_optimizer(plain, total_steps=9, rates={"small/slow/kernel": 0.0}), "mse", jit_compile=False)
before = network.get_weights()
network.fit(np.ones((8, 4)), np.ones((8, 2)), batch_size=4, verbose=0)
copies = [np.asarray(copy) for variable in network.variables for copy in variable.value.values]
print(json.dumps([(copies[i] == before[i // 2]).all().item() for i in range(4)]))
"""


def test_two_devices_that_share_each_batch_learn_what_one_does() -> None:
    done = subprocess.run([sys.executable, "-c", BOTH_WAYS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (one, weights), (both, weights_of_both), is_kept = map(json.loads, done.stdout.splitlines())
    # Sums in another order, in float32, over three steps.
    for metric in ("loss", "accuracy", "cross_entropy", "val_loss", "val_accuracy", "val_cross_entropy"):
        np.testing.assert_allclose(both[metric], one[metric], rtol=1e-4, err_msg=metric)
    np.testing.assert_allclose(weights_of_both, weights, atol=1e-3)
    assert is_kept == [True, True, False, False]


class Gpus:
    """What TensorFlow would say of a machine with GPUs, of which there is none here."""

    def __init__(self, capabilities: list[tuple[int, int]]) -> None:
        self.capabilities, self.grown = capabilities, list[int]()
        self.experimental = SimpleNamespace(
            get_device_details=lambda gpu: {"compute_capability": capabilities[gpu]},
            set_memory_growth=lambda gpu, is_on: self.grown.append(gpu) if is_on else None,
        )

    def list_physical_devices(self, kind: str) -> list[int]:
        return list(range(len(self.capabilities))) if kind == "GPU" else []

    def list_logical_devices(self, kind: str) -> list[Any]:
        return [SimpleNamespace(name=f"/device:{kind}:{gpu}") for gpu in self.list_physical_devices(kind)]


def test_gpus_share_a_batch_that_they_divide_and_grow_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    gpus = Gpus([(9, 0)] * 3)
    monkeypatch.setattr(tf, "config", gpus)
    assert devices_of(experiment(train__devices="one").train) == ()
    assert gpus.grown == [0, 1, 2]
    names = devices_of(experiment(train__devices="all", train__batch_size=18).train)
    assert names == ("/device:GPU:0", "/device:GPU:1", "/device:GPU:2")
    require_equal_parts(names, batch_size=18, valid_images=3)
    for batch_size, valid_images in ((16, 30), (18, 2)):
        received = rf"the 3 devices.*Received: batches of {batch_size}, {valid_images} validation images"
        with pytest.raises(TrainingError, match=received):
            require_equal_parts(names, batch_size=batch_size, valid_images=valid_images)


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [([(8, 0), (9, 0)], "bfloat16"), ([(7, 5)], "float32"), ([(9, 0), (7, 0)], "float32")],
)
def test_auto_precision_follows_the_gpus_where_there_are_some(
    capabilities: list[tuple[int, int]], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow as tf

    monkeypatch.setattr(tf, "config", Gpus(capabilities))
    assert resolve_precision("auto") == precision
