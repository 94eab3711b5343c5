"""`cv-platform score`: what a published model says of the images of a folder, an archive or a URL, as Parquet."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cv_platform.compute import open_engine
from cv_platform.errors import ConfigError
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
    from cv_platform.scoring.score import published_metadata, score_images

    for path in filter(None, (options.output, options.report)):
        if path.is_dir():
            raise ConfigError(f"Expected a file to write to. Received: {path}, which is a folder. Name a file in it.")
    settings = Settings.from_environment()
    storage, cache = CentralStorage(settings.storage_url), settings.home / "cache"
    metadata = published_metadata(storage, options.model)
    if options.report is not None:
        from cv_platform.monitoring.scored import comparable_reference

        comparable_reference(storage, metadata, cache)  # Before hours of work: what the report cannot do without.
    engine = open_engine(settings)
    scored = score_images(
        options.source,
        options.model,
        options.output,
        settings=settings,
        engine=engine,
        heat_maps=options.heat_maps,
    )
    print(scored.line())
    if options.report is not None:
        print(_report(options, storage, metadata.model_name, cache))
    return 0


def _report(options: argparse.Namespace, storage: CentralStorage, model_name: str, cache: Path) -> str:
    """Writes the page of what has been scored, and returns what it says."""
    from cv_platform.config import MonitorConfig
    from cv_platform.monitoring.scored import ScoredImages, report_on_scores
    from cv_platform.monitoring.sentences import drift_summary
    from cv_platform.records import ModelIdentity
    from cv_platform.scoring.sources import reader_of

    model = ModelIdentity(model_name=model_name, version=options.model)
    report = report_on_scores(
        ScoredImages(model, options.source, options.output, reader_of(options.source)),
        MonitorConfig(),
        options.report.absolute(),
        experiment=model_name,
        storage=storage,
        cache=cache,
        now=datetime.now(UTC),
    )
    return " ".join([drift_summary(report), *report.problems])
