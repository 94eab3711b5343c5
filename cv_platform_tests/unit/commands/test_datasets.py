from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

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


def test_a_diff_draws_12_bit_images_by_the_bits_that_are_declared(home: Path, tmp_path: Path) -> None:
    source = class_folders(tmp_path / "source", 3)
    imported(source, "v1")
    cv2.imwrite(str(source / "cat" / "deep.png"), np.full((16, 16), 4095, np.uint16))
    imported(source, "v2")
    brightness = list[float]()
    for bits in ([], ["--sample-bits", "12"]):
        assert main(["dataset", "diff", "pets", "v1", "v2", "--output", str(tmp_path / "found"), *bits]) == 0
        brightness.append(float(cv2.imread(str(tmp_path / "found" / "contact_sheet.png")).mean()))
    assert brightness[1] > brightness[0] + 10


def test_a_dataset_is_validated_reviewed_and_relabelled_without_dagster(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for at in range(160):
        is_dark = at % 2
        pixels = generator.integers(0, 60, (16, 16, 3)) + (0 if is_dark else 150)
        folder = tmp_path / "source" / ("bright" if at == 21 or not is_dark else "dark")  # The 21st is wrong.
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{at}.png"), pixels.astype(np.uint8))
    imported(tmp_path / "source", "v1")
    config = tmp_path / "pets.yaml"
    experiment = {
        "name": "pets",
        "model": {"model_name": "pets", "classes": ["bright", "dark"], "input_size": {"h": 16, "w": 16}},
        "dataset": {"ds_name": "pets", "dvc_tag": "v1"},
        "encoder": {"input_px": 32},
        "validate": {"deepchecks_suites": "off", "train_test_leakage": "warn"},
    }
    config.write_text(yaml.safe_dump(experiment))
    capsys.readouterr()
    assert main(["validate", str(config)]) == 0
    said = capsys.readouterr().out
    assert "images/bright/21.png: labelled bright" not in said, "the console has the summaries"
    assert "1 of 160 labels are likely wrong" in said
    page = Path(next(line for line in said.splitlines() if line.endswith("label_issues.html")))
    rows = json.loads(page.read_text().split('id="review">')[1].split("</script>")[0])["rows"]
    assert [(row["path"], row["given"], row["likely"]) for row in rows] == [("images/bright/21.png", "bright", "dark")]
    review = tmp_path / "reviewed.csv"
    review.write_text(f"path,sha256,given,decision,label\n{rows[0]['path']},{rows[0]['sha256']},bright,relabel,dark\n")
    assert main(["relabel", str(config), "--from", str(review), "--tag", "v2"]) == 0
    assert 'dvc_tag: "v2"' in capsys.readouterr().out
    experiment["dataset"]["dvc_tag"] = "v2"
    config.write_text(yaml.safe_dump(experiment))
    assert main(["relabel", str(config), "--from", str(review)]) == 0
    assert "pets v2 has these labels already" in capsys.readouterr().out
    assert main(["validate", str(config)]) == 0
    assert "0 of 160 labels are likely wrong" in capsys.readouterr().out


def test_validate_fails_with_the_blocking_check(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "pets.yaml"
    model = {"model_name": "pets", "classes": ["cat", "dog"], "input_size": {"h": 16, "w": 16}}
    checks = {"deepchecks_suites": "off", "label_issues": "off", "min_images_per_class": 1000}
    dataset = {"ds_name": "pets", "dvc_tag": "v1"}
    config.write_text(yaml.safe_dump({"name": "pets", "model": model, "dataset": dataset, "validate": checks}))
    imported(class_folders(tmp_path / "source", 10), "v1")
    capsys.readouterr()
    assert main(["validate", str(config)]) == 1
    assert "FAILED   class_coverage: Expected at least 1000 images" in capsys.readouterr().out


def test_a_diff_needs_two_versions(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(class_folders(tmp_path / "source", 3), "v1")
    assert main(["dataset", "diff", "pets", "v1"]) == 1
    assert "Expected two versions to tell apart. Received: v1." in capsys.readouterr().err
