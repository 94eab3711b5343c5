"""The commands of `cv-platform` that need no server: what they print, and how they end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cv_platform import cli
from cv_platform.cli import main
from cv_platform.commands.import_dataset import EXAMPLE
from cv_platform.config import load_experiment
from cv_platform.errors import InvalidDatasetError
from cv_platform_tests.support.pictures import class_folders, write_pictures

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


def test_validate_config_refuses_two_files_of_one_experiment_once_and_names_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    for path in (one, two):
        shutil.copy(DIGITS, path)
    for arguments in ([one], [one, two], [tmp_path]):
        assert main(["validate-config", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count(f"{one} and {two}: expected one experiment with name: digits.") == 1


def test_an_error_says_by_its_notes_where_it_happened_and_those_of_what_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> int:
        cause = OSError("No space left.")
        cause.add_note("Of a.heic to b.heic, in a process of its own on node-1:\nTraceback (most recent call last):")
        err = InvalidDatasetError("Cannot read the images.")
        err.add_note("Of everything.")
        raise err from cause

    monkeypatch.setattr(cli, "_schema", fails)
    assert main(["schema"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: Cannot read the images.",
        "  Of everything.",
        "  Of a.heic to b.heic, in a process of its own on node-1",
    ]


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
    monkeypatch.setattr("cv_platform.local.supervisor.is_running", status)
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", out)
        with pytest.raises(BrokenPipeError, match="of a socket"):
            main(["status"])


def test_an_import_says_how_the_config_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    classes = ("yes", "no", "2024-01-31")
    source, elsewhere = class_folders(tmp_path / "pets", 2, classes), tmp_path / "else: where"

    def imported(*arguments: str, tag: str = "1.0") -> tuple[dict[str, dict[str, object]], str]:
        assert main(["import-dataset", str(source), "--name", "pets", "--tag", tag, *arguments]) == 0
        out = capsys.readouterr().out
        return yaml.safe_load(out.partition("In the config:\n")[2]), out

    # Pasted as printed, nothing is a number, a date or a truth value.
    named, model = {"ds_name": "pets", "dvc_tag": "1.0"}, {"classes": ["2024-01-31", "no", "yes"]}
    pasted, out = imported()
    assert pasted == {"dataset": named, "model": model}
    lines = out.splitlines()
    assert lines[1:5] == [
        "  understood as class folders",
        "  train, valid, test, reference: taken from all images when the dataset is used, seeded, by its fractions",
        "  images: no split 6",
        "  classes: 2024-01-31 2, no 2, yes 2",
    ]
    pasted, out = imported("--root", str(elsewhere))
    assert pasted["dataset"] == {**named, "ds_root": str(elsewhere)}
    assert f"{elsewhere} was made for it. Without --root, datasets lie in {tmp_path / 'home' / 'datasets'}." in out
    pasted, out = imported("--root", str(elsewhere))
    assert pasted["dataset"] == {**named, "ds_root": str(elsewhere)}
    assert "was made" not in out


def test_an_import_that_ignores_unknown_labels_says_so_and_is_multi_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    source = write_pictures(tmp_path / "pets", ["1.png", "2.png"])
    (source / "labels.csv").write_text("path,cat,dog\n1.png,1,\n2.png,0,1\n")
    command = ["import-dataset", str(source), "--name", "pets"]
    assert main([*command, "--tag", "v1", "--unknown", "ignore"]) == 0
    out = capsys.readouterr().out
    assert "labels.csv: 1 blank in the columns of classes are unknown (--unknown ignore)" in out
    assert "  unknown labels: dog 1\n" in out
    assert yaml.safe_load(out.partition("In the config:\n")[2])["model"]["classifier_type"] == "multi-label"
    assert main([*command, "--tag", "v2"]) == 0
    assert "1 blank in the columns of classes count as negative (--unknown negative)" in capsys.readouterr().out


def test_an_import_writes_the_config_of_what_it_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    source = class_folders(tmp_path / "source", 2, ("yes", "no", "2024-01-31"))
    written, misnamed = tmp_path / "my_pets.yaml", tmp_path / "my-pets.yaml"
    command = ["import-dataset", str(source), "--name", "pets", "--tag", "1.0", "--root", str(tmp_path / "else: where")]
    assert main([*command, "--config", str(misnamed)]) == 1
    assert "name" in capsys.readouterr().err
    assert not (tmp_path / "else: where").exists(), "nothing was imported"
    assert main([*command, "--config", str(written)]) == 0
    config, example = load_experiment(written), load_experiment(EXAMPLE)
    assert (config.name, config.model.model_name, config.deploy.service) == ("my_pets", "my_pets_classifier", "my_pets")
    assert config.model.classes == ("2024-01-31", "no", "yes")
    assert config.dataset.model_dump(exclude_defaults=True) == {
        **example.dataset.model_dump(exclude_defaults=True),
        "ds_name": "pets",
        "dvc_tag": "1.0",
        "ds_root": str(tmp_path / "else: where"),
    }
    assert config.train == example.train
    assert "# Nothing is mirrored" in written.read_text()
    assert main([*command, "--config", str(written)]) == 1
    assert "which is to be written" in capsys.readouterr().err


@pytest.mark.parametrize("fraction", ["nan", "-1", "2", "half"])
def test_the_share_that_may_be_left_out_is_a_fraction(fraction: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["import-dataset", "pets", "--name", "pets", "--tag", "v1", f"--max-left-out={fraction}"])
    assert "--max-left-out" in capsys.readouterr().err


def test_an_import_takes_its_decisions_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    source = write_pictures(tmp_path / "pets", [f"{split}/{i}.png" for split in ("train", "val") for i in range(2)])
    for split in ("train", "val"):
        (source / split / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
        rows = "file_name,big cat,dog,fold\n0.png,1,-1,0\n1.png,,1,1\na.heic,1,0,0\n"
        (source / split / "metadata.csv").write_text(rows)
    command = ["import-dataset", str(source), "--name", "pets", "--tag", "v1"]
    assert main(command) == 1
    assert "--classes big cat,dog" in capsys.readouterr().err
    assert main([*command, "--classes", "dog, big cat"]) == 1
    assert "Received: 4 images, and 2 no image that can be decoded (.heic)" in capsys.readouterr().err
    decided = ["--classes", "dog, big cat", "--use-valid-as-test", "--max-left-out", "0.4", "--unknown", "negative"]
    assert main([*command, *decided]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [
        "  understood as the label files train/metadata.csv, val/metadata.csv",
        "  the image is the column file_name",
        "  classes are the columns dog, big cat: named by --classes",
        "  not used are the columns fold",
        "  train/metadata.csv: 1 blank and 1 −1 in the columns of classes count as negative (--unknown negative)",
        "  val/metadata.csv: 1 blank and 1 −1 in the columns of classes count as negative (--unknown negative)",
        "  valid is used as test",
        "  valid, reference: taken from train when the dataset is used, seeded, by its fractions",
        "  images: train 2, test 2",
        "  classes: dog 2, big cat 2",
        "  left out: 2 no image that can be decoded (.heic), such as train/a.heic",
        "In the config:",
        "dataset:",
        '  ds_name: "pets"',
        '  dvc_tag: "v1"',
        "model:",
        '  classes: ["dog", "big cat"]',
    ]


def test_a_command_uses_the_checkouts_installation_and_names_the_one_that_lies_here(tmp_path: Path) -> None:
    (tmp_path / ".cv_platform").mkdir()
    (tmp_path / ".cv_platform" / "FORMAT_VERSION").write_text("1\n")

    def typed_here(**variables: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "cv_platform.cli", "schema"],
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "CV_HOME"} | variables,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stderr

    assert (
        typed_here()
        == f"note: {tmp_path}/.cv_platform is not used. To use it: export CV_HOME={tmp_path}/.cv_platform\n"
    )
    assert typed_here(CV_HOME=str(tmp_path / ".cv_platform")) == ""
