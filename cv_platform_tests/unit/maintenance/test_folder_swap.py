"""One folder takes another's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.maintenance import folder_swap
from cv_platform.maintenance.folder_swap import replace_folder


def made(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("can_exchange", [True, False])
def test_the_new_folder_takes_the_place_and_the_old_one_is_kept(
    tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(folder_swap, "_exchange", lambda one, other: False)
    new, current = made(tmp_path / "new", "new"), made(tmp_path / "current", "old")
    replace_folder(new, current, aside=tmp_path / "aside")
    assert (current / "file").read_text() == "new"
    assert (tmp_path / "aside" / "file").read_text() == "old"
    assert not new.exists()


def test_nothing_and_an_empty_folder_give_way(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nothing"):
        replace_folder(made(tmp_path / "new", name), tmp_path / name, aside=tmp_path / "aside")
        assert (tmp_path / name / "file").read_text() == name
    assert not (tmp_path / "aside").exists()


def test_a_failure_leaves_both_where_they_were(tmp_path: Path) -> None:
    new, current = made(tmp_path / "new", "new"), made(tmp_path / "current", "old")
    made(tmp_path / "aside", "taken")
    with pytest.raises(OSError, match="not empty"):
        replace_folder(new, current, aside=tmp_path / "aside")
    assert [(path / "file").read_text() for path in (new, current)] == ["new", "old"]
