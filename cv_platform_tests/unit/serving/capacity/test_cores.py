from pathlib import Path

import pytest

from cv_platform.serving.capacity.cores import ThreadShare, available_cores, share_cores


@pytest.mark.parametrize(
    ("cores", "workers", "chosen", "share"),
    [
        (2, 2, None, ThreadShare(1, 1)),
        (2, 1, None, ThreadShare(2, 1)),
        (16, 4, None, ThreadShare(4, 1)),
        (16, 4, 2, ThreadShare(2, 2)),
        (8, 1, 2, ThreadShare(2, 4)),
        (1, 4, None, ThreadShare(1, 1)),
        (2, 2, 8, ThreadShare(8, 1)),
        (6, 4, None, ThreadShare(1, 1)),
    ],
)
def test_workers_predictions_and_model_threads_together_fill_the_cores(
    cores: int, workers: int, chosen: int | None, share: ThreadShare
):
    assert share_cores(cores, workers=workers, predict_threads=chosen) == share


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
