"""What the platform finds in a dataset that was spoilt on purpose, and how many honest images it accuses.

Images of `options.archive` (…/CLASS/image) are divided into the four splits. Planted are: near-copies and exact copies
across every pair of splits, wrong labels, one class with a fortieth of the largest one's images, and files of twelve
kinds that are no good images, and handwritten digits under the photographs' labels. Then everything runs as for a user:
import, manifest with its quarantine, embeddings, and what validation looks for. Wrong labels are looked for among the
digits alone, too.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from benchmarks.harness import Check, Report, Stopwatch, machine_line
from benchmarks.options import Options
from benchmarks.spoilt_files import BAD_FILES
from cv_platform.config import EncoderConfig, ExperimentConfig, parse_experiment
from cv_platform.datasets.importing import ImportedDataset
from cv_platform.datasets.manifest import read_manifest, read_thumbnails
from cv_platform.datasets.near_copies import find_near_copies
from cv_platform.errors import DatasetError
from cv_platform.images.files import IMAGE_SUFFIXES
from cv_platform.records import DatasetVersion
from cv_platform.validation.checks.label_issues import probe_labels
from cv_platform.validation.checks.outliers import MAX_DEVIATION, outlier_deviations
from cv_platform.validation.sample import read_sample

NEAR_COPIES, LEAKS, BAD_EACH, STRANGERS = 240, 40, 5, 20
WRONG_FRACTION, RATIO = 0.05, 40
MAX_IMAGES = 6000
SPLITS = {"train": 0.7, "valid": 0.1, "test": 0.1, "reference": 0.1}
POLICIES = ("damaged", "animated", "constant", "bit_depth", "wrong_suffix")
"""That quarantine what is kept by default."""
LIBRARIES = ("numpy", "scikit-learn", "onnxruntime", "opencv-python-headless")
Pixels = NDArray[np.uint8]


def _jpeg(image: Pixels) -> Pixels:
    encoded = cv2.imencode(".jpg", np.ascontiguousarray(image), [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), dtype=np.uint8)


NEAR = {
    "saved again": _jpeg,
    "cropped by 2 px": lambda image: image[2:-2, 2:-2],
    "mirrored": lambda image: image[:, ::-1],
    "brightened by 20 %": lambda image: np.clip(image * 1.2, 0, 255).astype(np.uint8),
    "all of it": lambda image: _jpeg(np.clip(image[2:, 2:][:, ::-1] * 1.1, 0, 255).astype(np.uint8)),
}


@dataclass
class Spoilt:
    """A folder SPLIT/CLASS/file, and what was planted in it, by path."""

    folder: Path
    classes: tuple[str, ...]
    honest: int
    copies: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Of each copy: its original, and the kind; `the same` byte for byte."""
    wrong: set[str] = field(default_factory=set[str])
    bad: dict[str, str] = field(default_factory=dict[str, str])
    """The kind of each bad file."""
    strangers: set[str] = field(default_factory=set[str])
    """What is of none of the classes."""


def run(options: Options) -> Report:
    """Spoils the images of `options.archive`, and looks for what was planted.

    Raises:
        DatasetError: there is no archive, or not two classes with enough images.
    """
    if options.archive is None:
        raise DatasetError("Expected --archive with a tar of …/CLASS/image. Received: none.")
    clock = Stopwatch()
    with tempfile.TemporaryDirectory(prefix="cv-bench-data-") as name:
        spoilt = _spoil(options.archive, Path(name), np.random.default_rng(options.seed))
        options.say(f"{spoilt.honest} images, {len(spoilt.copies)} copies, {len(spoilt.wrong)} wrong labels …")
        checks, notes = _look(spoilt, Path(name) / "home")
        options.say("wrong labels among the digits …")
        checks += _look_at_digits(Path(name) / "digits", np.random.default_rng(options.seed))
    return Report(
        name="data",
        title="What is found in a dataset that was spoilt, and what is accused",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"images": spoilt.honest, "near-copies": NEAR_COPIES, "leaks": LEAKS, "bad files": len(spoilt.bad)},
        observations={},
        ratios=[],
        checks=checks,
        notes=notes,
    )


def _spoil(archive: Path, folder: Path, generator: np.random.Generator) -> Spoilt:
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    files = sorted(path for path in (folder / "unpacked").rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    files = [files[at] for at in generator.permutation(len(files))]
    classes = tuple(sorted({path.parent.name for path in files}))
    files = _with_a_rare_class(files[:MAX_IMAGES], classes[0])
    if len(classes) < 2 or len(files) < NEAR_COPIES + LEAKS:
        raise DatasetError(f"Expected ≥ 2 classes and {NEAR_COPIES + LEAKS} images. Received: {len(files)}, {classes}.")
    spoilt = Spoilt(folder / "source", classes, len(files))
    splits = generator.choice(list(SPLITS), len(files), p=list(SPLITS.values())).tolist()
    originals: dict[str, list[str]] = {split: [] for split in SPLITS}
    is_wrong = generator.random(len(files)) < WRONG_FRACTION
    for number, (path, split) in enumerate(zip(files, splits, strict=True)):
        label = path.parent.name
        if is_wrong[number]:
            label = str(generator.choice([name for name in classes if name != label]))
        placed = f"{split}/{label}/{number}{path.suffix.lower()}"
        _place(spoilt.folder / placed, path.read_bytes())
        if is_wrong[number]:
            spoilt.wrong.add(placed)
        else:
            originals[split].append(placed)
    _plant_copies(spoilt, originals)
    for kind, (suffix, make) in BAD_FILES.items():
        for number in range(BAD_EACH):
            placed = f"train/{classes[-1]}/bad {kind} {number}{suffix}"
            _place(spoilt.folder / placed, make(generator))
            spoilt.bad[placed] = kind
    for number, (digit, _) in enumerate(_digits(generator, STRANGERS)):
        placed = f"{generator.choice(list(SPLITS))}/{generator.choice(classes)}/digit {number}.png"
        _place(spoilt.folder / placed, digit)
        spoilt.strangers.add(placed)
    shutil.rmtree(folder / "unpacked")
    return spoilt


def _digits(generator: np.random.Generator, count: int | None = None) -> list[tuple[bytes, str]]:
    """Returns PNGs of scikit-learn's digits with their labels, in a random order; None: all."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    chosen = generator.permutation(len(found.target))[:count]
    pictures = (np.asarray(found.images[at] * 255 / 16, np.uint8) for at in chosen)
    return [
        (cv2.imencode(".png", picture)[1].tobytes(), str(found.target[at]))
        for at, picture in zip(chosen, pictures, strict=True)
    ]


def _look_at_digits(folder: Path, generator: np.random.Generator) -> list[Check]:
    digits, classes = _digits(generator), tuple(map(str, range(10)))
    spoilt = Spoilt(folder / "source", classes, len(digits))
    for number, (content, label) in enumerate(digits):
        is_wrong = generator.random() < WRONG_FRACTION
        given = str(generator.choice([name for name in classes if name != label])) if is_wrong else label
        placed = f"{given}/{number}.png"
        _place(spoilt.folder / placed, content)
        if is_wrong:
            spoilt.wrong.add(placed)
    version, rows, vectors, _ = _prepared(spoilt, folder / "home", "digits")
    return _label_checks("digits: ", spoilt, rows, version.directory, vectors, least=0.9)


def _with_a_rare_class(files: list[Path], rare: str) -> list[Path]:
    counts = Counter(path.parent.name for path in files)
    left = max(count for name, count in counts.items() if name != rare) // RATIO
    others = [path for path in files if path.parent.name != rare]
    return [*others, *[path for path in files if path.parent.name == rare][:left]]


def _plant_copies(spoilt: Spoilt, originals: dict[str, list[str]]) -> None:
    pairs = cycle(combinations(SPLITS, 2))
    kinds = cycle(NEAR)
    for number in range(NEAR_COPIES + LEAKS):
        source, target = next(pairs)
        original = originals[source].pop()
        label = Path(original).parent.name
        content = (spoilt.folder / original).read_bytes()
        kind, suffix = "the same", Path(original).suffix
        if number < NEAR_COPIES:
            kind, suffix = next(kinds), ".png"
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            changed = NEAR[kind](np.asarray(pixels, dtype=np.uint8))
            content = cv2.imencode(".png", np.ascontiguousarray(changed))[1].tobytes()
        placed = f"{target}/{label}/copy {number}{suffix}"
        _place(spoilt.folder / placed, content)
        spoilt.copies[placed] = (original, kind)


def _place(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _prepared(
    spoilt: Spoilt, home: Path, name: str
) -> tuple[DatasetVersion, pd.DataFrame, NDArray[np.float16], ImportedDataset]:
    """Imports, checks out and embeds what was spoilt: the version, its rows that are used, and their vectors."""
    from cv_platform.datasets.embeddings import embed_dataset, read_embeddings
    from cv_platform.datasets.importing import ImportRules, import_dataset
    from cv_platform.datasets.versions import checkout_version

    rules = ImportRules(max_left_out_fraction=0.2)
    imported = import_dataset(spoilt.folder, ds_name=name, tag="v1", ds_root=home / "datasets", rules=rules)
    config = _config(spoilt.classes, name)
    version = checkout_version(config.dataset, config.model, home=home)
    embeddings = embed_dataset(version, EncoderConfig(), home=home)
    every = _rows(version)
    rows = every.loc[every["status"] == "used"].reset_index(drop=True)
    return version, rows, read_embeddings(embeddings, version.manifest, rows["path"].tolist()), imported


def _rows(version: DatasetVersion) -> pd.DataFrame:
    every = read_manifest(version.manifest_path).reset_index(drop=True)
    every["name"] = every["path"].str.removeprefix("images/")
    return every


def _look(spoilt: Spoilt, home: Path) -> tuple[list[Check], list[str]]:
    version, rows, vectors, imported = _prepared(spoilt, home, "spoilt")
    every = _rows(version)
    reasons = dict(zip(every["name"], every["reason"].fillna(""), strict=True))
    checks = [_bad_files(spoilt, reasons, imported.left_out)]
    copies, notes = _copies(spoilt, rows, read_thumbnails(version.manifest_path)[every["status"] == "used"], vectors)
    checks += copies
    strangers = rows["name"].isin(list(spoilt.strangers)).to_numpy()
    checks.append(_outliers(strangers, outlier_deviations(vectors, rows["labels"].tolist())))
    kept = rows.loc[~strangers]
    return [*checks, *_label_checks("", spoilt, kept, version.directory, vectors[~strangers], least=0.55)], notes


def _copies(
    spoilt: Spoilt, rows: pd.DataFrame, thumbnails: NDArray[np.uint8], vectors: NDArray[np.float16]
) -> tuple[list[Check], list[str]]:
    first = ~rows["sha256"].duplicated().to_numpy()
    found = find_near_copies(thumbnails[first], vectors[first])
    names, hashes = rows.loc[first, "name"].to_numpy(), dict(zip(rows["name"], rows["sha256"], strict=True))
    pairs = {frozenset((str(names[a]), str(names[b]))) for a, b in found.pairs}
    near = {copy: (original, kind) for copy, (original, kind) in spoilt.copies.items() if kind != "the same"}
    hits = Counter(kind for copy, (original, kind) in near.items() if frozenset((copy, original)) in pairs)
    same = [
        hashes.get(copy) == hashes.get(original) for copy, (original, _) in spoilt.copies.items() if copy not in near
    ]
    planted = {frozenset((copy, original)) for copy, (original, _) in near.items()}
    accused = {name for pair in pairs - planted for name in pair} - set(near) - spoilt.strangers
    share, honest = sum(hits.values()) / len(near), len(accused) / spoilt.honest
    totals = Counter(kind for _, kind in near.values())
    return [
        _check("copies byte for byte", f"{LEAKS} found", f"{sum(same)}", sum(same) == LEAKS),
        _check("near-copies", "≥ 95 % found", f"{share:.1%}", share >= 0.95),
        _check("honest images", "≤ 0.5 % accused", f"{honest:.2%}", honest <= 0.005),
    ], [f"{kind}: {hits[kind]} of {totals[kind]} found" for kind in NEAR]


def _outliers(strangers: NDArray[np.bool_], deviations: NDArray[np.float64]) -> Check:
    from sklearn.metrics import average_precision_score

    precision = float(average_precision_score(strangers, deviations))
    named = deviations > MAX_DEVIATION
    return _check(
        f"{STRANGERS} digits among the photographs, average precision",
        "≥ 0.9",
        f"{precision:.3f}; named: {(named & strangers).sum()} of them, {(named & ~strangers).sum()} others",
        precision >= 0.9,
    )


def _label_checks(
    what: str, spoilt: Spoilt, rows: pd.DataFrame, directory: Path, vectors: NDArray[np.float16], *, least: float
) -> list[Check]:
    from sklearn.metrics import average_precision_score

    sample = read_sample(rows, directory, vectors)
    probe = probe_labels(sample, spoilt.classes, "multi-class")
    of_sample = sample.rows["path"].str.removeprefix("images/").to_numpy()
    truth = np.isin(of_sample, list(spoilt.wrong))
    precision, rate = float(average_precision_score(truth, probe.chances)), float(truth.mean())
    return [
        _check(f"{what}wrong labels, average precision", f"≥ {least}", f"{precision:.2f}", precision >= least),
        _check(
            f"{what}share of wrong labels, as estimated",
            f"{rate:.1%} ± 2 points",
            f"{probe.wrong_fraction:.1%} ({probe.wrong_interval[0]:.1%} to {probe.wrong_interval[1]:.1%})",
            abs(probe.wrong_fraction - rate) <= 0.02,
        ),
    ]


def _bad_files(spoilt: Spoilt, reasons: dict[str, str], left_out: dict[str, int]) -> Check:
    missed = [name for name in spoilt.bad if name in reasons and not reasons[name]]
    gone = sum(name not in reasons for name in spoilt.bad)
    kinds = Counter(reasons[name].partition(":")[0] for name in spoilt.bad if reasons.get(name))
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    left = sum(left_out.values())
    return _check(
        "files of twelve kinds that are no good images",
        f"{len(spoilt.bad)} out of every split, each with its reason",
        f"{told}; left out by the import: {left}; kept: {missed or 'none'}",
        not missed and gone == left,
    )


def _check(what: str, expected: str, received: str, held: bool) -> Check:
    return Check(what=what, expected=expected, received=received, held=held)


def _config(classes: tuple[str, ...], name: str) -> ExperimentConfig:
    return parse_experiment(
        {
            "name": "spoilt",
            "model": {"model_name": "spoilt", "classes": list(classes), "input_size": {"h": 32, "w": 32}},
            "dataset": {
                "ds_name": name,
                "dvc_tag": "v1",
                "quarantine": dict.fromkeys(POLICIES, "quarantine"),
            },
        },
        origin="the benchmark",
    )
