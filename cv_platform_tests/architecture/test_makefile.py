"""What make does before there is anything: which Python it takes, what it says of others, names with spaces."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # The port "discard": nothing listens there.
SHOW_ARGUMENTS = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder of an odd name with what `make setup` reads."""
    folder = tmp_path / "100% é dir"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy2(REPOSITORY / name, folder)
    return folder


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs make as from a shell that no make has started."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # Where uv is.
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env={
            **environment,
            "XDG_CACHE_HOME": str(folder.parent / "cache"),
            "PATH": path,
            "UV_PYTHON_INSTALL_MIRROR": NOWHERE,
            "UV_HTTP_RETRIES": "0",
            **variables,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def count_as_ready(folder: Path) -> None:
    """Makes an empty folder of what `make setup` installs."""
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".ready").touch()


@pytest.mark.parametrize(
    ("target", "variable", "expected"),
    [
        ("run", "CONFIG", ["run", "{}"]),
        ("backup", "OUTPUT", ["backup", "--output", "{}"]),
        ("restore", "FILE", ["restore", "{}"]),
    ],
)
@pytest.mark.parametrize("value", ["my configs/a.yaml", '50% é/it\'s "a".yaml', "configs/a.yaml"])
@pytest.mark.parametrize("is_exported", [False, True])
def test_names_may_hold_spaces_percent_signs_and_quotes(
    checkout: Path, target: str, variable: str, expected: list[str], value: str, is_exported: bool
) -> None:
    count_as_ready(checkout)
    given = ((), {variable: value}) if is_exported else ((f"{variable}={value}",), {})
    done = make(checkout, target, *given[0], f"RUN={SHOW_ARGUMENTS}", **given[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [part.format(value) for part in expected]


@pytest.mark.parametrize(("version", "said"), [((3, 10), "3.10"), ((3, 13), "3.13"), ((2, 7), "2.7")])
def test_another_python_is_refused_with_what_to_do(checkout: Path, version: tuple[int, int], said: str) -> None:
    python = checkout / "python3"
    python.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "import sys; sys.version_info = {version}; exec(sys.argv[1])" "$2"'
    )
    python.chmod(0o755)
    done = make(checkout, f"PYTHON={python}", "setup")
    assert done.returncode == 2
    assert f"Expected Python 3.11 or 3.12. Received: {said}, {python}." in done.stderr
    assert "make PYTHON=/path/to/python3.12" in done.stderr
    assert "make PYTHON=managed" in done.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("python", ["", "/nowhere/python3.11"])
def test_no_python_at_all_is_refused_alike(checkout: Path, python: str) -> None:
    done = make(checkout, f"PYTHON={python}", "setup")
    assert done.returncode == 2
    assert "Expected Python 3.11 or 3.12. Received: none" in done.stderr


def test_a_managed_python_that_cannot_be_fetched_is_said(checkout: Path, tmp_path: Path) -> None:
    done = make(checkout, "PYTHON=managed", "setup", UV_PYTHON_INSTALL_DIR=str(tmp_path / "none"))
    assert done.returncode == 2
    assert "Expected uv to fetch Python 3.11. Received: the error above." in done.stderr
    assert NOWHERE in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_managed_python_is_found_where_uv_keeps_it(checkout: Path, tmp_path: Path) -> None:
    version, machine = platform.python_version(), platform.machine()
    kept = tmp_path / "uv" / f"cpython-{version}-linux-{machine}-gnu"
    kept.mkdir(parents=True)
    for part in Path(sys.base_prefix).iterdir():
        (kept / part.name).symlink_to(part)
    found = make(
        checkout,
        "--eval=found:\n\t@$(MANAGED)",
        "found",
        f"MANAGED_VERSION={version.rpartition('.')[0]}",
        UV_PYTHON_INSTALL_DIR=str(kept.parent),
        VIRTUAL_ENV=sys.prefix,  # Of another project, as an editor's terminal has one active.
    )
    assert found.returncode == 0, found.stderr
    python = Path(found.stdout.strip())
    assert python.is_relative_to(kept.parent)
    shown = subprocess.run([python, "-V"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert shown == f"Python {version}\n"


def create(folder: Path) -> subprocess.CompletedProcess[str]:
    """Does the step of `make setup` that makes the virtual environment, without pip, which takes seconds."""
    python = folder.parent / "python-without-pip"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@" --without-pip')
    python.chmod(0o755)
    return make(
        folder, "--eval=create:\n\t@python='$(PYTHON)'; $(CREATE); touch .venv/.ready", "create", f"PYTHON={python}"
    )


@pytest.mark.parametrize("first", ["é dir", "100% é dir"])
@pytest.mark.parametrize("second", ["moved", "moved 50%"])
def test_a_virtual_environment_is_made_anew_once_the_checkout_was_moved(
    checkout: Path, tmp_path: Path, first: str, second: str
) -> None:
    folder = checkout.rename(tmp_path / first)
    assert create(folder).returncode == 0
    assert make(folder, "--question", ".venv/.ready").returncode == 0
    moved = folder.rename(tmp_path / second)
    assert make(moved, "--question", ".venv/.ready").returncode == 1
    again = create(moved)
    assert again.returncode == 0, again.stderr
    assert make(moved, "--question", ".venv/.ready").returncode == 0


def test_packages_lie_at_a_path_without_a_percent_sign(checkout: Path) -> None:
    """Alembic fills in what follows one: neither MLflow nor Dagster could make its tables."""
    assert create(checkout).returncode == 0
    shown = make(checkout, "--eval=shown:\n\t@$(BIN)/python -c 'import sys; print(sys.prefix)'", "shown")
    assert "%" not in shown.stdout
    assert Path(shown.stdout.strip()).samefile(checkout / ".venv")
    assert "%" not in os.fspath((checkout / ".venv").resolve())
