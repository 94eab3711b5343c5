from __future__ import annotations

from pathlib import Path

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from cv_platform.compute.blas import one_blas_thread
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


def test_products_of_matrices_stay_in_one_thread_for_a_while() -> None:
    def most_threads() -> int:
        return max(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")

    with threadpool_limits(2, user_api="blas"):
        assert most_threads() == 2
        assert one_blas_thread()(most_threads)() == 1
        assert most_threads() == 2
