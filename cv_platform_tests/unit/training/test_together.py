"""Training by several processes; outside of `make test`, as each of them loads TensorFlow."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.ray_nodes import ray_nodes
from cv_platform.compute.ray_engine import RayEngine
from cv_platform.datasets.packing import open_split
from cv_platform.errors import ConfigError, TrainingError
from cv_platform.training.callbacks import read_state
from cv_platform.training.fitting import fit_model
from cv_platform.training.together import Member, train_together
from cv_platform_tests.support.tiny_training import experiment, pack_tiny
from cv_platform_tests.support.waiting import wait_until

EPOCHS = 12
RELATIVE = 2e-3
"""Between losses: sums of float32 in another order, through 36 steps."""


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiple of train\.workers, .* Received: 16 for 3"):
        experiment(train__workers=3)


def member() -> psutil.Process | None:
    """Returns the second of the processes that train, this machine's or Ray's."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if '"index": 1' in process.environ().get("TF_CONFIG", "") or "_Member.work" in " ".join(process.cmdline()):
                return process
    return None


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_two_processes_train_as_one_does_although_one_of_them_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, engine: str
) -> None:
    config = experiment(train__epochs=EPOCHS, train__workers=2, train__augment={}, model__dropout=0.0)
    packed = pack_tiny(tmp_path, config)
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    killed: list[int] = []

    def kill_one() -> None:
        wait_until(lambda: read_state(together) is not None, seconds=800)
        if (victim := member()) is not None:
            victim.kill()
            killed.append(victim.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with caplog.at_level(logging.WARNING), ray_nodes(2) if engine == "ray" else contextlib.nullcontext() as cluster:
        train_together(packed, config, together, engine=None if cluster is None else RayEngine(str(cluster.address)))
    killer.join()
    assert killed
    (line,) = (line for line in caplog.messages if "; all go on from epoch" in line)
    assert ("was ended, or its node" if engine == "ray" else "was ended by SIGKILL") in line
    assert 2 <= int(line.split()[-1]) <= EPOCHS

    splits = open_split(packed, "train"), open_split(packed, "valid")
    one, two = fit_model(config, *splits, folder=alone), fit_model(config, *splits, folder=together)
    assert len(two.history["loss"]) == EPOCHS
    for name in ("loss", "val_loss", "accuracy"):
        np.testing.assert_allclose(two.history[name], one.history[name], rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.ray
def test_a_process_that_is_given_no_place_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(TrainingError, match="Expected TF_CONFIG to name all workers"):
        Member.join()
