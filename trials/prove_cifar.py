"""`python -m trials.prove_cifar ARCHIVE`: the graph on other images than the digits, by config alone.

Imports an archive of CIFAR-10 images with `cv-platform import-dataset` into a fresh installation and runs the demo on
configs/examples/cifar10.yaml: training, evaluation against its gate, served predictions, request log, drift verdicts on
shifted and unshifted images. Ends with 0 only if every statement of the demo's summary holds. The installation is made
in `build/`, or in `$CV_HOME` where that is set, and stays for looking at.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import Stopwatch, machine_line
from benchmarks.options import REPOSITORY
from cv_platform.config import load_experiment
from cv_platform.errors import CvPlatformError, DatasetError
from cv_platform.settings import Settings, prepare_process

CONFIG = REPOSITORY / "configs" / "examples" / "cifar10.yaml"
LIBRARIES = ("tensorflow", "keras", "dagster", "bentoml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the proof and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m trials.prove_cifar", description=__doc__)
    parser.add_argument("archive", type=Path, help=".tar.gz or .zip with train/<class>/ and test/<class>/ folders")
    archive: Path = parser.parse_args(arguments).archive.absolute()
    prepare_process()
    try:
        return prove(archive, proof_settings(os.environ, datetime.now(UTC)), lambda line: print(line, flush=True))
    except CvPlatformError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1


def proof_settings(environ: Mapping[str, str], now: datetime) -> Settings:
    """Returns the settings of the proof: `$CV_HOME`, or a folder of its own in `build/`; always the CIFAR-10 config."""
    fresh = str(REPOSITORY / "build" / f"prove-cifar-{now:%Y%m%dT%H%M%SZ}")
    return Settings.from_environment({**environ, "CV_HOME": environ.get("CV_HOME") or fresh, "CV_CONFIGS": str(CONFIG)})


def prove(archive: Path, settings: Settings, say: Callable[[str], None]) -> int:
    """Imports `archive` and runs the demo on it; returns the demo's exit status.

    Raises:
        DatasetError: the archive could not be imported.
        CvPlatformError: a stage of the demo could not run at all.
    """
    from cv_platform.demo import run_demo

    clock = Stopwatch()
    dataset = load_experiment(CONFIG).dataset
    say(f"importing {archive.name} into {settings.home} …")
    if import_archive(archive, dataset.ds_name, dataset.dvc_tag, settings) != 0:
        raise DatasetError(f"Expected `cv-platform import-dataset` to import {archive}. Received: its error above.")
    status = run_demo(settings, say)
    say(f"prove-cifar: {'proved' if status == 0 else 'NOT proved'} in {clock.seconds:.0f} s; {machine_line(LIBRARIES)}")
    say(f"To look at it: CV_HOME={settings.home} CV_CONFIGS={CONFIG} make up")
    return status


def import_archive(archive: Path, ds_name: str, tag: str, settings: Settings) -> int:
    """Imports an archive or a folder by the command, and returns its exit status."""
    command = [sys.executable, "-m", "cv_platform.cli", "import-dataset", str(archive), "--name", ds_name, "--tag", tag]
    environment = {**os.environ, "CV_HOME": str(settings.home)}
    return subprocess.run(command, env=environment, cwd=REPOSITORY, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
