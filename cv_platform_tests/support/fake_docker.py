"""A `docker` that answers as a test wants it to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def fake_docker(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a `docker` of our own first on PATH: a shell script that answers as the real one does."""
    command = folder / "docker"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
