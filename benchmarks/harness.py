"""Interleaved measurements, their ratios, the machine they were taken on, and the report of both.

A ratio of two numbers taken minutes apart measures the machine's mood. Here the alternatives take turns (A B, B A,
A B, …), so that slow drifts of the machine fall on all of them; the ratio is formed within each round and its median
over the rounds is reported, with a percentile bootstrap interval (Efron and Tibshirani, *An Introduction to the
Bootstrap*, chapter 13). The first `warm_up` rounds are thrown away. Process CPU time is the quantity to trust on a
shared machine; wall time stands beside it.

Servers and the load upon them are in `benchmarks.servers` and `benchmarks.load`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from cv_platform.cores import available_cores

BOOTSTRAP_RESAMPLES = 2000
CONFIDENCE = 0.95


class Record(BaseModel):
    """Base of what is written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Observation(Record):
    """One alternative, measured once."""

    units: int
    """Images, requests or rows that were worked off."""
    wall_seconds: float
    cpu_seconds: float | None
    """CPU time of all threads (and of a server's whole process tree); None where the system does not tell."""
    metrics: dict[str, float] = {}
    """Further quantities by name, with the unit in the name, such as `p99_ms`."""

    def values(self) -> dict[str, float]:
        """Returns every quantity of this observation by name; all but `units_per_second` are better when smaller."""
        found = {
            "units_per_second": self.units / self.wall_seconds,
            "wall_us_per_unit": 1e6 * self.wall_seconds / self.units,
        }
        if self.cpu_seconds is not None:
            found["cpu_us_per_unit"] = 1e6 * self.cpu_seconds / self.units
        return {**found, **self.metrics}


@dataclass(frozen=True)
class Alternative:
    """One of the ways that are compared."""

    name: str
    measure: Callable[[], Observation]


class Ratio(Record):
    """How many times larger a quantity is for `numerator` than for `denominator`, paired by round."""

    quantity: str
    numerator: str
    denominator: str
    median: float
    low: float
    high: float
    """`low` to `high`: the bootstrap interval of the median."""
    rounds: int

    def __str__(self) -> str:
        """Returns a line such as `cpu_us_per_unit: original / platform = 5.10 (4.90–5.30, 7 rounds)`."""
        return (
            f"{self.quantity}: {self.numerator} / {self.denominator} = {self.median:.2f} "
            f"({self.low:.2f}–{self.high:.2f}, {self.rounds} rounds)"
        )


class Check(Record):
    """What was to be, what was found, and whether that is it."""

    what: str
    expected: str
    received: str
    held: bool

    def __str__(self) -> str:
        """Returns a line such as `held    p99 / p50 at c=8: expected ≤ 3. Received: 1.6.`."""
        return (
            f"{'held  ' if self.held else 'FAILED'}  {self.what}: expected {self.expected}. Received: {self.received}."
        )


class Report(Record):
    """What one benchmark found, and on what machine."""

    name: str
    title: str
    unit: str
    """What a unit of the observations is: image, request, row."""
    started_utc: datetime
    seconds: float
    machine: str
    settings: dict[str, str | int | float | bool]
    observations: dict[str, list[Observation]]
    ratios: list[Ratio]
    checks: list[Check] = []
    """What was promised, and whether it held."""
    notes: list[str] = []


@dataclass
class Stopwatch:
    """When a benchmark began."""

    started_utc: datetime = field(default_factory=lambda: datetime.now(UTC))
    _begin: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self._begin


def interleaved_order(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yields `(round, name)`: forwards in even rounds, backwards in odd ones (A B, B A, A B, …).

    So no alternative always profits from what its predecessor left in the caches, and a linear drift cancels.
    """
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            yield index, name


def measure_interleaved(
    alternatives: Sequence[Alternative],
    *,
    rounds: int,
    warm_up: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Observation]]:
    """Measures every alternative `rounds` times in interleaved order, after `warm_up` rounds that do not count.

    Returns:
        Per name the observations, ordered by round, so that equal positions form a pair.
    """
    if rounds < 1 or warm_up < 0:
        raise ValueError(f"Expected rounds ≥ 1 and warm_up ≥ 0. Received: {rounds}, {warm_up}.")
    by_name = {alternative.name: alternative for alternative in alternatives}
    if len(by_name) != len(alternatives):
        raise ValueError(f"Expected different names. Received: {[a.name for a in alternatives]}.")
    for _, name in interleaved_order(list(by_name), warm_up):
        by_name[name].measure()
    observations: dict[str, list[Observation]] = {name: [] for name in by_name}
    for index, name in interleaved_order(list(by_name), rounds):
        observation = by_name[name].measure()
        observations[name].append(observation)
        say(f"  round {index + 1}/{rounds} {name}: {observation.units / observation.wall_seconds:,.1f} per second")
    return observations


def in_process(work: Callable[[], int]) -> Callable[[], Observation]:
    """Returns a measurement of `work`, which does something in this process and returns how many units it did."""

    def measure() -> Observation:
        begin_wall, begin_cpu = time.perf_counter(), time.process_time()
        units = work()
        return Observation(
            units=units,
            cpu_seconds=time.process_time() - begin_cpu,
            wall_seconds=time.perf_counter() - begin_wall,
        )

    return measure


def compare(
    observations: Mapping[str, Sequence[Observation]],
    numerator: str,
    denominator: str,
    quantity: str,
    *,
    seed: int = 0,
) -> Ratio | None:
    """Returns the median over rounds of `numerator`'s `quantity` over `denominator`'s; None if it was not measured."""
    pairs = [
        (above.values().get(quantity), below.values().get(quantity))
        for above, below in zip(observations[numerator], observations[denominator], strict=True)
    ]
    known = [(above, below) for above, below in pairs if above is not None and below]
    if not known:
        return None
    ratios = np.array([above / below for above, below in known])
    low, high = bootstrap_interval(ratios, seed=seed)
    return Ratio(
        quantity=quantity,
        numerator=numerator,
        denominator=denominator,
        median=float(np.median(ratios)),
        low=low,
        high=high,
        rounds=len(ratios),
    )


def bootstrap_interval(
    values: np.ndarray, *, seed: int, resamples: int = BOOTSTRAP_RESAMPLES, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the median of `values`, `(N,)`; seeded, hence repeatable."""
    if len(values) == 0:
        raise ValueError("Expected at least one value. Received: none.")
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    medians = np.median(values[drawn], axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(low), float(high)


def peak_mib() -> float:
    """Returns the most memory that this process has had in MiB, since it began or since `forget_peak`.

    Not `getrusage`'s, which begins with that of the process that started this one.
    https://man7.org/linux/man-pages/man5/proc_pid_status.5.html
    """
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Has `peak_mib` begin anew with the memory that is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def machine_line(libraries: Sequence[str]) -> str:
    """Returns one line that says what the numbers were taken on: CPU, cores, memory, Python, libraries, load."""
    parts = [
        _cpu_model(),
        f"{available_cores()} cores",
        f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
    ]
    for library in libraries:
        try:
            parts.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{library} absent")
    parts.append("load " + " ".join(f"{load:.1f}" for load in os.getloadavg()))
    return ", ".join(parts)


def table(report: Report) -> str:
    """Returns the report as text: a row per alternative with each quantity's median, ratios, checks and the machine."""
    quantities: list[str] = []
    medians: dict[str, dict[str, float]] = {}
    for name, observations in report.observations.items():
        columns: dict[str, list[float]] = {}
        for observation in observations:
            for quantity, value in observation.values().items():
                columns.setdefault(quantity, []).append(value)
        medians[name] = {quantity: float(np.median(values)) for quantity, values in columns.items()}
        quantities += [quantity for quantity in columns if quantity not in quantities]
    heads = [quantity.replace("unit", report.unit) for quantity in quantities]
    width = max((len(name) for name in medians), default=0)
    lines = [report.title]
    if medians:
        lines.append("  ".join([" " * width, *heads]))
    for name, row in medians.items():
        cells = [
            f"{row[quantity]:,.1f}".rjust(len(head)) if quantity in row else "–".rjust(len(head))
            for quantity, head in zip(quantities, heads, strict=True)
        ]
        lines.append("  ".join([name.ljust(width), *cells]))
    lines += [str(ratio).replace("unit", report.unit) for ratio in report.ratios]
    lines += report.notes
    lines += [str(check) for check in report.checks]
    if report.checks:
        lines.append(f"{sum(check.held for check in report.checks)} of {len(report.checks)} held")
    lines.append(f"{report.machine}; {report.seconds:.0f} s")
    return "\n".join(lines)


def write_report(report: Report, folder: Path) -> Path:
    """Writes the report to `folder` as JSON and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report.name}-{report.started_utc:%Y%m%dT%H%M%SZ}.json"
    path.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"
