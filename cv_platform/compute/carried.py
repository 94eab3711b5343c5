"""A file that goes along with the work, so that who gets it needs to see no folder of who gives it out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import override


@dataclass(frozen=True)
class CarriedFile:
    """A file of some megabytes, such as a network, by its path and when it was changed last; pickle takes its bytes.

    Attributes:
        path: where it is, or was, for who gives out the work.
        stamp: its time of change, in nanoseconds; 0: it is not there.
        content: its bytes, for who gets the work.
    """

    path: Path
    stamp: int
    content: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, path: Path) -> CarriedFile:
        """Returns the file at a path as it is now."""
        try:
            return cls(path, path.stat().st_mtime_ns)
        except FileNotFoundError:
            return cls(path, 0)

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        content = self.path.read_bytes() if self.content is None else self.content
        return CarriedFile, (self.path, self.stamp, content)

    @contextmanager
    def open_path(self) -> Iterator[Path]:
        """Yields a path at which the file can be read, under its own name."""
        if self.content is None:
            yield self.path
            return
        with TemporaryDirectory() as folder:
            written = Path(folder) / self.path.name
            written.write_bytes(self.content)
            yield written
