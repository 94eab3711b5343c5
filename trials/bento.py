"""`python -m trials bento`: a Bento that `bentoml containerize` has made an image of, its log on a volume, and SIGKILL.

Needs a container engine, and an index that the build installs the Bento's requirements from. The containers use the
host's network, on a port of loopback. https://docs.bentoml.com/en/latest/get-started/packaging-for-deployment.html
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.harness import Report, Stopwatch, machine_line
from benchmarks.installation import ORIGINAL_ARCHITECTURE, isolated_environment, isolated_settings, scratch_folder
from benchmarks.untrained import deploy_untrained
from benchmarks.uploads import write_uploads
from cv_platform.containers import engine
from cv_platform.errors import CvPlatformError, ServiceError
from cv_platform.local.http import free_port
from trials.findings import Findings, wait_until
from trials.options import Options

NAME = "cv-platform-bento-trial"
"""Of the image, of the container and of the volume: nobody else's."""
BUILD_SECONDS = 900.0
START_SECONDS = 120.0
_USER = "1034:1034"
"""Of BentoML's images."""


def run(options: Options) -> Report:
    """Builds, containerises, serves, kills and serves again; the report's checks are what was looked at.

    Raises:
        CvPlatformError: there is no engine, or the image could not be made.
    """
    clock, findings = Stopwatch(), Findings()
    with scratch_folder("bento-trial") as scratch, _removed_afterwards():
        options.say("publishing a network and building its Bento …")
        tag = _build(scratch)
        options.say(f"bentoml containerize {tag} …")
        _containerize(tag, scratch)
        (image,) = write_uploads("photos", scratch / "uploads", count=1, seed=options.seed)
        options.say("serving, killing, serving again …")
        try:
            _kill_after_an_answer(image, tag, findings)
        except ServiceError as err:
            findings.add("this trial to be played to its end", err, False)
    version = engine.docker("version", "--format", "{{.Server.Version}}")
    return Report(
        name="bento",
        title="A containerised Bento with its log on a volume",
        unit="request",
        started_utc=clock.started_utc,
        seconds=clock.seconds,
        machine=f"{machine_line(('bentoml',))}, Docker {version}",
        settings={"tag": tag},
        observations={},
        ratios=[],
        checks=findings.checks("bento"),
    )


def _build(scratch: Path) -> str:
    """Returns the tag of a Bento in `scratch/bentoml` with a network of random weights inside."""
    settings = isolated_settings(scratch / "home", scratch / "configs")
    side = ORIGINAL_ARCHITECTURE["input_size"]["h"]
    (version,) = deploy_untrained(
        settings,
        isolated_environment(settings, database_url=""),
        scratch,
        name="trial",
        architecture=ORIGINAL_ARCHITECTURE["architecture"],
        side_px=side,
    )
    return f"trial_classifier:{version.lower()}"


def _containerize(tag: str, scratch: Path) -> None:
    command = [sys.executable, "-m", "bentoml", "containerize", tag, "-t", f"{NAME}:1"]
    variables = {**engine.environment(), "BENTOML_HOME": str(scratch / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS)
    if done.returncode:
        raise CvPlatformError(f"Expected an image of {tag}. Received: {(done.stdout + done.stderr)[-3000:]}")
    own = ["--user", "0", "--entrypoint", "chown", "--volume", f"{NAME}:/data"]
    engine.docker("run", "--rm", *own, f"{NAME}:1", _USER, "/data")


def _kill_after_an_answer(image: Path, tag: str, findings: Findings) -> None:
    import bentoml

    url = _serve()
    client: Any = bentoml.SyncHTTPClient(url)  # Its methods are made when it starts.
    with client:
        answer = client.predict(file=image)
    said = f"{answer['model_name']}:{answer['model_version'].lower()}"
    findings.add("BentoML's client answered by the model inside", said, said == tag)
    engine.docker("rm", "--force", NAME)  # By SIGKILL.
    url = _serve()
    found = httpx.get(f"{url}/predictions/{answer['prediction_id']}", timeout=30)
    is_same = found.status_code == 200 and found.json()["predicted_class"] == answer["predicted_class"]
    findings.add("its answer, by another container on the volume", found.status_code, is_same)
    user = engine.docker("exec", NAME, "id", "--user")
    findings.add("no root", f"user {user}", user != "0")


def _serve() -> str:
    port = free_port()
    volume = ["--volume", f"{NAME}:/data", "--env", "CV_HOME=/data"]
    serve = ["serve", "--host", "127.0.0.1", "--port", str(port)]
    engine.docker("run", "--detach", "--name", NAME, "--network", "host", *volume, f"{NAME}:1", *serve)
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
        for command in (("rm", "--force", NAME), ("volume", "rm", "--force", NAME), ("rmi", "--force", f"{NAME}:1")):
            with suppress(ServiceError):  # There is none.
                engine.docker(*command)

    engine.docker("version")
    remove()
    try:
        yield
    finally:
        remove()
