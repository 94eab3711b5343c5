"""What goes along to a machine that does not see a training's folder, and the epochs that come back."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from cv_platform.datasets.packing import open_split
from cv_platform.datasets.shards.sharing import publish_pack
from cv_platform.files import file_sha256
from cv_platform.records import PackedImages
from cv_platform.training import callbacks, travelling
from cv_platform.training.callbacks import Epoch, read_state
from cv_platform.training.fitting import fit_share
from cv_platform.training.together import Member
from cv_platform.training.travelling import Luggage, receive_epoch
from cv_platform_tests.support.tiny_training import experiment, pack_tiny


def contents(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reported(tiny_packed: PackedImages, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Epoch, dict[str, str]]]:
    """Each epoch that a process reports which trains alone, with what its folder has then."""
    import tensorflow as tf

    folder, reported = tmp_path_factory.mktemp("there"), list[tuple[Epoch, dict[str, str]]]()
    alone = Member(
        0, 1, tf.distribute.OneDeviceStrategy("/cpu:0"), lambda epoch: reported.append((epoch, contents(folder)))
    )
    splits = open_split(tiny_packed, "train"), open_split(tiny_packed, "valid")
    fit_share(experiment(train__epochs=4), *splits, folder=folder, member=alone)
    return reported


def test_epochs_that_come_back_are_kept_as_where_they_are_trained(
    reported: list[tuple[Epoch, dict[str, str]]], tmp_path: Path
) -> None:
    assert [epoch.state.epochs_done for epoch, _ in reported] == [1, 2, 3, 4]
    for epoch, there in reported:
        receive_epoch(tmp_path, pickle.loads(pickle.dumps(epoch)))
        assert contents(tmp_path) == there
    assert not (tmp_path / "epoch-00001.json").exists(), "which is superseded"


class KilledError(BaseException):
    """Stands for the kill of a process."""


@pytest.mark.parametrize(
    ("owner", "name", "epochs"), [(travelling, "write_file", 2), (callbacks, "write_file", 2), (Path, "unlink", 3)]
)
def test_who_is_killed_while_an_epoch_comes_back_has_a_whole_one(
    reported: list[tuple[Epoch, dict[str, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    epochs: int,
) -> None:
    """Before its weights are there, before its record is, and before what it supersedes is gone."""
    for epoch, _ in reported[:2]:
        receive_epoch(tmp_path, epoch)

    def die(path: Path, *_: object, **__: object) -> None:
        if path.name.startswith("epoch-"):
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, die)
        with pytest.raises(KilledError):
            receive_epoch(tmp_path, reported[2][0])
    assert read_state(tmp_path) == reported[epochs - 1][0].state
    for epoch, _ in reported[epochs:]:
        receive_epoch(tmp_path, epoch)
    assert contents(tmp_path) == reported[-1][1]


def test_a_machine_that_sees_nothing_of_the_driver_s_begins_with_all_that_it_needs(
    reported: list[tuple[Epoch, dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, storage, node = tmp_path / "hidden", str(tmp_path / "storage"), tmp_path / "node"
    folder, weights = hidden / "work", hidden / "start.weights.h5"
    folder.mkdir(parents=True)
    weights.write_bytes(b"weights")
    for epoch, _ in reported:
        receive_epoch(folder, epoch)
    config = experiment(model__weights=str(weights))
    packed = pack_tiny(hidden, config)
    publish_pack(packed.directory, [path.name for path in packed.directory.iterdir()], storage)
    last = reported[-1][0].state
    needed = {name: sha256 for name, sha256 in contents(folder).items() if name in {*last.sha256, "epoch-00004.json"}}
    images = open_split(packed, "train").images[:]

    sent = pickle.dumps(Luggage.of(packed, storage, config, folder))
    shutil.rmtree(hidden)
    monkeypatch.setenv("CV_HOME", str(node))
    killed = pickle.loads(sent).unpacked(0)
    _, _, left = killed.__enter__()
    with pickle.loads(sent).unpacked(1):
        assert left.is_dir(), "while its process lives"
    shutil.copytree(left, left.with_name(left.name[:-1] + "2"))
    with pickle.loads(sent).unpacked(1) as (pixels, task, here):
        assert here.is_relative_to(node)
        assert contents(here) == needed
        assert read_state(here) == last
        assert Path(task.model.weights).read_bytes() == b"weights"
        assert pixels.directory.parent == node / "packed"
        assert (open_split(pixels, "train").images[:] == images).all()
        assert [path.name for path in here.parent.glob("*-2")] == [], "what a killed process has left"
    killed.__exit__(None, None, None)
    assert [path for path in here.parent.iterdir() if path.is_dir()] == []
