"""Servers under measurement: started, waited for, watched from outside, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.harness import Alternative, Observation
from benchmarks.load import LoadPlan, send
from cv_platform.errors import ServiceError
from cv_platform.local.http import wait_for_http

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
            cpu_seconds=after - before,
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


def process_tree(pid: int) -> list[psutil.Process]:
    """Lists a process and all below it, parents before their children; empty for a process that is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def process_tree_cpu_seconds(pid: int) -> float:
    """Returns the CPU time that a process and all below it have used, the ended children they waited for included."""
    seconds = 0.0
    for process in process_tree(pid):
        with suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            seconds += used.user + used.system + used.children_user + used.children_system
    return seconds


def process_tree_memory_bytes(pid: int) -> int | None:
    """Returns the memory (PSS: shared pages in proportion) of a process and all below it; None if that is unknown."""
    known = [memory for process in process_tree(pid) if (memory := process_memory_bytes(process.pid)) is not None]
    return sum(known) if known else None


def process_memory_bytes(pid: int) -> int | None:
    """Returns the memory (PSS) of one process; None when it is gone, or where the system does not tell (macOS)."""
    try:
        return getattr(psutil.Process(pid).memory_full_info(), "pss", None)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
