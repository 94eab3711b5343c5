from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from trials.prove_cifar import CONFIG, main, proof_settings

NOW = datetime(2026, 1, 31, 6, 0, tzinfo=UTC)


def test_proof_takes_the_named_installation_and_the_cifar_config(tmp_path: Path) -> None:
    settings = proof_settings({"CV_HOME": str(tmp_path), "CV_CONFIGS": "/elsewhere"}, NOW)
    assert settings.home == tmp_path
    assert settings.configs == CONFIG


def test_proof_makes_a_fresh_installation_when_none_is_named() -> None:
    home = proof_settings({}, NOW).home
    assert home.parts[-2:] == ("build", "prove-cifar-20260131T060000Z")
    assert not home.exists()


def test_refuses_an_archive_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    assert main([str(tmp_path / "missing.tar.gz")]) == 1
    assert "missing.tar.gz" in capfd.readouterr().err
