"""Training by several processes; outside of `make test`, as each of them loads TensorFlow."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.ray_nodes import ray_nodes
from cv_platform.compute.ray_engine import RayEngine
from cv_platform.config import ExperimentConfig
from cv_platform.datasets.packing import open_split
from cv_platform.errors import ConfigError, TrainingError
from cv_platform.records import PackedImages
from cv_platform.training.callbacks import read_state
from cv_platform.training.fitting import fit_model
from cv_platform.training.together import TO_START, Member, _free_ports, _place, train_together
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


def cluster_of(engine: str) -> Any:
    """Returns what enters Ray's `Cluster` of two nodes, or None without Ray."""
    return contextlib.nullcontext() if engine == "local" else ray_nodes(2)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["local", "ray", "ray, a node"])
def test_two_processes_train_as_one_does_although_one_of_them_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, engine: str
) -> None:
    config = experiment(train__epochs=EPOCHS, train__workers=2, train__augment={}, model__dropout=0.0)
    packed = pack_tiny(tmp_path, config)
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    with caplog.at_level(logging.WARNING), cluster_of(engine) as cluster, ThreadPoolExecutor(1) as pool:
        by = None if engine == "local" else RayEngine(str(cluster.address))
        training = pool.submit(train_together, packed, config, together, engine=by)
        wait_until(lambda: training.done() or read_state(together) is not None, seconds=800)
        if engine == "ray, a node":
            (node,) = cluster.worker_nodes
            cluster.remove_node(node, allow_graceful=False)
            wait_until(lambda: training.done() or any("; all go on from epoch" in line for line in caplog.messages))
            cluster.add_node(num_cpus=1)  # They wait for it, as each has to have a core.
        else:
            victim = member()
            assert victim is not None
            victim.kill()
        training.result()
    (line,) = (line for line in caplog.messages if "; all go on from epoch" in line)
    if engine != "ray, a node":  # Of which the other process may know before Ray does.
        assert ("was ended by SIGKILL" if engine == "local" else "was ended, or its node") in line
    assert 2 <= int(line.split()[-1]) <= EPOCHS

    require_same_losses(packed, config, alone, together)


def require_same_losses(packed: PackedImages, config: ExperimentConfig, alone: Path, together: Path) -> None:
    """Trains by one process, and compares its losses with those of several, which are in `together`."""
    splits = open_split(packed, "train"), open_split(packed, "valid")
    one, two = fit_model(config, *splits, folder=alone), fit_model(config, *splits, folder=together)
    assert len(two.history["loss"]) == EPOCHS
    for name in ("loss", "val_loss", "accuracy"):
        np.testing.assert_allclose(two.history[name], one.history[name], rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_processes_that_are_started_by_hand_train_together_and_go_on_after_one_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(train__epochs=EPOCHS, train__workers=2, train__augment={}, model__dropout=0.0)
    packed = pack_tiny(tmp_path, config)
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    lead_by_hand(packed, config, together, monkeypatch, caplog, is_killed=True)
    done = read_state(together)
    assert done is not None
    assert 1 <= done.epochs_done < EPOCHS
    lead_by_hand(packed, config, together, monkeypatch, caplog, is_killed=False)
    require_same_losses(packed, config, alone, together)


def lead_by_hand(
    packed: PackedImages,
    config: ExperimentConfig,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    *,
    is_killed: bool,
) -> None:
    """Trains as the first of two, and types the command that it names for the second."""
    caplog.clear()
    workers = [f"127.0.0.1:{port}" for port in _free_ports(2)]
    with (
        monkeypatch.context() as context,
        caplog.at_level(logging.INFO),
        ThreadPoolExecutor(1) as pool,
    ):
        context.setenv("TF_CONFIG", _place(0, workers))
        first = pool.submit(train_together, packed, config, folder)
        wait_until(lambda: first.done() or any(line.startswith(TO_START) for line in caplog.messages))
        (line,) = (line for line in caplog.messages if line.startswith(TO_START))
        address, _, command = line.removeprefix(TO_START).partition(": ")
        assert address == workers[1]
        with subprocess.Popen(command, shell=True, start_new_session=True) as second:
            if is_killed:
                wait_until(lambda: read_state(folder) is not None, seconds=800)
                os.killpg(second.pid, signal.SIGKILL)
                with pytest.raises(TrainingError, match=r"whole epochs are kept: start all again"):
                    first.result()
            else:
                first.result()
                assert second.wait() == 0


@pytest.mark.parametrize(
    ("given", "received"),
    [
        ("{", r"to be such as .* Received: \{\."),
        (_place(0, ["one:1"]), "Received: 1 workers, index 0"),
        (_place(1, ["one:1", "two:1"]), "Received: 2 workers, index 1"),
    ],
)
def test_who_is_not_named_as_the_first_of_all_workers_starts_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, received: str
) -> None:
    monkeypatch.setenv("TF_CONFIG", given)
    config = experiment(train__workers=2)
    with pytest.raises(TrainingError, match=received):
        train_together(pack_tiny(tmp_path, config), config, tmp_path)


@pytest.mark.ray
def test_a_process_that_is_given_no_place_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(TrainingError, match="Expected TF_CONFIG to name all workers"):
        Member.join()
