"""What the labelling queue is worth: a head on the encoder's vectors, after the queue's labels and after random ones.

From `options.archive` (SPLIT/CLASS/image) 500 training images are labelled at random. The queue then asks for 1,000
more, `labels.queue_size` at a time, with the head fitted anew in between; the others are drawn at random. There is no
drift report and no rule for unknown images here: their shares go to the uncertain ones. With each of five first parts,
queue and random ones are drawn three times: one draw moves a mean by more than the two differ.
Vectors are kept below `options.home`, so that a second run computes none.
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import Options
from cv_platform.config import EncoderConfig, LabelsConfig
from cv_platform.errors import DatasetError
from cv_platform.files import file_sha256

FIRST, ASKED, RANDOM = 500, 1000, 1500
SEEDS, DRAWS = 5, 3
LIBRARIES = ("numpy", "scikit-learn", "onnxruntime")
Vectors = NDArray[np.float32]
Labels = NDArray[np.int64]


def run(options: Options) -> Report:
    """Compares accuracies on the archive's test split.

    Raises:
        DatasetError: there is no archive, or it has too few images.
    """
    if options.archive is None:
        raise DatasetError("Expected --archive with a tar of SPLIT/CLASS/image. Received: none.")
    clock = Stopwatch()
    with tempfile.TemporaryDirectory(prefix="cv-bench-labels-") as folder:
        splits = _vectors(options.archive, Path(folder), options)
    (pool, labels), (asked, truth) = splits["train"], splits["test"]
    # On the scale of the images that nobody has labelled: all of them are there from the start.
    mean, spread = pool.mean(axis=0), pool.std(axis=0) + 1e-6
    pool, asked = (pool - mean) / spread, (asked - mean) / spread
    if len(pool) < FIRST + RANDOM:
        raise DatasetError(f"Expected at least {FIRST + RANDOM} training images. Received: {len(pool)}.")
    rows: list[dict[str, float]] = []
    for seed in range(SEEDS):
        first, rest = np.split(np.random.default_rng(seed).permutation(len(pool)), [FIRST])
        for draw in range(DRAWS):
            order = np.concatenate([first, np.random.default_rng([seed, draw]).permutation(rest) if draw else rest])
            chosen = {
                f"{FIRST}": first,
                f"{FIRST} + {ASKED} random": order[: FIRST + ASKED],
                f"{FIRST} + {RANDOM} random": order[: FIRST + RANDOM],
                f"{FIRST} + {ASKED} of the queue": _ask(pool, labels, first, seed=seed + SEEDS * draw),
            }
            heads = {name: _head(pool[at], labels[at]) for name, at in chosen.items()}
            rows.append({name: float(np.mean(head.predict(asked) == truth)) for name, head in heads.items()})
            told = ", ".join(f"{name} {value:.4f}" for name, value in rows[-1].items())
            options.say(f"seed {seed}, draw {draw}: {told}")
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    names = f"{FIRST} + {ASKED} of the queue", f"{FIRST} + {RANDOM} random"
    queue, random = (means[name] for name in names)
    error = float(np.std([row[names[0]] - row[names[1]] for row in rows], ddof=1) / len(rows) ** 0.5)
    return Report(
        name="labels",
        title="Accuracy of a head after the queue's labels, and after random ones",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"training images": len(pool), "test images": len(asked), "seeds": SEEDS, "draws": DRAWS},
        observations={},
        ratios=[],
        checks=[
            Check(
                what=f"{ASKED} labels of the queue",
                expected=f"≥ {RANDOM} random ones: {random:.4f}",
                received=f"{queue:.4f}",
                held=queue >= random,
            )
        ],
        notes=[
            *(f"{name}: {value:.4f}" for name, value in means.items()),
            f"standard error of the difference, over {len(rows)} draws: {error:.4f}",
        ],
    )


def _ask(pool: Vectors, labels: Labels, labelled: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Returns the labelled images with those that the queue asks for, `labels.queue_size` at a time."""
    from cv_platform.monitoring.queue_choice import choose, novelty, uncertainty

    config = LabelsConfig()
    for number in range(ASKED // config.queue_size):
        rest = np.setdiff1d(np.arange(len(pool)), labelled)
        probabilities = _head(pool[labelled], labels[labelled]).predict_proba(pool[rest])
        scores = {
            "random": np.random.default_rng([seed, number]).random(len(rest)),
            "novel": novelty(pool[rest], pool[labelled]),
            "uncertain": uncertainty(probabilities),
        }
        chosen = choose(scores, config.quotas(), pool[rest], np.arange(len(rest)), seed=ASKED * seed + number)
        labelled = np.concatenate([labelled, rest[[choice.position for choice in chosen]]])
    return labelled


def _head(vectors: Vectors, labels: Labels):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.003, max_iter=100, tol=1e-3).fit(vectors, labels)


def _vectors(archive: Path, folder: Path, options: Options) -> dict[str, tuple[Vectors, Labels]]:
    from cv_platform.datasets.embeddings import embed_images
    from cv_platform.datasets.origins import Origin
    from cv_platform.encoders.encoder import open_encoder

    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    names = sorted({path.parent.name for path in files})
    home = options.home or folder / "home"
    encoder = open_encoder(EncoderConfig(), home)
    options.say(f"{len(files)} images of {len(names)} classes; embedding …")
    rows = {"path": [path.relative_to(folder).as_posix() for path in files], "sha256": [*map(file_sha256, files)]}
    vectors = embed_images(pd.DataFrame(rows), Origin(folder).files, encoder, home)
    labels = np.array([names.index(path.parent.name) for path in files])
    splits = np.array([path.parents[1].name for path in files])
    return {
        split: (vectors[splits == split].astype(np.float32), labels[splits == split]) for split in ("train", "test")
    }
