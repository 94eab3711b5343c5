"""A storage that is away, and back once somebody has noticed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cv_platform.compute import engine
from cv_platform_tests.support.waiting import wait_until


@contextmanager
def away_for_a_moment(
    storage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Has a file in the place of a folder until the log says that something is tried again, which is at once then.

    Args:
        storage: the folder; made, if there is none.
        monkeypatch: shortens the waiting.
        caplog: is told of it.
    """
    monkeypatch.setattr(engine, "_WAITS_SECONDS", (0.1,) * 600)
    kept, link, file = (storage.with_name(f"{storage.name}-{name}") for name in ("kept", "link", "file"))
    if storage.is_dir():
        storage.rename(kept)
    kept.mkdir(exist_ok=True)
    link.symlink_to(kept)
    file.touch()
    file.rename(storage)

    ended = threading.Event()

    def come_back() -> None:
        wait_until(lambda: "is tried again in" in caplog.text or ended.is_set())
        link.rename(storage)  # In one step: in between, who looks would make a folder.

    returning = threading.Thread(target=come_back)
    returning.start()
    try:
        yield
    finally:
        ended.set()
        returning.join()
    assert "Not a directory" in caplog.text


@contextmanager
def away_from(
    step: str, of: ModuleType, storage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """Has a storage be away for a moment when a function of a module is first called."""
    do, is_first = getattr(of, step), iter([True])
    with ExitStack() as left:

        def lose(*arguments: Any, **options: Any) -> Any:
            if next(is_first, False):
                left.enter_context(away_for_a_moment(storage, monkeypatch, caplog))
            return do(*arguments, **options)

        monkeypatch.setattr(of, step, lose)
        yield
