"""`cv-platform score`: what a published model says of the images of a folder, an archive or a URL, as Parquet."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cv_platform.compute import open_engine
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage


def add_command(command: Callable[[str, object, str], argparse.ArgumentParser]) -> None:
    """Adds the command; `command` makes one of its name, function and description."""
    score = command("score", _score, "answer all images of a folder, an archive or a URL by a published model")
    score.add_argument("source", help="a folder, a tar or zip, or a URL such as s3://bucket/prefix")
    score.add_argument("--model", required=True, metavar="VERSION", help="such as 20260131T060000Z-1f3c9a2e")
    score.add_argument(
        "--output", required=True, type=Path, help="a Parquet file; a scoring that was killed goes on where it was"
    )
    score.add_argument(
        "--heat-maps", action="store_true", help="each row has its heat-map (Grad-CAM) over the image, a JPEG of 256 px"
    )
    score.add_argument(
        "--report",
        type=Path,
        metavar="PAGE",
        help="an HTML file: whether the images look like those that the model was tested on, and what moved",
    )


def _score(options: argparse.Namespace) -> int:
    from cv_platform.scoring.score import score_images

    settings = Settings.from_environment()
    engine = open_engine(settings)
    source, version, output = options.source, options.model, options.output
    scored = score_images(source, version, output, settings=settings, engine=engine, heat_maps=options.heat_maps)
    print(scored.line())
    if options.report is not None:
        _report(options, settings)
    return 0


def _report(options: argparse.Namespace, settings: Settings) -> None:
    import pyarrow.parquet as pq

    from cv_platform.config import MonitorConfig
    from cv_platform.monitoring.scored import ScoredImages, report_on_scores
    from cv_platform.monitoring.sentences import drift_summary
    from cv_platform.predictions import MODEL_NAME
    from cv_platform.records import ModelIdentity

    name = (pq.read_schema(options.output).metadata or {})[MODEL_NAME.encode()].decode()
    cache = settings.home / "cache"
    report = report_on_scores(
        ScoredImages(
            ModelIdentity(model_name=name, version=options.model), options.source, options.output, cache / "unlabelled"
        ),
        MonitorConfig(),
        options.report.absolute(),
        experiment=name,
        storage=CentralStorage(settings.storage_url),
        cache=cache,
        now=datetime.now(UTC),
    )
    print(drift_summary(report))
