from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.cli import main
from cv_platform_tests.support.pictures import class_folders, write_pictures


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def imported(source: Path, tag: str) -> None:
    assert main(["import-dataset", str(source), "--name", "pets", "--tag", tag]) == 0


def test_versions_are_listed_and_told_apart(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = class_folders(tmp_path / "source", 3)
    imported(source, "v1")
    write_pictures(source, ["cat/new.png"], first_seed=77)
    imported(source, "v2")
    capsys.readouterr()
    assert main(["dataset", "versions", "pets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["v1", "v2"]
    assert "7 files" in lines[1]
    assert main(["dataset", "diff", "pets", "v1", "v2", "--output", str(tmp_path / "found")]) == 0
    said = capsys.readouterr().out
    assert "v1 → v2: 1 added, 0 removed, 0 changed, 0 relabelled, 0 moved; 6 images are the same." in said
    assert {path.name for path in (tmp_path / "found").iterdir()} == {"differences.csv", "contact_sheet.png"}


def test_a_diff_needs_two_versions(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(class_folders(tmp_path / "source", 3), "v1")
    assert main(["dataset", "diff", "pets", "v1"]) == 1
    assert "Expected two versions to tell apart. Received: v1." in capsys.readouterr().err
