"""The drift report of a window of 100,000 requests: its CPU time and its memory, in a process of its own.

Requests and reference are drawn from the same distributions, with vectors as a network of ten classes has them; of the
window, `monitor.max_samples` rows are judged, as by default, and the report is written and kept as a scheduled one is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from sqlalchemy import text

from benchmarks.harness import Check, Report, Stopwatch, machine_line, peak_mib
from benchmarks.installation import isolated_settings, scratch_folder
from benchmarks.options import Options
from cv_platform.config import ExperimentConfig, parse_experiment
from cv_platform.database.connection import make_engine
from cv_platform.drift.reference import ReferenceIdentity, write_reference
from cv_platform.drift.sample import DriftSample
from cv_platform.images import preprocessing_hash
from cv_platform.monitoring.report import ReportPlace, make_drift_report
from cv_platform.records import ModelIdentity
from cv_platform.settings import prepare_process
from cv_platform.storage import CentralStorage

REQUESTS, REFERENCE = 100_000, 5_000
MOST_CPU_SECONDS, MOST_MIB = 60.0, 1_000.0
CLASSES = tuple(f"class {number}" for number in range(10))
MODEL = ModelIdentity(model_name="simulated", version="20250101T000000Z-00000001")
END = datetime(2026, 1, 1, tzinfo=UTC)
_UNIFORM = "(SELECT array_agg({value}::real) FROM generate_series(1, {width}) AS at WHERE n > 0)"
_PROBABILITIES = """
(SELECT array_agg((part / whole)::real) FROM (SELECT part, sum(part) OVER () AS whole
 FROM (SELECT -ln(1 - random()) AS part FROM generate_series(1, 10) AS at WHERE n > 0) AS drawn) AS shares)
"""
_ROWS = f"""
INSERT INTO predictions (prediction_id, model_name, model_version, predicted_class, prediction_json, uae_feats,
    bbsd_feats, features, properties, created_on, logged_on)
SELECT gen_random_uuid(), '{MODEL.model_name}', '{MODEL.version}', 'class ' || mod(n, 10), '{{}}'::jsonb,
    {_UNIFORM.format(value="random()", width=32)}, {_PROBABILITIES},
    {_UNIFORM.format(value="greatest(0, random() - 0.5)", width=128)}, {_UNIFORM.format(value="random()", width=7)},
    moment, moment
FROM (SELECT n, timestamptz '{END.isoformat()}' - interval '7 days' * ((n - 0.5) / {REQUESTS}) AS moment
      FROM generate_series(1, {REQUESTS}) AS n) AS simulated
"""


def run(options: Options) -> Report:
    """Fills a request log, has a report made of it, and judges what that took.

    Raises:
        CvPlatformError: the report could not be made.
    """
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    clock = Stopwatch()
    with scratch_folder("bench-drift-window") as place:
        with database_url(isolated_settings(place / "home", place / "configs")) as url:
            migrate(url)
            engine = make_engine(url)
            with engine.begin() as connection:
                connection.execute(text(_ROWS))
            engine.dispose()
            _write_reference(place / "reference.parquet", np.random.default_rng(options.seed))
            command = [sys.executable, "-m", "benchmarks.bench_drift_window", str(place)]
            done = subprocess.run(command, check=True, input=url, stdout=subprocess.PIPE, text=True)
        taken = json.loads(done.stdout.splitlines()[-1])
    limits = (
        ("CPU seconds of the report", taken["cpu_seconds"], MOST_CPU_SECONDS),
        ("MiB of memory at its peak", taken["mib"], MOST_MIB),
    )
    return Report(
        name="drift-window",
        title=f"The drift report of a window of {REQUESTS:,} requests",
        unit="report",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=machine_line(("evidently", "scipy")),
        settings={"requests": REQUESTS, "reference": REFERENCE, "seed": options.seed},
        observations={},
        ratios=[],
        checks=[
            Check(what=what, expected=f"≤ {most:g}", received=f"{value:.1f}", held=value <= most)
            for what, value, most in limits
        ],
        notes=[f"{taken['verdict']}; {taken['rows']:,} rows judged of {taken['requests']:,}; {taken['seconds']:.1f} s"],
    )


def make_report(place: Path, url: str) -> dict[str, object]:
    """Makes the report in this process, and returns what it took."""
    begun, begun_cpu = time.perf_counter(), time.process_time()
    report = make_drift_report(
        _config(),
        MODEL,
        place / "reference.parquet",
        engine=make_engine(url),
        place=ReportPlace(CentralStorage(place / "storage"), place / "evidently", place / "home"),
        now=END,
    )
    return {
        "verdict": report.verdict,
        "rows": report.rows,
        "requests": report.requests,
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - begun_cpu,
        "mib": peak_mib(),
    }


def _config() -> ExperimentConfig:
    model = {"model_name": MODEL.model_name, "classes": CLASSES, "input_size": {"h": 32, "w": 32}}
    dataset = {"ds_name": "simulated", "dvc_tag": "v1"}
    return parse_experiment({"name": "simulated", "model": model, "dataset": dataset}, origin="the benchmark")


def _write_reference(path: Path, generator: np.random.Generator) -> None:
    shares = generator.dirichlet(np.ones(len(CLASSES)), REFERENCE)
    sample = DriftSample(
        shares.astype(np.float32),
        np.maximum(generator.random((REFERENCE, 128)) - 0.5, 0).astype(np.float32),
        generator.random((REFERENCE, 32)).astype(np.float32),
        generator.random((REFERENCE, 7)).astype(np.float32),
    )
    names = [str(number) for number in range(REFERENCE)]
    predicted = [CLASSES[number % len(CLASSES)] for number in range(REFERENCE)]
    identity = ReferenceIdentity(
        model_name=MODEL.model_name,
        model_version=MODEL.version,
        preprocessing_hash=preprocessing_hash((32, 32)),
        encoder_hash="0" * 16,
        class_names=CLASSES,
    )
    write_reference(path, identity, sample, paths=names, sha256=names, labels=predicted, predicted=predicted)


if __name__ == "__main__":
    prepare_process()
    print(json.dumps(make_report(Path(sys.argv[1]), sys.stdin.read())))
