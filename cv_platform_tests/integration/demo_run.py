"""`make demo` run once, for every suite that needs an installation with a trained, deployed and monitored model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cv_platform.settings import Settings

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Demo:
    """What a run of the demo left."""

    status: int
    output: str
    home: Path
    config: Path
    settings: Settings

    def record(self, asset: str) -> dict[str, Any]:
        return json.loads((self.home / "records" / "digits" / f"{asset}.json").read_text())


def cli(variables: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a `cv-platform` command of the repository with these variables added to the environment.

    What MLflow has left there in this process is not: the command would log its runs somewhere else.
    """
    return subprocess.run(
        [sys.executable, "-m", "cv_platform.cli", *arguments],
        cwd=REPOSITORY,
        env={**{name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )


@contextmanager
def finished_demo() -> Iterator[Demo]:
    # Not below pytest's own folder, which is closed to the unprivileged user that runs PostgreSQL for root.
    folder = Path(tempfile.mkdtemp(prefix="cv-demo-"))
    folder.chmod(0o711)
    config = REPOSITORY / "configs" / "digits.yaml"
    variables = {"CV_HOME": str(folder / "home"), "CV_CONFIGS": str(config)}
    try:
        result = cli(variables, "demo")
        yield Demo(
            result.returncode,
            result.stdout + result.stderr,
            folder / "home",
            config,
            Settings.from_environment(variables),
        )
    finally:
        shutil.rmtree(folder)
