"""A Ray cluster of nodes of one core each, all on this machine: what there is to try several machines by."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cv_platform.settings import prepare_process

_STARTS = 5
"""A node's agents have 15 s to be there, which is little on a busy machine: see `compute.ray_engine`."""


@contextmanager
def ray_nodes(count: int = 2, *, takes_jobs: bool = False, cores: int = 1) -> Iterator[Any]:
    """Yields Ray's `Cluster`, whose `address` `RayEngine` takes; it ends, and this process leaves it, afterwards.

    Args:
        count: of nodes.
        takes_jobs: there is a dashboard, at `cluster.head_node.webui_url`.
        cores: of each.
    """
    prepare_process()
    import ray

    cluster = _started(count, takes_jobs, cores, _STARTS)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def _started(count: int, takes_jobs: bool, cores: int, attempts: int) -> Any:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        with socket.socket() as free:  # A port of its own for each start: the last one's server may still have its.
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cluster.add_node(num_cpus=cores, include_dashboard=takes_jobs, dashboard_port=port)
        for _ in range(count - 1):
            cluster.add_node(num_cpus=cores)
        cluster.wait_for_nodes(timeout=60)
    except Exception:  # Ray has no class of its own for it.
        cluster.shutdown()
        if attempts == 1:
            raise
        return _started(count, takes_jobs, cores, attempts - 1)
    return cluster
