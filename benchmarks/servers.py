"""Servers under measurement: started, waited for, watched from outside through /proc, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Alternative, Observation
from benchmarks.load import LoadPlan, send
from cv_platform.errors import ServiceError
from cv_platform.stack.http import wait_for_http

STOP_SECONDS = 30.0
_POLL_SECONDS = 0.02
"""The time to the first healthy answer is measured."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    pid: int
    base_url: str


@contextmanager
def serving(
    name: str,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    base_url: str,
    health_path: str,
    log: Path,
    start_seconds: float = 180.0,
) -> Iterator[Server]:
    """Runs a server from its first healthy answer to the end of the block; its output goes to `log`.

    Raises:
        ServiceError: it did not answer in time; the message ends with the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            list(command), env=dict(environment), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        try:
            wait_for_http(
                base_url + health_path,
                seconds=start_seconds,
                alive=lambda: process.poll() is None,
                every_seconds=_POLL_SECONDS,
            )
        except ServiceError as err:
            end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise ServiceError(f"{name} did not start: {err}\nThe end of {log}:\n{end}") from err
        yield Server(name, process.pid, base_url)
    finally:
        _stop(process)


def under_load(
    server: Server,
    images: Sequence[Path],
    *,
    concurrency: int,
    seconds: float,
    minimum_requests: int,
    path: str = "/predict",
    on_answers: Callable[[int], None] = lambda answers: None,
) -> Callable[[], Observation]:
    """Returns a measurement of `server`: requests per second, latencies, CPU time of its process tree.

    Args:
        server: what is loaded.
        images: files sent in turn.
        concurrency: requests in flight.
        seconds: how long new ones are sent.
        minimum_requests: sent at least.
        path: where they are posted.
        on_answers: told the number of requests answered with 200, warm-up included.

    Raises:
        ServiceError: when the measurement is taken, a request was not answered with 200: its speed would mean nothing.
    """
    plan = LoadPlan(
        url=server.base_url + path,
        images=list(images),
        concurrency=concurrency,
        seconds=seconds,
        minimum_requests=minimum_requests,
    )

    def measure() -> Observation:
        before = process_tree_cpu_seconds(server.pid)
        result = send(plan)
        after = process_tree_cpu_seconds(server.pid)
        on_answers(result.statuses.get(200, 0))
        if result.failures:
            raise ServiceError(
                f"{server.name}: expected 200 for every request. Received: {result.statuses}. See its log."
            )
        return Observation(
            units=result.requests,
            wall_seconds=result.wall_seconds,
            cpu_seconds=None if before is None or after is None else after - before,
            metrics={
                "p50_ms": result.percentile_ms(50),
                "p99_ms": result.percentile_ms(99),
                "answer_kb": result.answer_bytes / result.requests / 1e3,
            },
        )

    return measure


def all_under_load(
    servers: Mapping[str, Server],
    images: Sequence[Path],
    loads: Sequence[tuple[int, float, int]],
    answered: dict[str, int],
) -> list[Alternative]:
    """Returns a measurement `<name>, c=<concurrency>` of each server under each load, by `under_load`.

    Args:
        servers: by name.
        images: files sent in turn.
        loads: requests in flight, seconds, at least so many requests.
        answered: by name; receives the answers with status 200, those of warm-ups included.
    """

    def count(name: str, answers: int) -> None:
        answered[name] += answers

    return [
        Alternative(
            f"{name}, c={concurrency}",
            under_load(
                server,
                images,
                concurrency=concurrency,
                seconds=seconds,
                minimum_requests=minimum,
                on_answers=lambda answers, name=name: count(name, answers),
            ),
        )
        for concurrency, seconds, minimum in loads
        for name, server in servers.items()
    ]


def process_tree_cpu_seconds(pid: int, proc: Path = Path("/proc")) -> float | None:
    """Returns the CPU time that a process and all below it have used, their ended children included.

    None where there is no /proc (macOS). See proc_pid_stat(5).
    """
    table = _process_table(proc)
    if pid not in table:
        return None
    ticks = sum(table[member].ticks for member in _tree(pid, table))
    return ticks / os.sysconf("SC_CLK_TCK")


def process_tree_memory_bytes(pid: int, proc: Path = Path("/proc")) -> int | None:
    """Returns the memory (PSS: shared pages in proportion) of a process and all below it; None without /proc."""
    table = _process_table(proc)
    if pid not in table:
        return None
    return sum(process_memory_bytes(member, proc) or 0 for member in _tree(pid, table))


def process_memory_bytes(pid: int, proc: Path = Path("/proc")) -> int | None:
    """Returns the memory (PSS) of one process; None when it is gone, or without /proc."""
    try:
        rollup = (proc / str(pid) / "smaps_rollup").read_text(encoding="utf-8")
    except OSError:
        return None
    return sum(1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


@dataclass(frozen=True)
class _Process:
    parent: int
    ticks: int
    """User and system time in clock ticks, its own and that of the children it has waited for."""


def _process_table(proc: Path) -> dict[int, _Process]:
    table: dict[int, _Process] = {}
    if not proc.is_dir():
        return table
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # It ended between the listing and the look.
        # The second field, the command in brackets, may hold spaces and brackets; what follows starts at field 3.
        fields = stat.rpartition(")")[2].split()
        table[int(folder.name)] = _Process(parent=int(fields[1]), ticks=sum(int(value) for value in fields[11:15]))
    return table


def process_tree(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Lists a process and all below it, parents before their children; empty for a process that is gone."""
    table = _process_table(proc)
    return _tree(pid, table) if pid in table else []


def _tree(pid: int, table: Mapping[int, _Process]) -> list[int]:
    children: dict[int, list[int]] = {}
    for child, process in table.items():
        children.setdefault(process.parent, []).append(child)
    members: list[int] = []
    todo = [pid]
    while todo:
        member = todo.pop()
        members.append(member)
        todo += children.get(member, [])
    return members


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
