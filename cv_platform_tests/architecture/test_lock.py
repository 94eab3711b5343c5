"""What is installed: the lock carries hashes and no addresses, and the Bento's requirements are a part of it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
LOCK = (REPOSITORY / "requirements.lock").read_text()
PIN = re.compile(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^\s;]+)", re.MULTILINE)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(text: str) -> dict[str, str]:
    return {canonical(name): version for name, version in PIN.findall(text)}


def test_every_locked_package_has_a_hash() -> None:
    entries = re.split(r"\n(?=\S)", LOCK.strip())
    without = [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry]
    assert without == []
    assert len(entries) > 100


def test_the_lock_names_no_address() -> None:
    assert "://" not in LOCK
    assert "--index" not in LOCK


def test_the_lock_holds_every_direct_dependency() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    direct = {canonical(re.split(r"[^A-Za-z0-9_.-]", line)[0]) for line in project["project"]["dependencies"]}
    assert direct <= set(pins(LOCK))


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-tensorflow.txt"])
def test_the_bentos_requirements_are_a_part_of_the_lock(name: str) -> None:
    requirements = pins((REPOSITORY / "bentos" / "image_classifier" / name).read_text())
    locked = pins(LOCK)
    assert requirements
    assert {name: locked.get(name) for name in requirements} == requirements


def test_every_cap_has_its_reason() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    dependencies = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    capped = [line.strip() for line in dependencies.splitlines() if re.search(r",<|==", line)]
    assert [line for line in capped if "#" not in line] == []
    assert len(capped) > 10
