"""`cv-platform score`: what a published model says of the images of a folder, an archive or a URL, as Parquet."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from cv_platform.compute import open_engine
from cv_platform.settings import Settings


def add_command(command: Callable[[str, object, str], argparse.ArgumentParser]) -> None:
    """Adds the command; `command` makes one of its name, function and description."""
    score = command("score", _score, "answer all images of a folder, an archive or a URL by a published model")
    score.add_argument("source", help="a folder, a tar or zip, or a URL such as s3://bucket/prefix")
    score.add_argument("--model", required=True, metavar="VERSION", help="such as 20260131T060000Z-1f3c9a2e")
    score.add_argument(
        "--output", required=True, type=Path, help="a Parquet file; a scoring that was killed goes on where it was"
    )


def _score(options: argparse.Namespace) -> int:
    from cv_platform.scoring.score import score_images

    settings = Settings.from_environment()
    engine = open_engine(settings)
    print(score_images(options.source, options.model, options.output, settings=settings, engine=engine).line())
    return 0
