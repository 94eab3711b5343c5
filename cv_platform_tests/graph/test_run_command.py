"""`cv-platform run` as people call it, and a run from Dagster, on a config whose dataset does not exist."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
import yaml

from cv_platform.definitions import build_defs
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage, ProductionPointer
from cv_platform_tests.support.demo_run import REPOSITORY, cli


def config_without_dataset(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    config = yaml.safe_load((REPOSITORY / "configs" / "digits.yaml").read_text())
    config["dataset"] |= {"dvc_tag": "v9.9.9", "source": None}
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


def test_a_run_that_deploys_is_refused_at_its_first_asset_where_the_service_is_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started on Dagster's page or by a sensor, where no command has looked before."""
    monkeypatch.setenv("CV_HOME", str(tmp_path / "home"))
    settings = Settings.from_environment()
    pointer = {"model_name": "cats", "version": "v", "since_utc": "2026-01-31T06:00:00Z", "experiment": "cats"}
    CentralStorage(settings.storage_url).write_pointer("image_classifier", ProductionPointer.model_validate(pointer))
    definitions = build_defs(config_without_dataset(tmp_path / "configs"))
    job = definitions.resolve_implicit_global_asset_job_def()

    def error(*assets: str) -> str:
        with dg.DagsterInstance.ephemeral() as instance:
            keys = [dg.AssetKey(["digits", asset]) for asset in assets]
            result = job.execute_in_process(asset_selection=keys, raise_on_error=False, instance=instance)
        failed = next(event for event in result.all_events if event.is_step_failure)
        return str(failed.step_failure_data.error_display_string)

    assert "belongs to the experiment cats" in error("dataset", "deployment")
    assert "v9.9.9" in error("dataset")  # What does not deploy may train as it likes.
