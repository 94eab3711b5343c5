"""Shards by the million, which are small: what a driver holds of them is seen by its memory (`peak_of`)."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from benchmarks.harness import peak_mib
from cv_platform.compute import map_shards
from cv_platform.compute.local import LocalEngine


@dataclass(frozen=True)
class Entry:
    """A shard of one image."""

    name: str
    images: int = 1


def length(entry: Entry) -> int:
    """Returns something small of a shard."""
    return len(entry.name)


def give_out(count: int) -> float:
    """Has two other processes work on so many shards, and returns this one's peak memory in MiB."""
    entries = (Entry(f"images/class{number % 100}/{number:09}.jpg") for number in range(count))
    engine = LocalEngine(2, worth_seconds=0)
    assert sum(1 for _ in map_shards(length, entries, engine=engine, title="Entries", total=count)) == count
    return peak_mib()


def peak_of(count: int) -> float:
    """Returns the peak memory in MiB of a process that does nothing but `give_out`."""
    code = f"from benchmarks.entries import give_out; print(give_out({count}))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout)
