"""The commands of `cv-platform` that need no server: what they print, and how they end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cv_platform.cli import main

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "configs" / "digits.yaml"


def test_validate_config_takes_folders_and_goes_on_after_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.yaml").touch()
    shutil.copy(DIGITS, tmp_path / "mine.yaml")
    (tmp_path / "bare").mkdir()
    arguments = [str(tmp_path / "gone.yaml"), str(tmp_path), str(tmp_path / "bare")]
    assert main(["validate-config", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'mine.yaml'}: experiment digits, 10 classes\n"
    missing, empty, bare = captured.err.splitlines()
    assert missing.startswith(f"error: {tmp_path / 'gone.yaml'}: expected a YAML file. Received: nothing there")
    assert empty.startswith(f"error: {tmp_path / 'empty.yaml'}: expected sections")
    assert bare.startswith(f"error: {tmp_path / 'bare'}: expected YAML files in this folder")
    assert main(["validate-config", str(tmp_path / "mine.yaml")]) == 0
