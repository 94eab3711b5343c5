"""The client as its own distribution: built, installed beside httpx and nothing else, asked a served app."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest

from cv_platform_tests.support.http_client import flat_image, png
from cv_platform_tests.support.served_app import serve_app

CLIENT = Path(__file__).parents[3] / "cv_platform" / "client"
SCRIPT = """
import importlib.util, json, sys
from cv_platform.client import Client
with Client(sys.argv[1]) as client:
    result = client.predict(sys.argv[2])
    stored = client.prediction(result.prediction_id)
others = ["cv_platform.errors", "pydantic", "tensorflow", "dagster", "numpy"]
print(json.dumps([result.predicted_class, str(stored.created_on.tzinfo), [
    name for name in others if importlib.util.find_spec(name)
]]))
"""


def with_requirements(name: str) -> set[str]:
    """Returns a distribution and what it needs without extras."""
    names, new = set[str](), {name}
    while new:
        names |= new
        lines = [line for one in new for line in distribution(one).requires or [] if "extra ==" not in line]
        needed = {re.split(r"[^\w.-]", line)[0] for line in lines if 'python_version < "3.' not in line}
        new = needed - names
    return names


def install_from_here(name: str, packages: Path) -> None:
    """Copies an installed distribution's files: there is no index to ask."""
    installed = distribution(name)
    for file in installed.files or []:
        if file.parts[0] != ".." and "__pycache__" not in file.parts:
            target = packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(str(installed.locate_file(file))), target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # In a copy: a build leaves its folders in the sources.
    folder = tmp_path_factory.mktemp("wheel")
    sources = shutil.copytree(CLIENT, folder / "client", ignore=shutil.ignore_patterns("__pycache__", "build"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(sources)], check=True, timeout=120)
    return next(folder.glob("cv_platform_client-*.whl"))


def test_the_wheel_predicts_where_httpx_is_the_only_requirement(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    shutil.unpack_archive(wheel, packages, "zip")
    for name in with_requirements("httpx"):
        install_from_here(name, packages)
    image = tmp_path / "a.png"
    image.write_bytes(png(flat_image(199, 99, 99)))
    with serve_app({}) as served:
        command = [str(environment / "bin" / "python"), "-I", "-c", SCRIPT, served.url, str(image)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert run.stderr == ""
    assert json.loads(run.stdout) == ["cat", "UTC", []]


def test_the_wheel_holds_the_clients_package_alone(wheel: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[0] for line in listed.splitlines()[1:]}
    sources = {f"cv_platform/client/{path.name}" for path in [*CLIENT.glob("*.py"), CLIENT / "py.typed"]}
    assert {name for name in names if ".dist-info/" not in name} == sources


def test_both_distributions_have_one_version() -> None:
    projects = [tomllib.loads((folder / "pyproject.toml").read_text()) for folder in (CLIENT, CLIENT.parents[1])]
    assert projects[0]["project"]["version"] == projects[1]["project"]["version"]
