"""Runs modules that measure or prove something, prints their tables, and keeps their reports."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import table, write_report
from cv_platform.errors import CvPlatformError


def run_each(modules: Mapping[str, str], options: Any, output: Path) -> int:
    """Calls `run(options)` of each module and returns the exit status: 1 when one could not run, or a check failed."""
    status = 0
    for name, module in modules.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            report = importlib.import_module(module).run(options)
        except CvPlatformError as err:
            print(f"error: {name}: {err}", file=sys.stderr)
            status = 1
            continue
        path = write_report(report, output)
        print(f"{table(report)}\n{path}\n", flush=True)
        if not all(check.held for check in report.checks):
            status = 1
    return status
