from __future__ import annotations

import os
import pickle
from functools import partial
from pathlib import Path

import pytest

from cv_platform.compute import map_shards
from cv_platform.compute.carried import CarriedFile
from cv_platform.compute.local import LocalEngine
from cv_platform.errors import ComputeError
from cv_platform.settings import home_here
from cv_platform_tests.support.elsewhere import Apart

from .tasks import carried_bytes, shards

NOBODY = 65534


def test_only_another_machine_gets_the_bytes(tmp_path: Path) -> None:
    file = tmp_path / "here" / "network"
    file.parent.mkdir()
    file.write_bytes(bytes(1000))
    function = partial(carried_bytes, CarriedFile.of(file))
    for engine, expected in ((LocalEngine(1, worth_seconds=0), None), (Apart(file.parent), 1000)):
        done = map_shards(function, shards(1), engine=engine, title="Looking", total=2)
        assert [carried for _, carried in done] == [expected]


def test_the_file_at_its_path_is_taken_if_it_has_the_same_content(tmp_path: Path) -> None:
    file = tmp_path / "network"
    file.write_bytes(b"the one")
    sent = pickle.dumps(CarriedFile.of(file))
    os.utime(file, ns=(0, 0))
    with pickle.loads(sent).open_path() as path:
        assert path == file
    file.write_bytes(b"another")
    os.utime(file, ns=(0, 0))
    with pickle.loads(sent).open_path() as path:
        assert (path.name, path.read_bytes()) == ("network", b"the one")


def test_a_path_below_what_is_no_folder_is_not_seen(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    file = tmp_path / "here" / "network"
    file.write_bytes(b"the one")
    sent = pickle.dumps(CarriedFile.of(file))
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("no folder")
    with pickle.loads(sent).open_path() as path:
        assert path.read_bytes() == b"the one"


def test_another_users_folder_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "closed" / "home" / "network"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"the one")
    monkeypatch.setenv("CV_HOME", str(tmp_path / "own"))
    user = os.geteuid()
    (tmp_path / "closed").chmod(0)
    try:
        if user == 0:  # Whom no rights of a folder keep out.
            try:
                os.seteuid(NOBODY)
            except OSError as err:
                pytest.skip(f"root may not become another user here: {err}")
        assert CarriedFile.of(file) == CarriedFile(file, "")
        assert home_here(file.parent) == tmp_path / "own"
    finally:
        os.seteuid(user)
        (tmp_path / "closed").chmod(0o700)


def test_a_file_that_somebody_replaces_meanwhile_is_not_sent(tmp_path: Path) -> None:
    file = tmp_path / "network"
    file.write_bytes(b"the one")
    carried = CarriedFile.of(file)
    file.write_bytes(b"another")
    with pytest.raises(ComputeError, match="as it was when the work began"):
        pickle.dumps(carried)
