"""What a person may choose about a run of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

UPLOADS = ("photos", "digits")
PHASES = "abcdefg"
"""Of the soak, in their order."""
STACK_PHASES = ("up", "digits", "predict", "monitoring", "scans", "kills", "roll", "tls", "reboot", "restore")
"""Of the stack's proof, in their order: those that are played when none is named."""
STACK_EXTRA_PHASES = ("processes", "containers")
"""Also of the stack's proof, when they are named: each takes five minutes."""
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
    phases: Sequence[str]
    """Of the soak or of the stack, to play."""
    keep: bool
    """Whether the stack that was proven goes on running."""
    say: Callable[[str], None]
