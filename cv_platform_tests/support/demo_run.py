"""`make demo` run once, for every suite that needs an installation with a trained, deployed and monitored model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cv_platform.local.http import free_port
from cv_platform.record_store import RecordStore
from cv_platform.records import Record
from cv_platform.settings import Settings
from cv_platform_tests.support.proxies import Counted, counting_server, proxy_variables

R = TypeVar("R", bound=Record)
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Demo:
    """What a run of the demo left."""

    status: int
    output: str
    home: Path
    config: Path
    settings: Settings
    proxied: list[str]
    """What its processes asked of a proxy that leads nowhere."""

    def record(self, kind: type[R]) -> R:
        found = RecordStore(self.home, "digits").latest(kind)
        assert found is not None
        return found


@dataclass(frozen=True)
class Stack:
    """What `make up` runs."""

    variables: dict[str, str]
    """Its home and ports, and a proxy for everything."""
    settings: Settings
    proxy: Counted
    """Where everything would go that does not know this machine's own addresses. It leads nowhere."""


def cli(variables: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a `cv-platform` command of the repository with these variables added to the environment.

    What MLflow has left there in this process is not: the command would log its runs somewhere else.
    """
    return subprocess.run(
        [sys.executable, "-m", "cv_platform.cli", *arguments],
        cwd=REPOSITORY,
        env={**{name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )


def proxied_by(proxy: Counted) -> dict[str, str]:
    """Returns variables that send everything to a proxy, as of somebody who has never heard of `NO_PROXY`, or of CI."""
    return {**proxy_variables(proxy.url), "NO_PROXY": "", "no_proxy": "", "CI": ""}


@contextmanager
def finished_demo() -> Iterator[Demo]:
    # Not below pytest's own folder, which is closed to the unprivileged user that runs PostgreSQL for root.
    folder = Path(tempfile.mkdtemp(prefix="cv-demo 100% é "))
    folder.chmod(0o711)
    config = REPOSITORY / "configs" / "digits.yaml"
    variables = {"CV_HOME": str(folder / "home"), "CV_CONFIGS": str(config)}
    try:
        with counting_server(status=502) as proxy:
            result = cli({**variables, **proxied_by(proxy)}, "demo")
        yield Demo(
            result.returncode,
            result.stdout + result.stderr,
            folder / "home",
            config,
            Settings.from_environment(variables),
            proxy.asked,
        )
    finally:
        shutil.rmtree(folder)


@contextmanager
def running_stack(demo: Demo) -> Iterator[Stack]:
    assert demo.status == 0, demo.output
    ports = ("CV_SERVICE_PORT", "CV_DAGSTER_PORT", "CV_MLFLOW_PORT", "CV_EVIDENTLY_PORT")
    with counting_server(status=502) as proxy:
        variables = {
            "CV_HOME": str(demo.home),
            "CV_CONFIGS": str(demo.config),
            "CV_SERVICE_WORKERS": "1",
            **{name: str(free_port()) for name in ports},
            **proxied_by(proxy),
        }
        started = cli(variables, "up")
        try:
            assert started.returncode == 0, started.stdout + started.stderr
            yield Stack(variables, Settings.from_environment(variables), proxy)
        finally:
            cli(variables, "down")
