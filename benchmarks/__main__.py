"""`python -m benchmarks [names]`: runs the benchmarks, prints tables and ratios, writes JSON."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import table, write_report
from benchmarks.options import PHASES, REPOSITORY, STACK_EXTRA_PHASES, STACK_PHASES, UPLOADS, Options
from cv_platform.errors import CvPlatformError
from cv_platform.settings import prepare_process

# First the servers: they are measured in processes of their own, beside which no TensorFlow of ours should lie.
BENCHMARKS = {
    "predict": "benchmarks.bench_predict",
    "training-input": "benchmarks.bench_training_input",
    "serving": "benchmarks.bench_serving",
    "runtime": "benchmarks.bench_runtime",
    "soak": "benchmarks.soak.run",
    "stack": "benchmarks.stack.run",
    "startup": "benchmarks.bench_startup",
}
DEFAULT = ("predict", "training-input")
"""What runs when nothing is named: the others have make targets of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is named and returns the exit status: 1 when something could not run, or a check did not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of: {', '.join(BENCHMARKS)}; default: {', '.join(DEFAULT)}"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds of each comparison (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of image order, augmentation, bootstrap, uploads")
    parser.add_argument("--archive", type=Path, help="images for training-input instead of the built-in digits")
    parser.add_argument("--home", type=Path, help="CV_HOME with a deployed model, for predict (default: temporary)")
    parser.add_argument("--uploads", choices=UPLOADS, default="photos", help="what predict sends (default photos)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of what soak does (default 1)")
    parser.add_argument(
        "--phases",
        help=f"of soak, by letter (default {PHASES}), or of stack (default {','.join(STACK_PHASES)}; also "
        f"{','.join(STACK_EXTRA_PHASES)})",
    )
    parser.add_argument("--keep", action="store_true", help="leave the stack running that stack has proven")
    parser.add_argument("--output", type=Path, help="default: $CV_HOME/benchmarks or build/benchmarks")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown or options.rounds < 1:
        parser.error(
            f"Expected --rounds ≥ 1 and names of {', '.join(BENCHMARKS)}. Received: {options.rounds}, {unknown}."
        )
    is_stack = "stack" in options.names
    default: Sequence[str] = STACK_PHASES if is_stack else PHASES
    known: Sequence[str] = (*STACK_PHASES, *STACK_EXTRA_PHASES) if is_stack else PHASES
    phases = default if options.phases is None else options.phases.split(",") if is_stack else options.phases
    if options.scale <= 0 or not set(phases) <= set(known):
        parser.error(
            f"Expected --scale > 0 and --phases of {','.join(known) if is_stack else PHASES}. Received: "
            f"{options.scale:g}, {options.phases!r}."
        )
    prepare_process()
    chosen = Options(
        output=(options.output or default_output(os.environ.get("CV_HOME"))).absolute(),
        rounds=options.rounds,
        archive=options.archive.absolute() if options.archive else None,
        home=options.home.absolute() if options.home else None,
        uploads=options.uploads,
        seed=options.seed,
        scale=options.scale,
        phases=tuple(phases),
        keep=options.keep,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    status = 0
    for name in options.names or DEFAULT:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            report = importlib.import_module(BENCHMARKS[name]).run(chosen)
        except CvPlatformError as err:
            print(f"error: {name}: {err}", file=sys.stderr)
            status = 1
            continue
        path = write_report(report, chosen.output)
        print(f"{table(report)}\n{path}\n", flush=True)
        if not all(check.held for check in report.checks):
            status = 1
    return status


def default_output(cv_home: str | None) -> Path:
    """Returns where reports go when nobody says: below an installation that was named, else in `build/`."""
    return Path(cv_home).expanduser() / "benchmarks" if cv_home else REPOSITORY / "build" / "benchmarks"


if __name__ == "__main__":
    sys.exit(main())
