from __future__ import annotations

from pathlib import Path

import pytest

from cv_platform.cores import available_cores


@pytest.mark.parametrize(("text", "cores"), [("100000 100000", 1), ("150000 100000", 1), ("50000 100000", 1)])
def test_a_containers_quota_counts_as_its_cores(tmp_path: Path, text: str, cores: int):
    limit = tmp_path / "cpu.max"
    limit.write_text(text)
    assert available_cores(limit) == cores


@pytest.mark.parametrize("text", [None, "max 100000", "", "nonsense", "100000 0"])
def test_without_a_quota_all_cores_of_the_process_count(tmp_path: Path, text: str | None):
    limit = tmp_path / "cpu.max"
    if text is not None:
        limit.write_text(text)
    assert available_cores(limit) == available_cores(tmp_path / "missing") >= 1
