"""What is on the disk before a name stands for it (a kill shows nothing of this, a power cut would), and locks.

Each `open_lock` is a holder of its own, in one process as in several.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cv_platform.errors import LockHeldError
from cv_platform.files import (
    MANY_FILES,
    exclusive,
    file_sha256,
    is_locked,
    open_lock,
    try_lock,
    whole_directory,
    whole_file,
    write_file,
)


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


def test_a_private_file_is_never_open_to_others(tmp_path: Path) -> None:
    secret = tmp_path / "new" / "secret"
    with whole_file(secret, is_private=True) as partial:
        assert partial.stat().st_mode & 0o777 == 0o600, "before anything is in it"
    write_file(secret, "grün", is_private=True)
    assert (secret.read_text(encoding="utf-8"), secret.stat().st_mode & 0o777) == ("grün", 0o600)


def test_a_file_is_known_by_its_sha256(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[[], int]]:
    handles: list[int] = []

    def make() -> int:
        handles.append(open_lock(tmp_path / "lock"))
        return handles[-1]

    yield make
    for handle in handles:
        os.close(handle)


def test_many_share_and_only_the_last_gets_it_alone(holder: Callable[[], int]) -> None:
    first, second = holder(), holder()
    assert try_lock(first, shared=True)
    assert try_lock(second, shared=True)
    assert not try_lock(first)
    os.close(os.dup(second))  # Closing a copy drops nothing: the lock belongs to the open file.
    assert not try_lock(holder())


def test_waiting_for_a_held_lock_is_bounded(tmp_path: Path, holder: Callable[[], int]) -> None:
    assert try_lock(holder(), shared=True)
    with (
        pytest.raises(LockHeldError, match="another process holds it"),
        exclusive(tmp_path / "lock", timeout_seconds=0.1),
    ):
        pytest.fail("It must not get here.")


def test_the_lock_is_free_after_the_block(tmp_path: Path, holder: Callable[[], int]) -> None:
    with exclusive(tmp_path / "lock", timeout_seconds=1):
        assert not try_lock(holder(), shared=True)
    assert try_lock(holder())
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


def test_a_lock_tells_whether_it_is_held(tmp_path: Path, holder: Callable[[], int]) -> None:
    assert not is_locked(tmp_path / "lock"), "no such file"
    assert try_lock(holder(), shared=True)
    assert is_locked(tmp_path / "lock")


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from cv_platform.files import exclusive
with exclusive(Path({str(tmp_path / "lock")!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode < 0
    with exclusive(tmp_path / "lock", timeout_seconds=0):
        pass


def test_who_may_only_read_a_lock_file_can_lock_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuse_writing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError
        return opened(path, flags, mode)

    (tmp_path / "lock").touch()
    monkeypatch.setattr(os, "open", refuse_writing)
    with exclusive(tmp_path / "lock", timeout_seconds=0):
        assert is_locked(tmp_path / "lock")
