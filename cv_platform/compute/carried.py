"""A file that goes along with the work, so that who gets it needs to see no folder of who gives it out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from typing_extensions import override

from cv_platform.errors import ComputeError
from cv_platform.files import file_sha256

_in_place: ContextVar[bool] = ContextVar("_in_place", default=False)


@contextmanager
def files_in_place() -> Iterator[None]:
    """Has files that are pickled meanwhile go by their paths, to who sees what this process sees."""
    before = _in_place.set(True)
    try:
        yield
    finally:
        _in_place.reset(before)


@dataclass(frozen=True)
class CarriedFile:
    """A file of some megabytes, such as a network, by its path and content; pickle takes its bytes.

    Attributes:
        path: where it is, or was, for who gives out the work.
        sha256: of its content, in hex; empty: it is not there, or not for this process.
        content: its bytes, for who gets the work and may not see it; None: it lies at its path.

    Raises:
        ComputeError: (by pickle) it has another content by now.
    """

    path: Path
    sha256: str
    content: bytes | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, path: Path) -> CarriedFile:
        """Returns the file at a path as it is now."""
        try:
            return cls(path, file_sha256(path))
        except OSError:  # Such as that of another user, or below what is no folder here.
            return cls(path, "")

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        if _in_place.get():
            return CarriedFile, (self.path, self.sha256)
        content = self.path.read_bytes() if self.content is None else self.content
        if (received := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise ComputeError(
                f"Expected {self.path} as it was when the work began, with sha256 {self.sha256}. Received: {received}; "
                "somebody has replaced it. Begin again."
            )
        return CarriedFile, (self.path, self.sha256, content)

    @contextmanager
    def open_path(self) -> Iterator[Path]:
        """Yields a path at which the file can be read, under its own name: its own path, where it is seen there.

        What it refers to lies beside it there.
        """
        if self.content is None or CarriedFile.of(self.path) == self:
            yield self.path
            return
        with TemporaryDirectory() as folder:
            written = Path(folder) / self.path.name
            written.write_bytes(self.content)
            yield written
