"""What the data's stages cost: manifest, packing, embeddings, Deepchecks, memory, and all again on unchanged data.

Photographs are crops of scikit-learn's, as in `bench_scale`; where their number matters and their content does not,
images are 32×32 noise. Stages run in this process, on one core each; a loop that does only what cannot be left out runs
beside them. Memory, and everything again, have their own processes: `python -m benchmarks.bench_data_speed peak DIR`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa

from benchmarks.bench_scale import write_photos
from benchmarks.harness import (
    Alternative,
    Check,
    Observation,
    Ratio,
    Report,
    Stopwatch,
    compare,
    forget_peak,
    in_process,
    machine_line,
    measure_interleaved,
    peak_mib,
)
from benchmarks.installation import isolated_environment, isolated_settings, scratch_folder, write_config
from benchmarks.options import Options
from cv_platform.config import EncoderConfig, ExperimentConfig, parse_experiment
from cv_platform.encoders.encoder import BATCH_IMAGES, Encoder
from cv_platform.errors import DatasetError
from cv_platform.files import file_sha256

if TYPE_CHECKING:
    from cv_platform.records import DatasetVersion

PHOTOS, SIDES_PX = 240, (32, 224)
FEW, MANY, AGAIN = 10_000, 60_000, 12_000
ROWS = 60_000
MANY_ROWS, DISTINCT = 1_000_000, 2_000
ROWS_SIDE_PX = 8
SPLITS = ("train", "valid", "test", "reference")
LIBRARIES = ("numpy", "opencv-python-headless", "pyarrow", "deepchecks", "dagster")
PARTS = ("stages", "deepchecks", "again", "memory", "rows")
STAGES = ("dataset", "embeddings", "validation_report", "packed_images")


def run(options: Options) -> Report:
    """Measures them all."""
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        raise DatasetError(f"Expected --parts of {', '.join(PARTS)}. Received: {', '.join(sorted(unknown))}.")
    if len(options.images) not in {0, 3}:
        raise DatasetError(f"Expected --images FEW,MANY,AGAIN. Received: {len(options.images)} numbers.")
    few, many, again = options.images or (FEW, MANY, AGAIN)
    clock, checks, notes = Stopwatch(), list[Check](), list[str]()
    observations: dict[str, list[Observation]] = {}
    ratios: list[Ratio] = []
    cv2.setNumThreads(1)
    with scratch_folder("data-speed") as folder:
        for part in options.parts or PARTS:
            options.say(f"{part} …")
            if part == "stages":
                observations, ratios, held = _stages(_photos(folder / "photos"), options)
                checks += held
            elif part == "deepchecks":
                checks.append(_deepchecks(folder))
            elif part == "again":
                check, notes = _second_materialisation(folder, again)
                checks.append(check)
            elif part == "memory":
                checks.append(_memory(folder, few, many))
            else:
                checks.append(_many_rows(folder))
    return Report(
        name="data-speed",
        title="What the data's stages cost",
        unit="image",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(LIBRARIES),
        settings={"photographs": PHOTOS, "small images": many, "again": again, "rows": ROWS},
        observations=observations,
        ratios=ratios,
        checks=checks,
        notes=notes,
    )


def _photos(folder: Path) -> Path:
    """Writes photographs as a checkout has them, each split and class in a folder of its own."""
    write_photos(folder / "all", PHOTOS)
    for number, path in enumerate(sorted((folder / "all").iterdir())):
        target = folder / "images" / SPLITS[number % 4] / f"class{number // 4 % 2}" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return folder


def _stages(folder: Path, options: Options) -> tuple[dict[str, list[Observation]], list[Ratio], list[Check]]:
    alternatives: dict[str, Callable[[], int]] = {
        "read and hash": functools.partial(_loop, folder, None),
        "read, hash and decode": functools.partial(_loop, folder, 0),
        "manifest": functools.partial(_manifest, folder),
    }
    for side in SIDES_PX:
        alternatives[f"decode and resize to {side}"] = functools.partial(_loop, folder, side)
        alternatives[f"packing at {side}"] = functools.partial(_pack, folder, side)
    alternatives["decode, resize and run the encoder"] = functools.partial(_bare_embedding, folder)
    alternatives["embeddings"] = functools.partial(_embed, folder)
    observations = measure_interleaved(
        [Alternative(name, in_process(work)) for name, work in alternatives.items()],
        rounds=options.rounds,
        say=options.say,
    )
    wanted = [
        # Stated without a limit: a manifest decodes, and decoding alone takes 15 times as long.
        ("manifest", "read and hash", None, None),
        ("manifest", "read, hash and decode", "≤ 1.2", lambda ratio: ratio <= 1.2),
        ("decode, resize and run the encoder", "embeddings", "≥ 0.9", lambda ratio: ratio >= 0.9),
        *(
            (f"decode and resize to {side}", f"packing at {side}", "≥ 0.8", lambda ratio: ratio >= 0.8)
            for side in SIDES_PX
        ),
    ]
    ratios, checks = list[Ratio](), list[Check]()
    for above, below, asked, holds in wanted:
        if (ratio := compare(observations, above, below, "cpu_us_per_unit", seed=options.seed)) is None:
            continue
        ratios.append(ratio)
        if asked is not None and holds is not None:
            checks.append(
                Check(
                    what=f"CPU time, {above} / {below}",
                    expected=asked,
                    received=f"{ratio.median:.2f}",
                    held=holds(ratio.median),
                )
            )
    return observations, ratios, checks


@functools.cache
def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in (folder / "images").rglob("*") if path.is_file()))


@functools.cache
def _rows(folder: Path) -> pa.Table:
    """Returns what the manifest knows before anything is packed."""
    files = _files(folder)
    paths = [path.relative_to(folder).as_posix() for path in files]
    return pa.table({"path": paths, "sha256": [file_sha256(path) for path in files]})


def _loop(folder: Path, side: int | None) -> int:
    """Reads files; None: hashes them; 0: decodes, too; another side: decodes and resizes, and does not hash."""
    files = _files(folder)
    for path in files:
        data = path.read_bytes()
        if not side:
            hashlib.sha256(data)
        if side is None:
            continue
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        if side:
            cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), (side, side), interpolation=cv2.INTER_AREA)
    return len(files)


def _manifest(folder: Path) -> int:
    _build_manifest(folder)
    return PHOTOS


def _build_manifest(folder: Path) -> Path:
    from cv_platform.compute.local import LocalEngine
    from cv_platform.datasets.manifest import build_manifest

    config = _experiment()
    return build_manifest(
        folder,
        data_path="images",
        annotations=None,
        model=config.model,
        dataset=config.dataset,
        engine=LocalEngine(1),
    )


def _pack(folder: Path, side: int) -> int:
    from cv_platform.compute.local import LocalEngine
    from cv_platform.datasets.origins import Origin
    from cv_platform.datasets.shards.pixels import PackForm
    from cv_platform.datasets.shards.writing import Rows, write_shards

    target = folder / "pack"
    target.mkdir()
    rows = Rows("train", _rows(folder), "uint8", PackForm((side, side)))
    write_shards(target, Origin(folder), [rows], engine=LocalEngine(1))
    shutil.rmtree(target)
    return len(rows.images)


@functools.cache
def _encoder(folder: Path) -> Encoder:
    from cv_platform.encoders.encoder import open_encoder

    return open_encoder(EncoderConfig(), folder / "encoder")


def _bare_embedding(folder: Path) -> int:
    import onnxruntime  # pyright: ignore[reportMissingTypeStubs]

    ort: Any = onnxruntime
    encoder, files = _encoder(folder), _files(folder)
    (graph,) = (folder / "encoder" / "cache" / "encoders").iterdir()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    side = (encoder.input_px, encoder.input_px)
    for start in range(0, len(files), BATCH_IMAGES):
        batch = list[np.ndarray]()
        for path in files[start : start + BATCH_IMAGES]:
            pixels = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
            assert pixels is not None
            batch.append(cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), side, interpolation=cv2.INTER_AREA))
        session.run(None, {"images": np.stack(batch)})
    return len(files)


def _embed(folder: Path) -> int:
    from cv_platform.compute.local import LocalEngine
    from cv_platform.datasets.embeddings import embed_images
    from cv_platform.datasets.origins import Origin

    rows = _rows(folder).to_pandas()
    embed_images(rows, Origin(folder).files, _encoder(folder), folder / "encoder", engine=LocalEngine(1))
    shutil.rmtree(folder / "encoder" / "cache" / "embeddings")
    return len(rows)


def _deepchecks(folder: Path) -> Check:
    """Runs Deepchecks' suites on a sample of 60,000 rows, which is cut to 3,000 a split as in every validation."""
    import pandas as pd

    from cv_platform.config import ValidateConfig
    from cv_platform.datasets.near_copies import THUMBNAIL_PX
    from cv_platform.validation.checks import Subject
    from cv_platform.validation.checks.deepchecks_suites import DeepchecksCheck
    from cv_platform.validation.sample import read_sample

    images = folder / "rows"
    _small_images(images, ROWS)
    paths = [path.relative_to(images).as_posix() for path in _files(images)]
    manifest = pd.DataFrame({"path": paths})
    manifest["split"] = [path.split("/")[1] for path in paths]
    manifest["labels"] = [[path.split("/")[2]] for path in paths]
    manifest["unknown_labels"] = [[] for _ in paths]
    manifest["sha256"] = [hashlib.sha256(path.encode()).hexdigest() for path in paths]
    manifest["status"] = "used"
    vectors = np.zeros((ROWS, 4), np.float16)
    clock, begun = Stopwatch(), time.process_time()
    sample = read_sample(manifest, images, vectors)
    thumbnails = np.zeros((ROWS, THUMBNAIL_PX, THUMBNAIL_PX), np.uint8)
    subject = Subject(
        manifest,
        manifest.iloc[:0],
        sample,
        ("class0", "class1"),
        "multi-class",
        ValidateConfig(),
        folder,
        images,
        "rows",
        thumbnails,
        vectors,
    )
    for check in DeepchecksCheck.variants():
        check.look(subject)
    took, used = clock.seconds, time.process_time() - begun
    return Check(
        what=f"Deepchecks over {ROWS:,} rows ({sample.description})",
        expected="≤ 90 s",
        received=f"{took:.0f} s, {used:.0f} CPU-s",
        held=used <= 90,
    )


def _second_materialisation(folder: Path, images: int) -> tuple[Check, list[str]]:
    from cv_platform.datasets.importing import import_dataset
    from cv_platform.local.environment import prepare_home

    source, settings = folder / "again", isolated_settings(folder / "home", folder / "configs")
    _small_images(source, images)
    prepare_home(settings)
    import_dataset(source / "images", ds_name="speed", tag="v1", ds_root=settings.home / "datasets")
    config = write_config(_experiment(), folder / "configs")
    environment = isolated_environment(settings, database_url="")
    said = _in_a_process("twice", config, environment=environment)
    first, second, used = json.loads(said.splitlines()[-1])
    total = sum(second.values())
    check = Check(
        what=f"{', '.join(STAGES)} of {images:,} unchanged images, again",
        expected="≤ 5 s",
        received=f"{total:.1f} s, {used:.1f} CPU-s",
        held=total <= 5 and len(second) == len(STAGES),
    )
    return check, [f"{step}: {first[step]:.1f} s, then {took:.2f} s" for step, took in second.items()]


def twice(config: Path) -> str:
    """Materialises the stages twice, and returns the seconds of each, and the second time's CPU seconds, as JSON."""
    import dagster as dg

    from cv_platform.definitions import build_defs

    job = build_defs(config).resolve_implicit_global_asset_job_def()
    keys = [dg.AssetKey(["speed", stage]) for stage in STAGES]
    seconds, used = list[dict[str, float]](), 0.0
    with dg.DagsterInstance.get() as instance:
        for _ in ("first", "second"):
            begun = time.process_time()
            run = job.execute_in_process(instance=instance, asset_selection=keys, raise_on_error=False)
            steps = [event for event in run.all_events if event.event_type_value == "STEP_SUCCESS"]
            seconds.append({str(step.step_key): step.step_success_data.duration_ms / 1000 for step in steps})
            used = time.process_time() - begun
    return json.dumps([*seconds, used])


def _memory(folder: Path, few: int, many: int) -> Check:
    peaks = list[float]()
    for images in (few, many):
        _small_images(folder / f"memory-{images}", images)
        peaks.append(float(_in_a_process("peak", folder / f"memory-{images}").splitlines()[-1]))
    growth = peaks[1] / peaks[0] - 1
    return Check(
        what=f"peak memory of manifest and packing, {many:,} images instead of {few:,}",
        expected="≤ 10 % more",
        received=f"{peaks[0]:.0f} MiB, then {peaks[1]:.0f} MiB: {growth:.1%} more",
        held=growth <= 0.1,
    )


def _many_rows(folder: Path) -> Check:
    """Has a million images described, counted for Dagster's page and packed: names of two thousand files."""
    few, images = folder / "distinct", folder / "rows-of-names"
    _small_images(few, DISTINCT)
    files = _files(few)
    for number in range(MANY_ROWS):
        target = images / "images" / SPLITS[number % 4] / f"class{number // 4 % 2}" / f"{number:07}.jpg"
        if number < 2 * len(SPLITS):
            target.parent.mkdir(parents=True)
        target.hardlink_to(files[number % DISTINCT])
    peaks: dict[str, float] = json.loads(_in_a_process("rows", images).splitlines()[-1])
    return Check(
        what=f"peak memory of what reads or makes the manifest of {MANY_ROWS:,} images",
        expected="≤ 1,536 MiB",
        received=", ".join(f"{name} {mib:,.0f} MiB" for name, mib in peaks.items()),
        held=max(peaks.values()) <= 1536,
    )


def _in_a_process(work: str, path: Path, *, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "benchmarks.bench_data_speed", work, str(path)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def _small_images(folder: Path, count: int) -> None:
    """Writes JPEGs of 32×32 noise, four splits of two classes."""
    generator = np.random.default_rng(0)
    for split in SPLITS:
        for name in ("class0", "class1"):
            (folder / "images" / split / name).mkdir(parents=True)
    for number in range(count):
        coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        data = cv2.imencode(".jpg", cv2.resize(coarse, (32, 32), interpolation=cv2.INTER_CUBIC))[1]
        target = folder / "images" / SPLITS[number % 4] / f"class{number // 4 % 2}" / f"{number:07}.jpg"
        target.write_bytes(data.tobytes())


def _experiment(side: int = 32) -> ExperimentConfig:
    return parse_experiment(
        {
            "name": "speed",
            "model": {"model_name": "speed", "classes": ["class0", "class1"], "input_size": {"h": side, "w": side}},
            "dataset": {"ds_name": "speed", "dvc_tag": "v1"},
        },
        origin="the benchmark",
    )


def peak(folder: Path) -> str:
    """Makes manifest and pack of the images below `folder`, and returns this process's peak memory in MiB."""
    _pack_all(_version(folder), _experiment())
    return str(peak_mib())


def rows(folder: Path) -> str:
    """Makes the manifest of the images below `folder` and what follows from it; the process's peak of each, as JSON."""
    from cv_platform.datasets.contact_sheet import keep_contact_sheet
    from cv_platform.datasets.manifest import count_manifest

    peaks = dict[str, float]()

    def note(name: str) -> None:
        peaks[name] = peak_mib()
        forget_peak()

    version, config = _version(folder), _experiment(ROWS_SIDE_PX)
    note("manifest")
    counts = count_manifest(version.manifest_path)
    assert (counts.images, counts.unreadable) == (MANY_ROWS, 0)
    keep_contact_sheet(version)
    note("counts and contact sheet")
    _pack_all(version, config)
    note("packing")
    return json.dumps(peaks)


def _version(folder: Path) -> DatasetVersion:
    from cv_platform.records import DatasetVersion, Provenance

    return DatasetVersion(
        provenance=Provenance(ds_name="speed", dvc_tag="v1", dvc_md5="0" * 32),
        git_commit="0" * 40,
        directory=folder,
        manifest=_build_manifest(folder).name,
        class_names=_experiment().model.classes,
    )


def _pack_all(version: DatasetVersion, config: ExperimentConfig) -> None:
    from cv_platform.compute.local import LocalEngine
    from cv_platform.datasets.packing import pack_images

    home = version.directory / "home"
    pack_images(version, config.model, quarantined=(), home=home, engine=LocalEngine(1))


if __name__ == "__main__":
    print({"peak": peak, "twice": twice, "rows": rows}[sys.argv[1]](Path(sys.argv[2])))
