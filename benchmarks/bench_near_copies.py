"""The search for near-copies among a million images: the index against the search of all, and what it takes.

A million images are not at hand, and their pixels decide nothing here: the thumbnails are smooth random fields, with
the fall of contrast towards fine detail that photographs have. Every hundredth is planted a second time, mirrored,
brightened or with noise. A search of all would take hours: its cost is measured on a part of the queries.
"""

from __future__ import annotations

import resource

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Check, Report, Stopwatch, machine_line, peak_mib
from benchmarks.options import Options
from cv_platform.datasets import near_copies

IMAGES = 1_000_000
EVERY = 100
RECALL_IMAGES = 20_000
QUERIES = 1_000
CELLS, BATCH = (2, 4, 8, 16), 4096
LIBRARIES = ("numpy", "faiss-cpu", "scikit-learn", "opencv-python-headless")


def run(options: Options) -> Report:
    """Searches synthetic thumbnails: `IMAGES`, or as many as `--images` says."""
    clock, generator = Stopwatch(), np.random.default_rng(options.seed)
    count = options.images[0] if options.images else IMAGES
    options.say(f"drawing {count:,} thumbnails …")
    images, planted = _draw(generator, count)
    baseline = peak_mib()
    options.say("searching …")
    begun = _cpu_seconds()
    search = Stopwatch()
    found = near_copies.find_near_copies(images)
    took, cpu_seconds, peak = search.seconds, _cpu_seconds() - begun, peak_mib()
    pairs = {tuple(pair) for pair in found.pairs.tolist()}
    share = sum(pair in pairs for pair in planted) / len(planted)
    honest = len({at for pair in pairs - set(planted) for at in pair}) / len(images)
    recall = _recall(images[:RECALL_IMAGES])
    whole = _exact_cpu_seconds(images) * 2
    return Report(
        name="near-copies",
        title=f"Near-copies among {count:,} images",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"images": len(images), "planted": len(planted), "exact up to": near_copies.EXACT_IMAGES},
        observations={},
        ratios=[],
        checks=[
            Check(what="planted copies", expected="≥ 98 % found", received=f"{share:.2%}", held=share >= 0.98),
            Check(what="honest images", expected="≤ 0.5 % accused", received=f"{honest:.3%}", held=honest <= 0.005),
            Check(
                what=f"neighbours of {RECALL_IMAGES:,} images in the index, of those of a search of all",
                expected="≥ 98 %",
                received=f"{recall:.2%}",
                held=recall >= 0.98,
            ),
            Check(what="peak memory", expected="≤ 4,096 MiB", received=f"{peak:,.0f} MiB", held=peak <= 4096),
            Check(what="time, two quiet cores", expected="≤ 600 s", received=f"{took:,.0f} s", held=took <= 600),
        ],
        notes=[
            f"{cpu_seconds:,.0f} CPU-s, of which a search of all for the candidates alone takes {whole:,.0f}",
            f"{baseline:,.0f} MiB before the search, most of it the thumbnails",
        ],
    )


def _draw(generator: np.random.Generator, count: int) -> tuple[NDArray[np.uint8], list[tuple[int, int]]]:
    """Returns the thumbnails, and the pairs that were planted."""
    side = near_copies.THUMBNAIL_PX
    images, honest = np.empty((count, side, side), np.uint8), count - count // EVERY
    enlarge = {n: cv2.resize(np.eye(n, dtype=np.float32), (n, side), interpolation=cv2.INTER_CUBIC) for n in CELLS}
    for start in range(0, honest, BATCH):
        part = images[start : min(start + BATCH, honest)]
        fields = np.full(part.shape, 128, np.float32)
        for cells, rows in enlarge.items():
            noise = generator.standard_normal((len(part), cells, cells), np.float32) * np.float32(90 / cells)
            fields += rows @ noise @ rows.T
        part[:] = np.clip(fields, 0, 255)
    planted = list(zip(range(0, honest, EVERY), range(honest, count), strict=False))
    kinds = (
        lambda image: image[:, ::-1],
        lambda image: np.clip(image * 1.1, 0, 255),
        lambda image: np.clip(image + generator.normal(0, 3, image.shape), 0, 255),
    )
    for number, (original, copy) in enumerate(planted):
        images[copy] = kinds[number % len(kinds)](images[original])
    return images, planted


def _recall(images: NDArray[np.uint8]) -> float:
    vectors = _vectors(images)
    (exact,) = near_copies.exact_neighbours(vectors, vectors)
    (indexed,) = near_copies.indexed_neighbours(vectors, vectors)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(exact, indexed, strict=True)]))


def _exact_cpu_seconds(images: NDArray[np.uint8]) -> float:
    """Returns what one search of all would take, by a part of its queries."""
    vectors = _vectors(images)
    begun = _cpu_seconds()
    near_copies.exact_neighbours(vectors, vectors[:QUERIES])
    return (_cpu_seconds() - begun) * len(images) / QUERIES


def _vectors(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return near_copies.unit_rows(near_copies.coarse(images))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
