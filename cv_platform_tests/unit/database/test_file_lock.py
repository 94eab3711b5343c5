"""Locks between holders; each `open_lock` is a holder of its own, in one process as in several."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cv_platform.database.file_lock import exclusive, open_lock, try_lock
from cv_platform.errors import ServiceError


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
        pytest.raises(ServiceError, match="another process holds it"),
        exclusive(tmp_path / "lock", timeout_seconds=0.1),
    ):
        pytest.fail("It must not get here.")


def test_the_lock_is_free_after_the_block(tmp_path: Path, holder: Callable[[], int]) -> None:
    with exclusive(tmp_path / "lock", timeout_seconds=1):
        assert not try_lock(holder(), shared=True)
    assert try_lock(holder())
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600
