"""`python -m benchmarks [names]`: runs the benchmarks, prints tables and ratios, writes JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import UPLOADS, Options, default_output
from benchmarks.reports import run_each
from cv_platform.settings import prepare_process

# First the servers: they are measured in processes of their own, beside which no TensorFlow of ours should lie.
BENCHMARKS = {
    "predict": "benchmarks.bench_predict",
    "input-pipeline": "benchmarks.bench_input_pipeline",
    "data": "benchmarks.bench_data",
    "near-copies": "benchmarks.bench_near_copies",
    "serving": "benchmarks.bench_serving",
    "serving-short": "benchmarks.bench_serving_short",
    "runtime": "benchmarks.bench_runtime",
    "shadow": "benchmarks.bench_shadow",
    "drain": "benchmarks.bench_drain",
    "startup": "benchmarks.bench_startup",
    "gate": "benchmarks.bench_gate",
    "labels": "benchmarks.bench_labels",
    "drift": "benchmarks.bench_drift",
    "drift-window": "benchmarks.bench_drift_window",
    "false-alarms": "benchmarks.bench_false_alarms",
    "exports": "benchmarks.bench_exports",
    "unknown": "benchmarks.bench_unknown",
    "scale": "benchmarks.bench_scale",
    "stages": "benchmarks.bench_stages",
    "together": "benchmarks.bench_together",
    "log-rows": "benchmarks.bench_log_rows",
    "data-speed": "benchmarks.bench_data_speed",
    "training": "benchmarks.bench_training",
}
DEFAULT = ("predict", "input-pipeline")
"""What runs when nothing is named: the others have make targets of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is named and returns the exit status: 1 when something could not run, or a check did not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of: {', '.join(BENCHMARKS)}; default: {', '.join(DEFAULT)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each comparison (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of image order, augmentation, bootstrap, uploads")
    parser.add_argument(
        "--archive",
        type=Path,
        help="images for input-pipeline (default: photographs) and data; training: a folder",
    )
    parser.add_argument("--home", type=Path, help="CV_HOME with a deployed model, for predict (default: temporary)")
    parser.add_argument("--uploads", choices=UPLOADS, default="photos", help="what predict sends (default photos)")
    parser.add_argument("--sets", type=_listed, default=(), help="of training: grocery-20,cifar (default: all)")
    parser.add_argument(
        "--parts",
        type=_listed,
        default=(),
        help="of data-speed: stages,deepchecks,again,memory,rows; of input-pipeline: 32,224,training; of scale: "
        "memory,bare,packing,embedding,scoring; of stages: the beginnings of their names (default: all)",
    )
    parser.add_argument("--budget", type=float, help="CPU seconds of a training (default: as each set has it)")
    parser.add_argument(
        "--images",
        type=_listed,
        default=(),
        help="training images of a learning curve: 100,300,1000; near-copies: how many; data-speed: memory of few,many "
        "and how many again",
    )
    parser.add_argument(
        "--rows", type=int, help="of the larger log of log-rows, from a million on (default 10,000,000)"
    )
    parser.add_argument("--config", type=Path, help="config for training (default: as each set has it)")
    parser.add_argument("--output", type=Path, help="default: $CV_HOME/benchmarks or build/benchmarks")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown or options.rounds < 1:
        parser.error(
            f"Expected --rounds ≥ 1 and names of {', '.join(BENCHMARKS)}. Received: {options.rounds}, {unknown}."
        )
    prepare_process()
    output = (options.output or default_output()).absolute()
    chosen = Options(
        output=output,
        rounds=options.rounds,
        archive=options.archive.absolute() if options.archive else None,
        home=options.home.absolute() if options.home else None,
        uploads=options.uploads,
        seed=options.seed,
        sets=options.sets,
        parts=options.parts,
        budget=options.budget,
        images=tuple(int(count) for count in options.images),
        rows=options.rows,
        config=options.config.absolute() if options.config else None,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return run_each({name: BENCHMARKS[name] for name in options.names or DEFAULT}, chosen, output)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


if __name__ == "__main__":
    sys.exit(main())
