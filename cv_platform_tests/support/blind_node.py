"""A Ray cluster of which a node does not see a folder of this machine, and has a CV_HOME of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.ray_nodes import ray_nodes
from cv_platform.compute.ray_engine import RayEngine
from cv_platform_tests.support.waiting import wait_until


@contextmanager
def blind_cluster(hidden: Path, home: Path, *, seeing: int = 0) -> Iterator[RayEngine]:
    """Yields an engine whose tasks find nothing at `hidden`, as another file system lies there for them alone.

    So many cores more are of a node that sees it.

    A mount namespace does that; a user namespace lets those mount who are not root. See unshare(1). Where neither is
    allowed (in a container, or by AppArmor), the test is skipped.
    """
    unshare = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount"]
    tried = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{shlex.join(unshare)}: {tried.stderr.strip()}")
    hidden.mkdir(parents=True, exist_ok=True)
    with ray_nodes(1, cores=seeing) as cluster:
        ray = [str(Path(sys.executable).with_name("ray")), "start", f"--address={cluster.address}", "--block"]
        script = f"mount -t tmpfs tmpfs {shlex.quote(str(hidden))} && exec {shlex.join([*ray, '--num-cpus=1'])}"
        environment = {**os.environ, "CV_HOME": str(home)}
        log = home.with_suffix(".log")
        with log.open("wb") as said:
            node = subprocess.Popen([*unshare, "sh", "-c", script], env=environment, stdout=said, stderr=said)
        try:
            engine = RayEngine(str(cluster.address))

            def is_there() -> bool:
                assert node.poll() is None, log.read_text()
                return len(engine.ask(os.getpid)) == 1 + bool(seeing)

            wait_until(is_there, seconds=120)
            yield engine
        finally:
            node.terminate()
            node.wait(timeout=60)
