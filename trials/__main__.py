"""`python -m trials soak|stack|bento`: plays the phases of a trial, prints each with what was expected and received."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.options import default_output
from benchmarks.reports import run_each
from cv_platform.settings import prepare_process
from trials.options import SOAK_PHASES, STACK_EXTRA_PHASES, STACK_PHASES, Options

TRIALS = {"soak": "trials.soak.run", "stack": "trials.stack.run", "bento": "trials.bento"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Plays a trial and returns the exit status: 1 when something could not run, or did not hold."""
    parser = argparse.ArgumentParser(prog="python -m trials", description=__doc__)
    parser.add_argument("name", choices=TRIALS)
    parser.add_argument("--seed", type=int, default=0, help="of the hostile uploads")
    parser.add_argument("--scale", type=float, default=1.0, help="share of what soak does (default 1)")
    parser.add_argument(
        "--phases",
        help=f"joined by commas: of soak {','.join(SOAK_PHASES)} (default: all), of stack {','.join(STACK_PHASES)} "
        f"(default), {','.join(STACK_EXTRA_PHASES)}",
    )
    parser.add_argument("--keep", action="store_true", help="leave the stack running that stack has proven")
    parser.add_argument("--output", type=Path, help="default: $CV_HOME/benchmarks or build/benchmarks")
    options = parser.parse_args(arguments)
    default = STACK_PHASES if options.name == "stack" else SOAK_PHASES
    known = (*STACK_PHASES, *STACK_EXTRA_PHASES) if options.name == "stack" else SOAK_PHASES
    phases = default if options.phases is None else tuple(options.phases.split(","))
    if options.scale <= 0 or not set(phases) <= set(known):
        parser.error(
            f"Expected --scale > 0 and --phases of {','.join(known)}. Received: {options.scale:g}, {options.phases!r}."
        )
    prepare_process()
    output = (options.output or default_output()).absolute()
    chosen = Options(
        output=output,
        seed=options.seed,
        scale=options.scale,
        phases=phases,
        keep=options.keep,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return run_each({options.name: TRIALS[options.name]}, chosen, output)


if __name__ == "__main__":
    sys.exit(main())
