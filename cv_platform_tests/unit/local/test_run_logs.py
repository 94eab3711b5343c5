"""Logs of single runs: one each, and not without limit."""

from __future__ import annotations

from pathlib import Path

from cv_platform.local.environment import KEPT_RUN_LOGS, new_run_log


def test_two_runs_of_an_experiment_share_no_log(tmp_path: Path) -> None:
    first, second = new_run_log(tmp_path / "logs", "tiny"), new_run_log(tmp_path / "logs", "tiny")
    assert first != second
    assert first.is_file()
    assert second.is_file()


def test_the_newest_logs_of_an_experiment_stay(tmp_path: Path) -> None:
    old = [tmp_path / f"run-tiny-202601{day:02}T030000Z-0000000a.log" for day in range(1, 31)]
    others = [
        tmp_path / name
        for name in ("run-tiny2-20250101T000000Z-0000000a.log", "run-tiny-notes.log", "service.log", "run-tiny.log")
    ]
    for path in (*old, *others):
        path.touch()
    new = new_run_log(tmp_path, "tiny")
    assert {*tmp_path.iterdir()} == {*old[-(KEPT_RUN_LOGS - 1) :], *others, new}
