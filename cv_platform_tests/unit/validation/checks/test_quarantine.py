from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from cv_platform.config import ValidateConfig
from cv_platform.validation.checks import Subject, all_checks
from cv_platform.validation.quarantine_page import PAGE, TABLE
from cv_platform_tests.support.pictures import write_pictures
from cv_platform_tests.unit.validation.conftest import subject


def judged(folder: Path, make_manifest, *, refused: int = 0, used: int = 18) -> Subject:
    write_pictures(folder, ["a.png"])
    rows = [
        {"path": "a.png", "reason": "constant: all of it is RGB (7, 7, 7)", "is_readable": True},
        {"path": "<b>.png", "reason": "zero_size: 0 bytes", "is_readable": False},
    ]
    quarantined = pd.DataFrame(rows).assign(status="quarantined", problem=None, format="PNG", bytes=9)
    quarantined = quarantined.assign(labels=[["cat"], ["cat", "dog"]], width_px=8, height_px=8)
    quarantined.loc[: refused - 1, "status"] = "refused"
    manifest = make_manifest(*[(f"{at}.png", "train", ["cat"], str(at)) for at in range(used)])
    return subject(
        manifest,
        ValidateConfig(max_quarantined_fraction=0.1),
        quarantined=quarantined,
        directory=folder,
        root=folder,
        class_names=("cat", "dog"),
    )


def test_each_image_that_takes_no_part_is_named_on_a_page_and_in_a_table(tmp_path: Path, make_manifest) -> None:
    outcome = all_checks()["quarantined_images"].run(judged(tmp_path, make_manifest))
    assert (outcome.passed, outcome.value) == (True, pytest.approx(0.1))
    assert outcome.summary == "2 of 20 images take no part (10.00%): 1 constant, 1 zero_size."
    assert outcome.offenders == ("a.png: constant: all of it is RGB (7, 7, 7)", "<b>.png: zero_size: 0 bytes")
    with (tmp_path / TABLE).open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows["<b>.png"]["kind"] == "zero_size"
    assert rows["<b>.png"]["labels"] == "cat|dog"
    page = (tmp_path / PAGE).read_text()
    assert "&lt;b&gt;.png" in page
    assert page.count("data:image/jpeg") == 1


def test_too_many_or_any_of_a_kind_that_may_not_be_fail(tmp_path: Path, make_manifest) -> None:
    check = all_checks()["quarantined_images"]
    assert not check.run(judged(tmp_path, make_manifest, used=17)).passed
    outcome = check.run(judged(tmp_path, make_manifest, refused=1))
    assert not outcome.passed
    assert "There may be none that are constant (dataset.quarantine: fail), and 1 are." in outcome.summary


def test_nothing_quarantined_leaves_no_page(tmp_path: Path, make_manifest) -> None:
    outcome = all_checks()["quarantined_images"].run(subject(make_manifest(), directory=tmp_path))
    assert outcome.passed
    assert not list(tmp_path.iterdir())
