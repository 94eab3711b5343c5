"""What the kernel says and does of the service's worker processes: connections, peak of memory, their end."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.servers import process_tree


def client_ports(pid: int) -> set[int]:
    """Returns the clients' ports of the IPv4 connections that a process has open."""
    connections = psutil.Process(pid).net_connections("tcp4")
    return {one.raddr.port for one in connections if one.status == psutil.CONN_ESTABLISHED}


def kill_worker(pid: int) -> set[int]:
    """Kills a worker at once and returns the ports of the clients that were connected to it."""
    os.kill(pid, signal.SIGSTOP)  # What it has accepted then is all that it will have had.
    ports = client_ports(pid)
    os.kill(pid, signal.SIGKILL)
    return ports


def kill_service(server_pid: int) -> None:
    """Kills BentoML and all its workers, parents first, so that nothing is started again."""
    for process in process_tree(server_pid):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def forget_peak_memory(pid: int, proc: Path = Path("/proc")) -> None:
    """Makes `peak_memory_bytes` begin anew."""
    (proc / str(pid) / "clear_refs").write_text("5")  # See proc_pid_clear_refs(5).


def peak_memory_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Returns the largest resident memory (VmHWM) of a process so far."""
    for line in (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"Expected VmHWM in /proc/{pid}/status. Received: a status without it.")
