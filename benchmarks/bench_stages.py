"""What one image costs in each stage that works on shards, and from it how long many images take many workers.

CPU seconds of who works on a shard (`worker`), of all shards but each process's first, which loads the network; and of
who gives the shards out and takes what is made (`driver`), by the difference of few images and many. Both have one core
here. The table that follows from them is a formula, and holds where the disk or the network keeps up.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa

from benchmarks.bench_scale import LIBRARIES, NETWORKS, PACKED_PX, SIDE_PX, write_photos
from benchmarks.harness import Report, Stopwatch, machine_line
from benchmarks.installation import isolated_environment, isolated_settings, quick_experiment, scratch_folder
from benchmarks.options import Options
from benchmarks.untrained import deploy_untrained
from cv_platform.compute import map_shards, rows
from cv_platform.compute.carried import CarriedFile
from cv_platform.compute.engine import Engine, Outcome
from cv_platform.compute.local import LocalEngine
from cv_platform.config import EncoderConfig
from cv_platform.datasets.embeddings import embed_images
from cv_platform.datasets.manifest import build_manifest
from cv_platform.datasets.origins import Origin
from cv_platform.datasets.packing import PackedSplit
from cv_platform.datasets.shards.pixels import PackForm
from cv_platform.datasets.shards.reading import ShardedImages
from cv_platform.datasets.shards.writing import Rows, Shard, write_shards
from cv_platform.datasets.splits import SPLITS
from cv_platform.deployment.replay import UploadShard, answer_uploads
from cv_platform.drift.detectors import extract_samples
from cv_platform.encoders.encoder import open_encoder
from cv_platform.errors import ConfigError
from cv_platform.evaluation.classifier import Classifier, answer_split
from cv_platform.files import file_sha256
from cv_platform.scoring.score import batch_size, score_images
from cv_platform.serving.model.runtime import PublishedModel
from cv_platform.settings import Settings

FEW, MANY = 512, 2048
"""Photographs of which a stage is done twice; of the many, each stage has at least two shards."""
WIDTH_PX, HEIGHT_PX = 640, 427
"""Of a photograph of about 110 KB."""
IMAGES, WORKERS = (1_000, 60_000, 1_000_000, 10_000_000), (1, 4, 32)
_UPLOADS = 32
"""In a shard of a replay."""

R = TypeVar("R")
Stage = Callable[["Counted", "_Photos"], None]
"""Does a stage of some photographs by an engine."""


class Counted:
    """A process of this machine that works on shards, and says what that has cost: an engine.

    Attributes:
        seconds: of CPU, of all shards but the first.
        images: of those shards.
        most: images of the largest shard.
    """

    workers, worth_seconds, notes = 1, 0.0, None

    def __init__(self) -> None:
        self.seconds, self.images, self.most, self._shards = 0.0, 0, 0, 0

    def ask(self, question: Callable[[], R]) -> dict[str, R]:
        """See `Engine.ask`."""
        return {}

    def run(
        self, function: Callable[..., Any], shards: Iterable[Any], *, in_order: bool
    ) -> Iterator[Outcome[Any, Any]]:
        """See `Engine.run`."""
        counted = functools.partial(_counted, function)
        for outcome in LocalEngine(1, worth_seconds=0).run(counted, shards, in_order=in_order):
            result, seconds = outcome.result
            if self._shards:
                self.seconds += seconds
                self.images += outcome.shard.images
            self._shards += 1
            self.most = max(self.most, outcome.shard.images)
            yield Outcome(outcome.shard, result)


def _counted(function: Callable[[Any], R], shard: Any) -> tuple[R, float]:
    before = time.process_time()
    result = function(shard)
    return result, time.process_time() - before


@dataclass(frozen=True)
class Cost:
    """CPU seconds of an image, and how many a shard has of so many in all."""

    worker: float
    driver: float
    per_shard: Callable[[int], int]

    def seconds(self, images: int, workers: int) -> float:
        """Returns how long so many workers take: as long as who has most to do, or as the driver if that is longer."""
        size = self.per_shard(images)
        most = min(images, math.ceil(math.ceil(images / size) / workers) * size)
        return max(most * self.worker, images * self.driver)


def run(options: Options) -> Report:
    """Measures each stage, and prints how long it takes by the formula."""
    clock = Stopwatch()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    costs: dict[str, Cost] = {}
    with scratch_folder("stages") as folder, mock.patch.object(rows, "WORTH_SECONDS", 0.0):
        stages, few, many = _stages(folder)
        if unknown := {part for part in options.parts if not any(name.startswith(part) for name in stages)}:
            raise ConfigError(f"Expected parts of stages: {', '.join(stages)}. Received: {', '.join(sorted(unknown))}.")
        for name, stage in stages.items():
            if not options.parts or any(name.startswith(part) for part in options.parts):
                options.say(name)
                costs[name] = _cost(name, stage, (few, many), options.rounds)
    return Report(
        name="stages",
        title="CPU time of an image, by who works on shards and by who gives them out",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"photos": MANY, "width_px": WIDTH_PX, "height_px": HEIGHT_PX, "packed_px": PACKED_PX},
        observations={},
        ratios=[],
        notes=[*_cost_lines(costs), "", *_table(costs)],
    )


def _cost(name: str, stage: Stage, sets: tuple[_Photos, _Photos], rounds: int) -> Cost:
    """Returns the medians of what a stage costs."""
    worker, driver, most = list[float](), list[float](), 0
    for _ in range(rounds):
        (_, few), (engine, many) = (_done(stage, photos) for photos in sets)
        worker.append(engine.seconds / engine.images)
        driver.append(max(0.0, many - few) / (MANY - FEW))
        most = engine.most
    return Cost(float(np.median(worker)), float(np.median(driver)), _PER_SHARD.get(name, lambda _: most))


def _done(stage: Stage, photos: _Photos) -> tuple[Counted, float]:
    engine, before = Counted(), time.process_time()
    stage(engine, photos)
    return engine, time.process_time() - before


def _cost_lines(costs: dict[str, Cost]) -> list[str]:
    lines = ["| CPU milliseconds of an image | worker | driver |", "|---|---|---|"]
    return lines + [f"| {name} | {1e3 * cost.worker:.2f} | {1e3 * cost.driver:.3f} |" for name, cost in costs.items()]


def _table(costs: dict[str, Cost]) -> list[str]:
    """Returns a table in Markdown: stages by how many images, with a time for each number of workers."""
    lines = [f"| {' | '.join(['stage', *(f'{images:,} images' for images in IMAGES)])} |", "|---" * 5 + "|"]
    for name, cost in costs.items():
        cells = [", ".join(_duration(cost.seconds(images, count)) for count in WORKERS) for images in IMAGES]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


_FORM = PackForm((PACKED_PX, PACKED_PX))
_CPU = rows.Device(is_gpu=False)
_PER_SHARD: dict[str, Callable[[int], int]] = {
    "packing to 224 px": lambda images: Rows("train", pa.nulls(images), "uint8", _FORM).per_shard
} | {f"scores, {name}": batch_size for name in NETWORKS}
"""Of the stages whose shards grow with the images; all others have some number."""


def _stages(folder: Path) -> tuple[dict[str, Stage], _Photos, _Photos]:
    """Returns what is measured, and of what: a few photographs, and many."""
    settings = isolated_settings(folder / "home", folder)
    write_photos(folder / "photos", MANY, width_px=WIDTH_PX, height_px=HEIGHT_PX)
    few, many = (_Photos.prepare(folder / "photos", folder / f"of-{count}", count) for count in (FEW, MANY))
    environment = isolated_environment(settings, database_url="")
    stages: dict[str, Stage] = {"manifest": _describe, "packing to 224 px": _pack, "embeddings, lite0": _embed}
    for name in NETWORKS:
        exported = folder / f"export-{name}"
        (version,) = deploy_untrained(settings, environment, exported, name=name, architecture=name, side_px=SIDE_PX)
        network = _Network(name, version, exported, settings)
        stages |= {
            f"scores, {name}": network.score,
            f"evaluation, {name}": network.evaluate,
            f"reference data, {name}": network.refer,
            f"replay, two of {name}": network.replay,
        }
    return stages, few, many


@dataclass(frozen=True)
class _Photos:
    """Some photographs.

    Attributes:
        folder: `images` has them, `checkout/images` by split and class.
        names: of the files.
        sha256: of each.
        split: the pack of all of them.
    """

    folder: Path
    names: list[str]
    sha256: list[str]
    split: PackedSplit

    @classmethod
    def prepare(cls, source: Path, folder: Path, count: int) -> _Photos:
        """Takes the first photographs of a folder."""
        paths = sorted(source.iterdir())[:count]
        names, classes = [path.name for path in paths], quick_experiment().model.classes
        for number, path in enumerate(paths):
            checkout = folder / "checkout" / "images" / SPLITS[number % 4] / classes[number // 4 % len(classes)]
            for place in (folder / "images", checkout):
                place.mkdir(parents=True, exist_ok=True)
                (place / path.name).hardlink_to(path)
        sha256 = [file_sha256(path) for path in paths]
        made = _write_pack(folder, names, sha256, folder / "pack", LocalEngine(1))
        files = [folder / "pack" / shard.file for shard in made]
        pixels = ShardedImages(files, [shard.images for shard in made], (PACKED_PX, PACKED_PX, 3))
        return cls(folder, names, sha256, PackedSplit(pixels, np.zeros(count, np.int64), names, sha256))


def _write_pack(folder: Path, names: list[str], sha256: list[str], target: Path, engine: Engine) -> list[Shard]:
    target.mkdir()
    plan = Rows("test", pa.table({"path": names, "sha256": sha256}), "uint8", _FORM)
    return write_shards(target, Origin(folder / "images"), [plan], engine=engine)["test"]


def _describe(engine: Counted, photos: _Photos) -> None:
    experiment = quick_experiment()
    build_manifest(
        photos.folder / "checkout",
        data_path="images",
        annotations=None,
        model=experiment.model,
        dataset=experiment.dataset,
        engine=engine,
    )


def _pack(engine: Counted, photos: _Photos) -> None:
    _write_pack(photos.folder, photos.names, photos.sha256, photos.folder / "again", engine)
    shutil.rmtree(photos.folder / "again")


def _embed(engine: Counted, photos: _Photos) -> None:
    home = photos.folder / "encoder"
    table = pd.DataFrame({"path": photos.names, "sha256": photos.sha256})
    files = Origin(photos.folder / "images").files
    embed_images(table, files, open_encoder(EncoderConfig(), home), home, engine=engine)
    shutil.rmtree(home / "cache" / "embeddings")


@dataclass(frozen=True)
class _Network:
    name: str
    version: str
    folder: Path
    """Of the export, with the Keras files."""
    settings: Settings

    def score(self, engine: Counted, photos: _Photos) -> None:
        source, output = str(photos.folder / "images"), photos.folder / "scores.parquet"
        score_images(source, self.version, output, settings=self.settings, engine=engine)

    def evaluate(self, engine: Counted, photos: _Photos) -> None:
        classes = len(quick_experiment().model.classes)
        answer_split(Classifier(CarriedFile.of(self._file("")), classes, _CPU), photos.split, engine)

    def refer(self, engine: Counted, photos: _Photos) -> None:
        encoder = open_encoder(EncoderConfig(), photos.folder / "encoder")
        wanted = [(photos.split, np.arange(len(photos.names)))]
        extract_samples(self._file(""), self._file("_uae"), wanted, encoder=encoder, engine=engine)

    def replay(self, engine: Counted, photos: _Photos) -> None:
        settings, folder = self.settings, photos.folder / "images"
        model = PublishedModel(settings.storage_url, f"{self.name}_classifier", self.version, settings.home, "cache")
        batches = (photos.names[start : start + _UPLOADS] for start in range(0, len(photos.names), _UPLOADS))
        shards = (UploadShard(batch[0], [(folder / name).read_bytes() for name in batch]) for batch in batches)
        answer = functools.partial(answer_uploads, model, model)
        for _ in map_shards(answer, shards, engine=engine, title="Replay", total=len(photos.names)):
            pass

    def _file(self, suffix: str) -> Path:
        return self.folder / f"{self.name}_classifier{suffix}.keras"
