"""A copy of what the stack starts from, with an env file of its own: the user's docker/.env and stack stay untouched.

The copy's own `make stack-…` runs in it, so that what is proven is what people type.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness import available_cores
from benchmarks.options import REPOSITORY
from cv_platform.containers import engine
from cv_platform.containers.env_file import make_secrets, read_env
from cv_platform.containers.preflight import PORTS, is_free
from cv_platform.errors import ServiceError
from trials.pace import allowed

PROJECT = "cv-platform-proof"
_LEFT_OUT = {"backups", "benchmarks", "build", "cv_platform_tests", "docs", "test-artifacts"}
_PRIVATE = {".env", ".env.restoring", "tls", "__pycache__"}
"""Of the user's own stack, wherever they lie."""
COMMAND_SECONDS = 700.0
INTERRUPT_SECONDS = 20.0
_ASSIGNMENT = re.compile(r"^([A-Z_][A-Z0-9_]*)=")


class Checkout:
    """The folder in which the tested stack's commands run.

    Args:
        folder: the copy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env_file = folder / "docker" / ".env"

    @property
    def values(self) -> dict[str, str]:
        """The env file's variables."""
        return read_env(self.env_file)

    @property
    def project(self) -> str:
        """The name of the stack's project, also while its env file is destroyed."""
        return self.values["STACK_NAME"] if self.env_file.exists() else PROJECT

    def make(self, changes: Mapping[str, str]) -> None:
        """Copies the repository's files anew, and writes an env file with random secrets and free ports.

        Args:
            changes: variables that shall differ from docker/.env.example.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        # Symbolic links as such: nothing from outside the repository gets in.
        shutil.copytree(REPOSITORY, self.folder, symlinks=True, ignore=_ignored)
        example = self.folder / "docker" / ".env.example"
        values = {**own_values(read_env(example)), **changes}
        self.env_file.write_text(with_values(example.read_text(encoding="utf-8"), values), encoding="utf-8")
        self.env_file.chmod(0o600)
        make_secrets(example, self.env_file)

    def run(self, target: str, log: Path, *arguments: str, seconds: float = COMMAND_SECONDS) -> str:
        """Runs `make <target>` in the copy and returns its output, which is appended to `log` too.

        Raises:
            ServiceError: it failed, or took longer than `seconds` come to here; the message has the end of its output.
        """
        command, limit = self.command(target, *arguments), allowed(seconds)
        log.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired as err:
            raise ServiceError(f"Expected `make {target}` to end within {limit:.0f} s. Received: no end.") from err
        finally:
            if process.poll() is None:
                _interrupt(process)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n{output}\n")
        if process.returncode != 0:
            raise ServiceError(f"`make {target}` failed ({process.returncode}): {output.strip()[-2500:]}")
        return output

    def change(self, **values: str) -> None:
        """Changes variables of the env file, for the next `make stack-up`."""
        self.env_file.write_text(with_values(self.env_file.read_text(encoding="utf-8"), values), encoding="utf-8")

    def compose(self, *arguments: str) -> str:
        """Runs a Compose command of the copy and returns what it prints.

        Raises:
            ServiceError: it failed.
        """
        files = ("--file", str(self.folder / "docker" / "compose.yaml"), "--env-file", str(self.env_file))
        return engine.docker("compose", *files, *arguments, seconds=allowed(COMMAND_SECONDS))

    def remove(self) -> None:
        """Removes the stack's containers, networks and volumes, and the copy."""
        remove_project()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, target: str, *arguments: str) -> list[str]:
        """Returns the command line of `make <target>`, to be run in `folder`."""
        return ["make", "--no-print-directory", f"PYTHON={sys.executable}", target, *arguments]

    def environment(self) -> dict[str, str]:
        """Returns this process' environment without what the env file decides, and without a caller's `make`."""
        return {name: value for name, value in engine.environment().items() if name not in {"MAKEFLAGS", "MFLAGS"}}


def _interrupt(process: subprocess.Popen[str]) -> None:
    """Ends a command as Ctrl-C does, so that it tidies up, and all that is left of it after `INTERRUPT_SECONDS`."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.communicate(timeout=INTERRUPT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def remove_project() -> None:
    """Removes every container, network and volume of `PROJECT`, whatever Compose file they are of."""
    label = f"label=com.docker.compose.project={PROJECT}"
    for listing, removal in (
        (("ps", "--all", "--quiet"), ("rm", "--force", "--volumes")),
        (("network", "ls", "--quiet"), ("network", "rm")),
        (("volume", "ls", "--quiet"), ("volume", "rm", "--force")),
    ):
        found = engine.docker(*listing, "--filter", label).split()
        if found:
            engine.docker(*removal, *found, seconds=120)


def own_values(example: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that make a stack of its own: name, ports, CPUs that the machine has, no rate limit."""
    values = {"STACK_NAME": PROJECT, "BIND_ADDRESS": "127.0.0.1", "COMPOSE_PROFILES": ""}
    values |= dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    cores = available_cores()
    values |= {name: f"{cores}.0" for name, value in example.items() if name.endswith("_CPUS") and float(value) > cores}
    # All of the load comes from one address.
    return values | {"RATE_LIMIT_PER_SECOND": "10000", "RATE_LIMIT_BURST": "10000"}


def free_ports(count: int) -> list[int]:
    """Returns ports of loopback that nothing listens on, and that no client's connection will get meanwhile.

    The kernel gives clients ports from 32768 on (ip_local_port_range): one of those could be taken when the stack
    starts for the second time.
    """
    candidates = random.SystemRandom().sample(range(20_000, 30_000), 1000)
    found = [port for port in candidates if is_free("127.0.0.1", port)]
    return found[:count]


def with_values(text: str, values: Mapping[str, str]) -> str:
    """Returns the text of an env file with other values; those that it does not name come to its end."""
    left = dict(values)
    lines = []
    for line in text.splitlines():
        found = _ASSIGNMENT.match(line)
        lines.append(f"{found[1]}={left.pop(found[1])}" if found and found[1] in left else line)
    return "\n".join([*lines, *(f"{name}={value}" for name, value in left.items())]) + "\n"


def _ignored(folder: str, names: list[str]) -> set[str]:
    if Path(folder) == REPOSITORY:
        return {name for name in names if name.startswith(".") or name in _LEFT_OUT}
    return _PRIVATE & set(names)
