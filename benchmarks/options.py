"""What a person may choose about a run of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

UPLOADS = ("photos", "digits")
PHASES = "abcdefg"
"""Of the soak, in their order."""
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Options:
    """The choices that all benchmarks share."""

    output: Path
    """Folder of the JSON reports."""
    rounds: int
    archive: Path | None
    """Images to use instead of the built-in digits (training input): what `cv-platform import-dataset` takes."""
    home: Path | None
    """An installation with a deployed model to serve (predict); None: a temporary one is built by the graph."""
    uploads: str
    """What is sent to the servers (predict): crops of scikit-learn's photographs, or its digits, enlarged."""
    seed: int
    """Of image order, augmentation, bootstrap and hostile uploads."""
    scale: float
    """Share of the soak's requests, swaps, outages and uploads; 1 is what it promises."""
    phases: str
    """Letters of the soak's phases to play."""
    say: Callable[[str], None]
