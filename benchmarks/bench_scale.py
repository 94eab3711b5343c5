"""Packing, embedding and batch scoring by one core and by two, by processes and by Ray; beside scoring a bare loop.

Ray has two nodes of one core each on this machine; "one" gives all to the first of them. What the machine allows is
what two processes reach that share nothing but its cores, "apart". Wall-clock ratios need a quiet machine; the CPU's,
which are of the whole tree of processes, do not. The driver's memory is compared for few shards and for many.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pyarrow as pa

from benchmarks.entries import peak_of
from benchmarks.harness import (
    Alternative,
    Check,
    Observation,
    Ratio,
    Report,
    Stopwatch,
    compare,
    in_process,
    machine_line,
    measure_interleaved,
)
from benchmarks.installation import isolated_environment, isolated_settings, scratch_folder
from benchmarks.options import Options
from benchmarks.ray_nodes import ray_nodes
from benchmarks.untrained import deploy_untrained
from cv_platform.compute.engine import Engine
from cv_platform.compute.local import LocalEngine
from cv_platform.errors import ConfigError
from cv_platform.settings import Settings

PHOTOS = 2048
"""Of which two workers get as many parts each, in every stage; so few that two rounds of a stage take two minutes."""
PARTS = ("memory", "bare", "packing", "embedding", "scoring")
ENTRIES, MOST_GROWTH = (10_000, 1_000_000), 0.1
"""Shards whose driver's peak memory is compared, and by which share it may grow from the first to the second."""
SIDE_PX, PACKED_PX = 224, 224
NETWORKS = ("resnet9s", "efficientnet_lite0")
"""Whose scoring stands beside a bare loop: a small one, and that of photographs. All else is by the first."""
LIBRARIES = ("ray", "numpy", "opencv-python-headless", "onnxruntime")
SCALING, RAY_SHARE, BARE_SHARE = 1.8, 0.9, 0.9
APART_SHARE = 0.97
"""Of what two processes apart gain, which is asked of two nodes where a machine's cores do not let them reach 1.8."""
_APART_SECONDS = 600.0


def run(options: Options) -> Report:
    """Compares them, stage by stage."""
    clock = Stopwatch()
    parts = options.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        raise ConfigError(f"Expected parts of scale: {', '.join(PARTS)}. Received: {', '.join(sorted(unknown))}.")
    observations, stages = _measured(parts, options) if {*parts} != {"memory"} else ({}, [])
    ratios, checks = _compared(observations, stages, options.seed)
    if "memory" in parts:
        options.say("the driver's memory")
        checks.append(_memory())
    return Report(
        name="scale",
        title="Shards by one core and by two, by processes and by Ray",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"photos": PHOTOS, "input_px": SIDE_PX, "packed_px": PACKED_PX},
        observations=observations,
        ratios=ratios,
        checks=checks,
    )


def _measured(parts: tuple[str, ...], options: Options) -> tuple[dict[str, list[Observation]], list[str]]:
    """Returns the observations of all parts with images, and which stages are among them."""
    observations: dict[str, list[Observation]] = {}
    with scratch_folder("scale") as folder:
        settings = isolated_settings(folder / "home", folder)
        write_photos(folder / "photos", PHOTOS)
        environment = isolated_environment(settings, database_url="")
        versions = {
            name: deploy_untrained(
                settings, environment, folder / f"export-{name}", name=name, architecture=name, side_px=SIDE_PX
            )[0]
            for name in (NETWORKS if "bare" in parts else NETWORKS[:1])
        }
        if "bare" in parts:
            options.say("scoring and a bare loop, in this process")
            cv2.setNumThreads(1)  # As in each process that scores.
            for name, version in versions.items():
                bare = functools.partial(_bare_loop, folder / "photos", _session(settings, name, version))
                scoring = functools.partial(_score, folder, settings, version, folder / "photos", LocalEngine(1))
                observations |= measure_interleaved(
                    [
                        Alternative(f"{name}: bare loop", in_process(bare)),
                        Alternative(f"{name}: scoring", in_process(scoring)),
                    ],
                    rounds=options.rounds,
                    say=options.say,
                )
        version = versions[NETWORKS[0]]
        stages = _stages(folder, settings, version, folder / "photos")
        stages = {name: work for name, work in stages.items() if name in parts}
        if stages:
            apart = functools.partial(_apart, folder, settings, version)
            observations |= _by_engines(stages, apart, options)
    return observations, list(stages)


def _by_engines(
    stages: dict[str, Callable[[Engine], int]], apart: Callable[[str, int], Observation], options: Options
) -> dict[str, list[Observation]]:
    """Measures each stage by one core and by two, by processes of this machine, by Ray's two nodes, and apart."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cv_platform.compute.ray_engine import RayEngine

    class OneNode(RayEngine):
        """Gives tasks out, and has them wait, as `RayEngine` does, all on the first node."""

        def _strategy(self) -> Any:
            return NodeAffinitySchedulingStrategy(cluster.head_node.node_id, soft=False)

    observations: dict[str, list[Observation]] = {}
    with ray_nodes(2) as cluster:
        address = str(cluster.address)
        engines: dict[str, Engine] = {
            "local, one": LocalEngine(1, worth_seconds=0),
            "local, two": LocalEngine(2, worth_seconds=0),
            "ray, one": OneNode(address),
            "ray, two": RayEngine(address),
        }
        for stage, work in stages.items():
            options.say(stage)
            observations |= measure_interleaved(
                [
                    Alternative(f"{stage}: {name}", _of_tree(functools.partial(work, engine)))
                    for name, engine in engines.items()
                ]
                + [
                    Alternative(f"{stage}: apart, {name}", functools.partial(apart, stage, count))
                    for name, count in (("one", 1), ("two", 2))
                ],
                rounds=options.rounds,
                say=options.say,
            )
    return observations


def _compared(
    observations: dict[str, list[Observation]], stages: list[str], seed: int
) -> tuple[list[Ratio], list[Check]]:
    ratios, checks = list[Ratio](), list[Check]()

    def state(numerator: str, denominator: str, quantity: str, asked: float | None = None) -> float:
        if numerator not in observations:  # Of a part that is not asked for.
            return 0.0
        if (ratio := compare(observations, numerator, denominator, quantity, seed=seed)) is None:
            return 0.0
        ratios.append(ratio)
        if asked is not None:
            title, found = f"{quantity}, {numerator} / {denominator}", f"{ratio.median:.2f}"
            checks.append(Check(what=title, expected=f"≥ {asked:.2f}", received=found, held=ratio.median >= asked))
        return ratio.median

    for name in NETWORKS:
        state(f"{name}: bare loop", f"{name}: scoring", "cpu_us_per_unit", BARE_SHARE)
    for stage in stages:
        possible = state(f"{stage}: apart, two", f"{stage}: apart, one", "units_per_second")
        state(f"{stage}: local, two", f"{stage}: local, one", "units_per_second")
        asked = min(SCALING, APART_SHARE * possible)
        state(f"{stage}: ray, two", f"{stage}: ray, one", "units_per_second", asked)
        state(f"{stage}: ray, two", f"{stage}: local, two", "units_per_second", RAY_SHARE)
        state(f"{stage}: local, two", f"{stage}: ray, two", "cpu_us_per_unit", RAY_SHARE)
    return ratios, checks


def _memory() -> Check:
    few, many = map(peak_of, ENTRIES)
    return Check(
        what=f"the driver's peak memory, {ENTRIES[1]:,} shards instead of {ENTRIES[0]:,}",
        expected=f"≤ {MOST_GROWTH:.0%} more",
        received=f"{few:.1f} MiB, then {many:.1f} MiB: {many / few - 1:.1%} more",
        held=many / few - 1 <= MOST_GROWTH,
    )


def _apart(folder: Path, settings: Settings, version: str, stage: str, count: int) -> Observation:
    """Has so many processes do a stage, each on its share of the photos, measured from start to end of all."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count + 1)
    shares = [folder / f"share-{number}-of-{count}" for number in range(count)]
    for number, share in enumerate(shares):
        if not share.exists():
            (share / "photos").mkdir(parents=True)
            for photo in sorted((folder / "photos").iterdir())[number::count]:
                (share / "photos" / photo.name).hardlink_to(photo)
    processes = [
        context.Process(target=_do_share, args=(barrier, share, settings, version, stage), daemon=True)
        for share in shares
    ]
    for process in processes:
        process.start()
    barrier.wait(_APART_SECONDS)
    before, started = _tree_seconds(), time.perf_counter()
    barrier.wait(_APART_SECONDS)
    wall, cpu = time.perf_counter() - started, _tree_seconds() - before
    for process in processes:
        process.join()
    return Observation(units=PHOTOS, wall_seconds=wall, cpu_seconds=cpu)


def _do_share(barrier: Barrier, share: Path, settings: Settings, version: str, stage: str) -> None:
    """Does a stage when all others are ready, and waits for their end."""
    cv2.setNumThreads(1)
    work = _stages(share, settings, version, share / "photos")[stage]
    barrier.wait(_APART_SECONDS)
    work(LocalEngine(1))
    barrier.wait(_APART_SECONDS)


def _stages(folder: Path, settings: Settings, version: str, photos: Path) -> dict[str, Callable[[Engine], int]]:
    from cv_platform.config import EncoderConfig
    from cv_platform.datasets.embeddings import embed_images
    from cv_platform.datasets.origins import Origin
    from cv_platform.datasets.shards.pixels import PackForm
    from cv_platform.datasets.shards.writing import Rows, write_shards
    from cv_platform.encoders.encoder import open_encoder
    from cv_platform.files import file_sha256

    home = folder / "encoder"
    paths = sorted(path.name for path in photos.iterdir())
    sha256 = [file_sha256(photos / name) for name in paths]
    encoder = open_encoder(EncoderConfig(), home)

    def pack(engine: Engine) -> int:
        target = folder / "pack"
        target.mkdir()
        images = pa.table({"path": paths, "sha256": sha256})
        rows = Rows("train", images, "uint8", PackForm((PACKED_PX, PACKED_PX)))
        write_shards(target, Origin(photos), [rows], engine=engine)
        shutil.rmtree(target)
        return len(paths)

    def embed(engine: Engine) -> int:
        import pandas as pd

        rows = pd.DataFrame({"path": paths, "sha256": sha256})
        embed_images(rows, Origin(photos).files, encoder, home, engine=engine)
        shutil.rmtree(home / "cache" / "embeddings")
        return len(rows)

    return {
        "packing": pack,
        "embedding": embed,
        "scoring": functools.partial(_score, folder, settings, version, photos),
    }


def _score(folder: Path, settings: Settings, version: str, photos: Path, engine: Engine) -> int:
    from cv_platform.scoring.score import score_images

    return score_images(str(photos), version, folder / "scores.parquet", settings=settings, engine=engine).computed


def write_photos(folder: Path, count: int, *, width_px: int = 468, height_px: int = 400) -> None:
    """Writes `count` JPEGs, of about 77 KB: crops of scikit-learn's two photographs, each with noise of its own."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    sources = list(load_sample_images().images)
    for number in range(count):
        source = sources[number % len(sources)]
        top, left = (int(generator.integers(0, most)) for most in (428 - height_px, 641 - width_px))
        crop = source[top : top + height_px, left : left + width_px].astype(np.int16)
        noisy = np.clip(crop + generator.integers(-6, 7, crop.shape), 0, 255).astype(np.uint8)
        _, data = cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])
        (folder / f"{number:05}.jpg").write_bytes(data.tobytes())


def _bare_loop(folder: Path, run: Callable[..., object]) -> int:
    """Reads, decodes, resizes and runs the bundle's graph, and does nothing else."""
    photos = sorted(folder.iterdir())
    for path in photos:
        pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        small = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        run(np.asarray(small, np.uint8)[None], np.array([-1], np.int32))
    return len(photos)


def _session(settings: Settings, name: str, version: str) -> Callable[..., object]:
    from cv_platform.serving.model.runtime_onnx import OnnxRuntime
    from cv_platform.storage import CentralStorage

    bundle, _ = CentralStorage(settings.storage_url).fetch_bundle(
        f"{name}_classifier", version, settings.home / "cache"
    )
    return OnnxRuntime(bundle / "model.onnx", threads=1)


def _of_tree(work: Callable[[], int]) -> Callable[[], Observation]:
    """Returns a measurement of `work` with the CPU of this process and of all below it, also of those that end."""

    def measure() -> Observation:
        before, started = _tree_seconds(), time.perf_counter()
        units = work()
        wall = time.perf_counter() - started
        return Observation(units=units, wall_seconds=wall, cpu_seconds=_tree_seconds() - before)

    return measure


def _tree_seconds() -> float:
    here = os.times()
    ended = here.children_user + here.children_system
    running = [here.user + here.system]
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        running.append(times.user + times.system + times.children_user + times.children_system)
    return ended + sum(running)
