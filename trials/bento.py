"""`python -m trials bento`: Bentos that `bentoml containerize` has made images of, their log on a volume, and SIGKILL.

Twice: the asset's Bento, with a model inside, and one that `bentoml build` makes in a checkout, which serves what
storage names, on a second volume.

Needs a container engine, and an index that the build installs the Bento's requirements from. The containers use the
host's network, on a port of loopback. https://docs.bentoml.com/en/latest/get-started/packaging-for-deployment.html
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import Report, Stopwatch, machine_line
from benchmarks.installation import ORIGINAL_ARCHITECTURE, isolated_environment, isolated_settings, scratch_folder
from benchmarks.options import REPOSITORY
from benchmarks.untrained import deploy_untrained
from benchmarks.uploads import write_uploads
from cv_platform.containers import engine
from cv_platform.errors import CvPlatformError, ServiceError
from cv_platform.local.http import free_port
from cv_platform.settings import Settings
from trials.findings import Findings, wait_until
from trials.options import Options

NAME = "cv-platform-bento-trial"
"""Of the images, of the containers and of the volumes: nobody else's."""
BUILD_SECONDS = 900.0
START_SECONDS = 120.0
_USER = "1034:1034"
"""Of BentoML's images."""


@dataclass(frozen=True)
class Containers:
    """How a Bento is served: its image, its volumes by the folder where they lie, and what its environment says."""

    what: str
    image: str
    volumes: dict[str, str]
    variables: dict[str, str]

    @property
    def mounts(self) -> list[str]:
        """Options of `docker run`."""
        return [part for name, folder in self.volumes.items() for part in ("--volume", f"{name}:{folder}")]


INSIDE = Containers("with a model inside", f"{NAME}:1", {NAME: "/data"}, {"CV_HOME": "/data"})
BY_HAND = Containers(
    "built by hand",
    f"{NAME}:by-hand",
    {f"{NAME}-home": "/data/service", f"{NAME}-storage": "/data/storage"},
    {"CV_HOME": "/data/service", "CV_STORAGE": "/data/storage"},
)
"""As docs/how-to/deploy.md says."""


def run(options: Options) -> Report:
    """Builds, containerises, serves, kills and serves again; the report's checks are what was looked at.

    Raises:
        CvPlatformError: there is no engine, or the image could not be made.
    """
    clock, findings = Stopwatch(), Findings()
    with scratch_folder("bento-trial") as scratch, _removed_afterwards():
        options.say("publishing a network and building its Bento …")
        settings, version = _publish(scratch)
        model = f"trial_classifier:{version.lower()}"
        (image,) = write_uploads("photos", scratch / "uploads", count=1, seed=options.seed)
        for containers in (INSIDE, BY_HAND):
            tag = model if containers is INSIDE else _build_by_hand(scratch)
            options.say(f"{containers.what}: bentoml containerize {tag} …")
            _containerize(tag, containers, scratch)
            if containers is BY_HAND:
                _fill_storage(settings.storage_url)
            options.say(f"{containers.what}: serving, killing, serving again …")
            try:
                _kill_after_an_answer(image, containers, model, findings)
            except ServiceError as err:
                findings.add(f"{containers.what}: this trial to be played to its end", err, False)
            engine.docker("rm", "--force", NAME)
    version = engine.docker("version", "--format", "{{.Server.Version}}")
    return Report(
        name="bento",
        title="Containerised Bentos with their log on a volume",
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=f"{machine_line(('bentoml',))}, Docker {version}",
        settings={"model": model},
        observations={},
        ratios=[],
        checks=findings.checks("bento"),
    )


def _publish(scratch: Path) -> tuple[Settings, str]:
    """Publishes a network of random weights, with a Bento in `scratch/bentoml`; returns its version."""
    settings = isolated_settings(scratch / "home", scratch / "configs")
    (version,) = deploy_untrained(
        settings,
        isolated_environment(settings, database_url=""),
        scratch,
        name="trial",
        architecture=ORIGINAL_ARCHITECTURE["architecture"],
        side_px=ORIGINAL_ARCHITECTURE["input_size"]["h"],
    )
    return settings, version


def _build_by_hand(scratch: Path) -> str:
    """Types `bentoml build` at the top of the checkout; returns the tag."""
    said = _bentoml(scratch, "build", "-f", "bentofile.yaml", ".", "--output", "tag")
    return said.strip().splitlines()[-1].removeprefix("__tag__:")


def _containerize(tag: str, containers: Containers, scratch: Path) -> None:
    _bentoml(scratch, "containerize", tag, "-t", containers.image)
    own = ["--user", "0", "--entrypoint", "chown", *containers.mounts]
    engine.docker("run", "--rm", *own, containers.image, "-R", _USER, "/data")


def _bentoml(scratch: Path, *arguments: str) -> str:
    variables = {**engine.environment(), "BENTOML_HOME": str(scratch / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    command = [sys.executable, "-m", "bentoml", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
    )
    if done.returncode:
        said = (done.stdout + done.stderr)[-3000:]
        raise CvPlatformError(f"Expected bentoml {' '.join(arguments)} to end well. Received: {said}")
    return done.stdout


def _fill_storage(storage_url: str) -> None:
    """Lays the installation's central storage into the volume, for the image's user."""
    folder = BY_HAND.volumes[f"{NAME}-storage"]
    engine.docker("create", "--name", NAME, *BY_HAND.mounts, BY_HAND.image)
    engine.docker("cp", f"{storage_url.removeprefix('file://')}/.", f"{NAME}:{folder}")
    engine.docker("rm", NAME)
    own = ["--user", "0", "--entrypoint", "chown", *BY_HAND.mounts]
    engine.docker("run", "--rm", *own, BY_HAND.image, "-R", _USER, folder)


def _kill_after_an_answer(image: Path, containers: Containers, model: str, findings: Findings) -> None:
    import bentoml

    url = _serve(containers)
    client: Any = bentoml.SyncHTTPClient(url)  # Its methods are made when it starts.
    with client:
        answer = client.predict(file=image)
    said = f"{answer['model_name']}:{answer['model_version'].lower()}"
    findings.add(f"{containers.what}: BentoML's client answered by the model", said, said == model)
    engine.docker("rm", "--force", NAME)  # By SIGKILL.
    url = _serve(containers)
    found = httpx.get(f"{url}/predictions/{answer['prediction_id']}", timeout=30)
    is_same = found.status_code == 200 and found.json()["predicted_class"] == answer["predicted_class"]
    findings.add(f"{containers.what}: its answer, by another container on the volume", found.status_code, is_same)
    user = engine.docker("exec", NAME, "id", "--user")
    findings.add(f"{containers.what}: no root", f"user {user}", user != "0")


def _serve(containers: Containers) -> str:
    port = free_port()
    variables = [part for name, value in containers.variables.items() for part in ("--env", f"{name}={value}")]
    serve = ["serve", "--host", "127.0.0.1", "--port", str(port)]
    options = ["--detach", "--name", NAME, "--network", "host", *containers.mounts, *variables]
    engine.docker("run", *options, containers.image, *serve)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
        return False

    try:
        wait_until(is_ready, seconds=START_SECONDS, what=f"{url}/readyz to answer 200")
    except ServiceError as err:
        raise ServiceError(f"{err}\n{engine.log_end(NAME, 30)}") from err
    return url


@contextmanager
def _removed_afterwards() -> Iterator[None]:
    def remove() -> None:
        volumes = [name for containers in (INSIDE, BY_HAND) for name in containers.volumes]
        removals = [
            ("rm", "--force", NAME),
            *(("volume", "rm", "--force", name) for name in volumes),
            *(("rmi", "--force", containers.image) for containers in (INSIDE, BY_HAND)),
        ]
        for command in removals:
            with suppress(ServiceError):  # There is none.
                engine.docker(*command)

    engine.docker("version")
    remove()
    try:
        yield
    finally:
        remove()
