"""A training by processes of Ray's of which one is on a machine that does not see the training's folder."""

from __future__ import annotations

import contextlib
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from cv_platform.compute.ray_engine import RayEngine
from cv_platform.datasets.packing import published_in
from cv_platform.datasets.shards.sharing import publish_pack
from cv_platform.errors import ComputeError, TrainingError
from cv_platform.records import PackedImages
from cv_platform.training.callbacks import read_state
from cv_platform.training.together import TASK, train_together
from cv_platform_tests.support.blind_node import blind_cluster
from cv_platform_tests.support.tiny_training import experiment, pack_tiny
from cv_platform_tests.support.waiting import wait_until

EPOCHS = 12
RELATIVE = 1e-4
"""Between weights, and of 1: sums of float32 in another order, through 36 steps."""


def publish(packed: PackedImages, storage: str) -> None:
    files = [path.name for path in packed.directory.iterdir() if path.name not in {"verified.json", "published.json"}]
    publish_pack(packed.directory, files, storage)
    assert published_in(packed.directory) == storage


def blind_members() -> list[psutil.Process]:
    """Returns the processes of the training that are in another mount namespace than this one."""
    found, here = list[psutil.Process](), Path("/proc/self/ns/mnt").readlink()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if "_Member" in " ".join(process.cmdline()) and Path(f"/proc/{process.pid}/ns/mnt").readlink() != here:
                found.append(process)
    return found


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != TASK)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_machine_that_does_not_see_the_folder_trains_to_the_same_weights_and_may_die(
    tmp_path: Path, s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = experiment(train__epochs=EPOCHS, train__workers=2, train__augment={}, model__dropout=0.0)
    hidden, seen, node_home = tmp_path / "hidden", tmp_path / "seen", tmp_path / "node"
    work = hidden / "work"
    work.mkdir(parents=True)
    seen.mkdir()
    packed = pack_tiny(hidden, config)
    with blind_cluster(hidden, node_home, seeing=1) as engine:
        refused = rf"Expected {work} on each node, .* none on \S+ \(\w+\)\. Put CV_HOME .* or set CV_SHARE_PACKS=1"
        with pytest.raises(ComputeError, match=refused):
            train_together(packed, config, work, engine=engine)
        publish(packed, str(hidden / "storage"))
        with pytest.raises(ComputeError, match=rf"Expected {work} .* Nor do all .*shared\.json is not there\. Set CV_"):
            train_together(packed, config, work, engine=engine)
        publish(packed, s3_url)

        with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool:
            training = pool.submit(train_together, packed, config, work, engine=engine)
            wait_until(lambda: training.done() or blind_members(), seconds=800)
            (victim,) = blind_members()
            wait_until(lambda: training.done() or read_state(work) is not None, seconds=800)
            victim.kill()
            training.result()
        (line,) = (line for line in caplog.messages if "; all go on from epoch" in line)
        assert "was ended, or its node" in line
        assert 2 <= int(line.split()[-1]) <= EPOCHS
        left = {path.relative_to(node_home).parts[0]: path for path in node_home.glob("*/*") if path.is_dir()}
        assert set(left) == {"packed", "models"}, "pixels, which others take, too"
        assert {path.suffix for path in left["models"].iterdir()} == {".lock"}

        shutil.copytree(packed.directory, tmp_path / "packed" / packed.directory.name)
        visible = packed.model_copy(update={"directory": tmp_path / "packed" / packed.directory.name})
        train_together(visible, config, seen, engine=engine)
        require_same(work, seen)

        fails(packed, work, engine)


def require_same(work: Path, seen: Path) -> None:
    """Compares what two trainings have left."""
    assert files_of(work) == files_of(seen)
    one, other = read_state(work), read_state(seen)
    assert one is not None
    assert other is not None
    assert one.epochs_done == EPOCHS
    with np.load(work / one.last_weights) as mine, np.load(seen / other.last_weights) as theirs:
        assert set(mine.files) == set(theirs.files)
        for name in mine.files:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=RELATIVE, atol=RELATIVE)


def fails(packed: PackedImages, work: Path, engine: RayEngine) -> None:
    """Has a member find something wrong, in a file that goes along."""
    wrong = work / "wrong.weights.h5"
    wrong.write_bytes(b"no weights")
    config = experiment(train__epochs=1, train__workers=2, model__weights=str(wrong))
    with pytest.raises(TrainingError, match=r"model\.weights: expected weights of .* Received: \S+/wrong\.weights\.h5"):
        train_together(packed, config, work, engine=engine)
