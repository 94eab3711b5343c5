"""What is on the disk before a name stands for it: a kill shows nothing of this, a power cut would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cv_platform.datasets.durable import MANY_FILES, whole_directory, whole_file


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Receives the names that are synced and renamed, in order."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(handle: int) -> None:
        seen.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name.partition('.partial')[0].strip('.')}")
        fsync(handle)

    def replaced(self: Path, target: Path) -> Path:
        seen.append(f"name {target.name}")
        return replace(self, target)

    def renamed(self: Path, target: Path) -> Path:
        seen.append(f"name {target.name}" if ".stale" not in target.name else "aside")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "sync", lambda: seen.append("sync everything"))
    monkeypatch.setattr(Path, "replace", replaced)
    monkeypatch.setattr(Path, "rename", renamed)
    return seen


@pytest.mark.parametrize("suffix", ["", ".weights.h5"])
def test_a_file_is_on_the_disk_before_its_name(tmp_path: Path, events: list[str], suffix: str) -> None:
    with whole_file(tmp_path / "a.weights.h5", suffix=suffix) as partial:
        assert partial.name.endswith(".weights.h5") == bool(suffix)
        partial.write_text("x")
    assert events == ["sync a.weights.h5", "name a.weights.h5", f"sync {tmp_path.name}"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.weights.h5"]


def test_a_file_that_could_not_be_written_leaves_its_predecessor(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a.json") as partial:
        partial.write_text(str(1 / 0))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "before")]


def test_all_of_a_folder_is_on_the_disk_before_its_predecessor_goes(tmp_path: Path, events: list[str]) -> None:
    for _ in range(2):
        events.clear()
        with whole_directory(tmp_path / "v1") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "b.txt").write_text("b")
            (folder / "a.txt").write_text("a")
    assert sorted(events[:4]) == ["sync a.txt", "sync b.txt", "sync sub", "sync v1"]
    assert events[4:] == ["aside", "name v1", f"sync {tmp_path.name}"]


def test_many_files_are_synced_at_once(tmp_path: Path, events: list[str]) -> None:
    with whole_directory(tmp_path / "v1") as folder:
        for number in range(MANY_FILES + 1):
            (folder / str(number)).touch()
    assert events == ["sync everything", "name v1", f"sync {tmp_path.name}"]
