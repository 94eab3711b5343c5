"""What a person may choose about a run of a trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SOAK_PHASES = tuple("abcdefg")
"""In their order."""
STACK_PHASES = ("up", "digits", "predict", "monitoring", "scans", "kills", "roll", "tls", "reboot", "restore")
"""In their order: those that are played when none is named."""
STACK_EXTRA_PHASES = ("processes", "ray", "jobs", "containers")
"""Also of the stack, when they are named: each takes five minutes."""


@dataclass(frozen=True)
class Options:
    """The choices that both trials share."""

    output: Path
    """Folder of the JSON reports."""
    seed: int
    """Of the hostile uploads."""
    scale: float
    """Share of the soak's requests, swaps, outages and uploads; 1 is what it promises."""
    phases: Sequence[str]
    keep: bool
    """Whether the stack that was proven goes on running."""
    say: Callable[[str], None]
