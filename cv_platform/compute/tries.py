"""What a process works on itself, noted in a folder, so that the next one knows of what it has died.

A shard that ends its process costs an engine one of its processes. One that works alone ends with the shard, and so
would each that begins anew. It therefore says in a file, which it holds locked, what it works on: a file that nobody
holds is of one that has died.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from cv_platform.compute.engine import S, Shard
from cv_platform.files import exclusive, is_locked

logger = logging.getLogger(__name__)

_KEPT_SECONDS = 30 * 86_400.0
"""After which a death is forgotten whose shard nobody has worked on since: its data may be gone."""


class Tries:
    """The notes of those who do one work.

    Args:
        folder: of the notes; None: nothing is noted.
        title: of the work.

    Attributes:
        left: the shard that `noted` has taken and left to others, if any.
    """

    def __init__(self, folder: Path | None, title: str) -> None:
        self._folder, self._title = folder, title
        self._deaths = self._find_deaths()
        self.left: list[Any] = []

    def _find_deaths(self) -> dict[str, list[Path]]:
        """Returns the notes of the dead by the names of the shards at which they have died, working alone."""
        deaths: dict[str, list[Path]] = {}
        for path in self._folder.glob(f"{escape(self._title)}.*") if self._folder else ():
            try:
                is_old = time.time() - path.stat().st_mtime > _KEPT_SECONDS
                if is_locked(path):
                    continue
                if is_old:
                    path.unlink()
                elif name := path.read_text(encoding="utf-8"):  # Nothing, of one who has not begun yet.
                    deaths.setdefault(name, []).append(path)
            except OSError:  # Somebody else has removed it meanwhile.
                continue
        return deaths

    @contextmanager
    def noted(self, shards: Iterable[S]) -> Iterator[Iterator[S]]:
        """Yields what yields the shards up to one at which somebody has died, and notes each before.

        That one is in `left`, all after it in `shards`. With the block the note goes.
        """
        with ExitStack() as until_then:
            path = self._note(until_then)
            yield self._noting(path, shards)

    def _noting(self, path: Path | None, shards: Iterable[S]) -> Iterator[S]:
        for shard in shards:  # Others go on with them: never `yield from`, by whose end they would be closed.
            if _told(shard) in self._deaths:
                what = "%s: a process that worked alone has died at %s: now others do it, and all that follow"
                logger.warning(what, self._title, shard.name)
                self.left = [shard]
                return
            if path is not None:
                with suppress(OSError):  # A full disk, say: the work need not write there.
                    path.write_text(_told(shard), encoding="utf-8")
            yield shard

    def _note(self, until_then: ExitStack) -> Path | None:
        """Makes a note and holds it, where there is a folder in which this process may write."""
        if self._folder is None:
            return None
        path = self._folder / f"{self._title}.{secrets.token_hex(4)}"
        try:
            until_then.enter_context(exclusive(path))
        except OSError as err:
            logger.warning("Expected to note in %s what is worked on. Received: %s. Correct its rights", path, err)
            with suppress(OSError):
                path.unlink()  # Where locks are refused, it has been made.
            return None
        until_then.callback(path.unlink, missing_ok=True)
        return path

    def survived(self, shard: Shard) -> None:
        """Forgets deaths at a shard that others have lived through: they had another reason."""
        for path in self._deaths.pop(_told(shard), ()) if self._deaths else ():
            path.unlink(missing_ok=True)


def _told(shard: Shard) -> str:
    """Returns what tells a shard from those of other data: its contents, where it has a name for them."""
    return str(getattr(shard, "contents", shard.name))
