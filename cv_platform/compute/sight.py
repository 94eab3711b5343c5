"""Who sees a folder of this process: another machine may have none at its path, or one of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Each process that works on shards imports this module.
    from cv_platform.compute.engine import Engine

_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Proof:
    """A file of a folder, by its size and its last bytes: whoever finds it there sees the folder that is meant."""

    path: str
    size: int
    tail: bytes

    @classmethod
    def of(cls, path: Path) -> Proof:
        """Returns a file as it is now.

        Raises:
            OSError: it cannot be read.
        """
        return cls(str(path), *_ending(str(path)))

    def holds(self) -> bool:
        """Tells whether this process sees that file."""
        try:
            return _ending(self.path) == (self.size, self.tail)
        except OSError:
            return False


def blind_machines(engine: Engine | None, proof: Proof) -> list[str]:
    """Returns the names of the machines that work on an engine's shards and do not see a file, each asked once.

    Raises:
        ComputeError: one cannot be asked.
    """
    return sorted(name for name, sees in engine.ask(proof.holds).items() if not sees) if engine else []


def _ending(path: str) -> tuple[int, bytes]:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # As in `datasets.origins`.
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        return size, file.read(_TAIL_BYTES)
