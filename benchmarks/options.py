"""What a person may choose about a run of the benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

UPLOADS = ("photos", "digits")
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
    """Of image order, augmentation and bootstrap."""
    sets: tuple[str, ...]
    """Image sets to train on (training); none: all."""
    parts: tuple[str, ...]
    """What to measure (data-speed, input-pipeline, scale, stages); none: all."""
    budget: float | None
    """CPU seconds that a training may take (training); None: as each set has it."""
    images: tuple[int, ...]
    """Training images, for a learning curve (training); how many are searched (near-copies), or few and many (memory of
    data-speed) and how many are made again; none: as each has it."""
    rows: int | None
    """Rows of the larger request log (log-rows); None: ten million."""
    config: Path | None
    """A config instead of each set's (training)."""
    say: Callable[[str], None]


def default_output() -> Path:
    """Returns where reports go when nobody says: below an installation that was named, else in `build/`."""
    home = os.environ.get("CV_HOME")
    return Path(home).expanduser() / "benchmarks" if home else REPOSITORY / "build" / "benchmarks"
