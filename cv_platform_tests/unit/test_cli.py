"""The commands of `cv-platform` that need no server: what they print, and how they end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cv_platform.cli import main
from cv_platform_tests.unit.datasets.conftest import class_folders

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


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [["status"], ["schema"], ["--help"], ["validate-config", str(DIGITS), "gone.yaml"]], ids=lambda a: a[0]
)
def test_a_reader_that_has_read_enough_is_no_error(tmp_path: Path, arguments: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # As `| head` does when it has its lines.
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "cv_platform.cli", *arguments],
            env={**os.environ, "CV_HOME": str(tmp_path), "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr
    assert ended.returncode == 141 or (unbuffered and arguments == ["--help"])  # argparse says nothing of it itself.


def test_a_broken_pipe_of_something_else_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def status(_: object) -> bool:
        raise BrokenPipeError("of a socket")

    monkeypatch.setenv("CV_HOME", str(tmp_path))
    monkeypatch.setattr("cv_platform.stack.supervisor.is_running", status)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        with pytest.raises(BrokenPipeError, match="of a socket"):
            main(["status"])


def test_an_import_says_how_the_config_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    source, elsewhere = class_folders(tmp_path / "pets", 2), tmp_path / "else: where"

    def imported(*arguments: str) -> tuple[dict[str, str], str]:
        assert main(["import-dataset", str(source), "--name", "pets", "--tag", "v1.0.0", *arguments]) == 0
        out = capsys.readouterr().out
        section = out.splitlines()[-1].removeprefix("In the config: ").removesuffix(", and model.classes as above.")
        return yaml.safe_load(section)["dataset"], out

    named = {"ds_name": "pets", "dvc_tag": "v1.0.0"}
    assert imported()[0] == named
    section, out = imported("--root", str(elsewhere))
    assert section == {**named, "ds_root": str(elsewhere)}
    assert f"{elsewhere} was made for it. Without --root, datasets lie in {tmp_path / 'home' / 'datasets'}." in out
    section, out = imported("--root", str(elsewhere))
    assert section == {**named, "ds_root": str(elsewhere)}
    assert "was made" not in out
