"""`cv-platform run` as people call it, on a config whose dataset does not exist."""

from __future__ import annotations

from pathlib import Path

import yaml

from cv_platform_tests.integration.demo_run import REPOSITORY, cli


def config_without_dataset(folder: Path) -> Path:
    config = yaml.safe_load((REPOSITORY / "configs" / "digits.yaml").read_text())
    config["dataset"]["dvc_tag"] = "v9.9.9"
    path = folder / "digits.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_failed_run_names_the_asset_the_reason_and_the_log(tmp_path: Path) -> None:
    result = cli({"CV_HOME": str(tmp_path / "home")}, "run", str(config_without_dataset(tmp_path)))
    logs = list((tmp_path / "home" / "logs").glob("run-digits*.log"))
    error = result.stderr.splitlines()
    assert result.returncode == 1
    assert len(logs) == 1
    assert error[0] == "error: digits/* was not materialised completely (status 1)."
    assert error[1].startswith("  digits/dataset: ")
    assert "v9.9.9" in error[1]
    assert error[-1] == f"  The whole log, with tracebacks: {logs[0]}"
    assert len(error) <= 6, result.stderr
    assert "Stack Trace" not in result.stdout + result.stderr
    assert "Stack Trace" in logs[0].read_text()
