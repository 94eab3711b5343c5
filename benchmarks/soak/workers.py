"""What the kernel says of the service's worker processes: which there are, their connections, their peak of memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from benchmarks.servers import process_tree

_ESTABLISHED = "01"


def worker_pids(server_pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Lists the processes below BentoML's that answer requests, oldest first."""
    found: list[int] = []
    for pid in process_tree(server_pid, proc):
        try:
            arguments = (proc / str(pid) / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--worker-id" in arguments:
            found.append(pid)
    return sorted(found)


def client_ports(pid: int, proc: Path = Path("/proc")) -> set[int]:
    """Returns the clients' ports of the IPv4 connections that a process has open."""
    sockets: set[str] = set()
    for handle in (proc / str(pid) / "fd").iterdir():
        try:
            target = str(handle.readlink())
        except OSError:
            continue  # It was closed between the listing and the look.
        if target.startswith("socket:["):
            sockets.add(target[len("socket:[") : -1])
    ports: set[int] = set()
    for line in (proc / str(pid) / "net" / "tcp").read_text(encoding="ascii").splitlines()[1:]:
        # proc_net(5): number, local address, remote address, state, …; the inode is the tenth field.
        fields = line.split()
        if fields[3] == _ESTABLISHED and fields[9] in sockets:
            ports.add(int(fields[2].rpartition(":")[2], 16))
    return ports


def kill_worker(pid: int) -> set[int]:
    """Kills a worker at once and returns the ports of the clients that were connected to it."""
    os.kill(pid, signal.SIGSTOP)  # What it has accepted then is all that it will have had.
    ports = client_ports(pid)
    os.kill(pid, signal.SIGKILL)
    return ports


def kill_service(server_pid: int) -> None:
    """Kills BentoML and all its workers, parents first, so that nothing is started again."""
    for pid in process_tree(server_pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def forget_peak_memory(pid: int, proc: Path = Path("/proc")) -> None:
    """Makes `peak_memory_bytes` begin anew."""
    (proc / str(pid) / "clear_refs").write_text("5")  # See proc_pid_clear_refs(5).


def peak_memory_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Returns the largest resident memory (VmHWM) of a process so far."""
    for line in (proc / str(pid) / "status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"Expected VmHWM in /proc/{pid}/status. Received: a status without it.")
