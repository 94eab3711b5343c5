"""The code location: what a config becomes, what it costs to load, and what a broken config does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.freshness import TimeWindowFreshnessPolicy

from cv_platform.config import load_experiment
from cv_platform.definitions import build_defs
from cv_platform.defs.automation import TRAINING_ASSETS
from cv_platform.defs.resources import experiment_resource
from cv_platform.errors import ConfigError
from cv_platform.record_store import RecordStore
from cv_platform.records import DatasetVersion

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "configs" / "digits.yaml"
HEAVY = (
    "tensorflow",
    "keras",
    "mlflow",
    "deepchecks",
    "evidently",
    "bentoml",
    "imgaug",
    "dagster_mlflow",
    "sklearn",
    "dvc",
)


REPORTS = ("drift_report", "production_metrics", "labeling_queue")
GROWN = "labelled_version"


@pytest.fixture(scope="module")
def digits() -> dg.Definitions:
    return build_defs(DIGITS)


def keys(definitions: dg.Definitions) -> set[str]:
    graph = definitions.resolve_asset_graph()
    return {key.to_user_string() for key in graph.get_all_asset_keys() if key.path[0] != "observed"}


def test_a_config_becomes_fifteen_assets_under_its_name(digits: dg.Definitions) -> None:
    assert keys(digits) == {f"digits/{asset}" for asset in (*TRAINING_ASSETS, *REPORTS, GROWN)}


def test_what_others_write_is_observed_beside_it(digits: dg.Definitions) -> None:
    graph = digits.resolve_asset_graph()
    repository, log = (dg.AssetKey(["observed", f"digits_{name}"]) for name in ("dataset_repository", "request_log"))
    assert graph.observable_asset_keys == {repository, log}
    assert graph.get(repository).child_keys == {dg.AssetKey(["digits", "dataset"])}
    reports = {dg.AssetKey(["digits", name]) for name in (*REPORTS, GROWN)}
    assert graph.get(log).child_keys == reports


def test_data_walk_one_way(digits: dg.Definitions) -> None:
    graph = digits.resolve_asset_graph()
    order = [key.path[-1] for level in graph.toposorted_asset_keys_by_level for key in level]
    places = [order.index(name) for name in ("dataset", "embeddings", "validation_report", "packed_images", "model")]
    assert places == sorted(places)
    assert graph.get(dg.AssetKey(["digits", "drift_report"])).parent_keys == {
        dg.AssetKey(["digits", "deployment"]),
        dg.AssetKey(["digits", "reference_data"]),
        dg.AssetKey(["observed", "digits_request_log"]),
    }


def test_every_asset_says_what_it_is_and_whose(digits: dg.Definitions) -> None:
    graph = digits.resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.group_name == "digits"
        assert node.description
        assert node.owners == ["team:computer-vision"]
        assert node.kinds
        assert node.code_version or key.path[0] == "observed"


def test_trainings_exclude_each_other_and_reports_wait_for_none(digits: dg.Definitions) -> None:
    graph = digits.resolve_asset_graph()
    pools = {key.path[-1]: graph.get(key).pools for key in graph.get_all_asset_keys()}
    gpu = {"model", "evaluation", "drift_detectors", "reference_data"}
    assert {name for name, found in pools.items() if found == {"gpu"}} == gpu
    assert {name for name, found in pools.items() if found} == {*gpu, "deployment"}
    assert pools["deployment"] == {"pointer_image_classifier"}
    limits = yaml.safe_load((REPOSITORY / "dagster.yaml").read_text())["concurrency"]
    assert limits["pools"] == {"default_limit": 1, "granularity": "run"}
    assert "tag_concurrency_limits" not in limits["runs"]


def test_what_asks_servers_is_tried_again_and_what_only_computes_is_not(tmp_path: Path) -> None:
    text = f"{DIGITS.read_text()}\nscore: {{source: photos}}\n"
    write(tmp_path, "digits.yaml", text)
    graph = build_defs(tmp_path).resolve_asset_graph()
    retried = {
        asset.key.path[-1]: asset.node_def.retry_policy
        for asset in graph.assets_defs
        if asset.is_executable and isinstance(asset.node_def, dg.OpDefinition) and asset.node_def.retry_policy
    }
    reports = {"drift_report", "production_metrics", "labeling_queue", "batch_scores", "batch_drift_report"}
    data = {"dataset", "embeddings", "packed_images", "reference_data"}
    assert set(retried) == {"bento", "challenger_replay", "deployment", "labelled_version", *data, *reports}
    assert {policy.max_retries for policy in retried.values()} == {2}


def test_reports_become_stale_when_nobody_has_judged_a_window(digits: dg.Definitions) -> None:
    graph = digits.resolve_asset_graph()
    with_policy = {key.path[-1] for key in graph.get_all_asset_keys() if graph.get(key).freshness_policy}
    assert with_policy == {"drift_report", "production_metrics"}


@pytest.mark.parametrize(("cron", "days"), [("0 6 * * 1", 7), ("@daily", 1), ("0 6 1 * *", 31), ("0 6 * * mon-fri", 3)])
def test_a_report_is_late_two_hours_after_the_schedules_next_tick_whatever_a_window_by_hand_is(
    tmp_path: Path, cron: str, days: int
) -> None:
    content = yaml.safe_load(DIGITS.read_text())
    content["monitor"] |= {"schedule_cron": cron, "window_days": 5}
    write(tmp_path, "digits.yaml", yaml.safe_dump(content))
    graph = build_defs(tmp_path).resolve_asset_graph()
    for name in ("drift_report", "production_metrics"):
        policy = graph.get(dg.AssetKey(["digits", name])).freshness_policy
        assert isinstance(policy, TimeWindowFreshnessPolicy)
        assert policy.warn_window is not None
        assert policy.warn_window.to_timedelta() == timedelta(days=days, hours=2)
        assert policy.fail_window.to_timedelta() == timedelta(days=days + 1)


def test_errors_block_and_warnings_do_not(digits: dg.Definitions) -> None:
    graph = digits.resolve_asset_graph()
    blocking = {key.name: graph.get_check_spec(key).blocking for key in graph.asset_check_keys}
    assert blocking["unreadable_images"]
    assert blocking["train_test_leakage"]
    assert blocking["promotion_gate"]
    assert blocking["replay_holds"]
    assert blocking["false_alarm_rate"]
    assert not blocking["duplicates"]
    assert not blocking["no_drift"]
    assert not blocking["accuracy_holds_in_production"]


def test_jobs_schedule_and_sensors_are_there(digits: dg.Definitions) -> None:
    repository = digits.get_repository_def()
    assert {"digits_experiment", "digits_retrain", "digits_drift_report", "digits_grow"} <= set(repository.job_names)
    report = repository.get_job("digits_drift_report").asset_layer.selected_asset_keys
    assert {key.path[-1] for key in report} == set(REPORTS)
    schedule = repository.get_schedule_def("digits_weekly_drift_report")
    assert schedule.cron_schedule == "0 6 * * 1"
    sensors = {sensor.name: sensor.default_status for sensor in repository.sensor_defs}
    assert sensors["digits_loop"] is dg.DefaultSensorStatus.RUNNING  # It acts where loop.enabled says so.
    assert sensors["digits_new_dataset_version"] is dg.DefaultSensorStatus.STOPPED
    assert sensors["digits_new_predictions"] is dg.DefaultSensorStatus.RUNNING
    assert "run_failure" in sensors


def test_loading_imports_none_of_the_heavy_libraries() -> None:
    program = f"import sys, cv_platform.definitions\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")


def test_a_broken_file_is_one_asset_with_its_error_and_the_others_stay(tmp_path: Path) -> None:
    write(tmp_path, "digits.yaml", DIGITS.read_text())
    write(tmp_path, "broken-one.yaml", "name: x\nmodel: {}\n")
    definitions = build_defs(tmp_path)
    assert {"broken_configs/broken_one_yaml", "digits/model"} <= keys(definitions)
    node = definitions.resolve_asset_graph().get(dg.AssetKey(["broken_configs", "broken_one_yaml"]))
    assert "model.model_name: missing" in (node.description or "")
    assert not node.is_materializable


def test_an_experiment_that_dagster_refuses_is_one_asset_with_its_error_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "digits.yaml", DIGITS.read_text())
    digits = load_experiment(DIGITS)
    # Stands for whatever no validator of the config looks at.
    refused = digits.model_copy(update={"name": "refused", "owners": ("nobody",)})
    broken = tmp_path / "refused.yaml"
    loaded = {tmp_path / "digits.yaml": digits, broken: refused}
    monkeypatch.setattr("cv_platform.definitions.load_experiments", lambda files: (dict(loaded), {}))
    definitions = build_defs(tmp_path)
    dg.Definitions.validate_loadable(definitions)
    assert {"broken_configs/refused_yaml", "digits/model"} <= keys(definitions)
    assert "refused/model" not in keys(definitions)
    node = definitions.resolve_asset_graph().get(dg.AssetKey(["broken_configs", "refused_yaml"]))
    assert "DagsterInvalidDefinitionError: Invalid owner 'nobody'" in (node.description or "")
    monkeypatch.setenv("CV_STRICT_CONFIGS", "1")
    with pytest.raises(ConfigError, match=r"refused\.yaml: expected an experiment that becomes definitions"):
        build_defs(tmp_path)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("owners: [the-team]", "owners: expected e-mail addresses"),
        ("monitor: {schedule_cron: weekly}", "monitor.schedule_cron: expected five fields of cron"),
    ],
)
def test_a_wrong_cron_or_owner_is_one_asset_with_its_error_and_the_others_stay(
    tmp_path: Path, line: str, error: str
) -> None:
    write(tmp_path, "digits.yaml", DIGITS.read_text())
    text = DIGITS.read_text().replace("name: digits\n", "name: other\n", 1).partition("monitor:")[0]
    write(tmp_path, "other.yaml", f"{text}\n{line}\n".replace("digits_classifier", "other_classifier"))
    definitions = build_defs(tmp_path)
    dg.Definitions.validate_loadable(definitions)
    assert {"broken_configs/other_yaml", "digits/model"} <= keys(definitions)
    node = definitions.resolve_asset_graph().get(dg.AssetKey(["broken_configs", "other_yaml"]))
    assert error in (node.description or "")


def test_broken_files_of_almost_one_name_are_an_asset_each(tmp_path: Path) -> None:
    names = ("cats-1.yaml", "cats_1.yaml", "cats 1.yaml", "kätzchen.yaml")
    for name in names:
        write(tmp_path, name, "name: x\nmodel: {}\n")
    definitions = build_defs(tmp_path)
    dg.Definitions.validate_loadable(definitions)
    graph = definitions.resolve_asset_graph()
    described = [graph.get(key).description or "" for key in graph.get_all_asset_keys()]
    assert len(described) == len(names)
    assert all(sum(f"{name}: " in text for text in described) == 1 for name in names)


def test_two_configs_of_one_name_are_both_refused(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", DIGITS.read_text())
    write(tmp_path, "two.yaml", DIGITS.read_text())
    definitions = build_defs(tmp_path)
    assert keys(definitions) == {"broken_configs/one_yaml", "broken_configs/two_yaml"}
    node = definitions.resolve_asset_graph().get(dg.AssetKey(["broken_configs", "one_yaml"]))
    both = f"{tmp_path / 'one.yaml'} and {tmp_path / 'two.yaml'}"
    assert f"{both}: expected one experiment with name: digits" in (node.description or "")


def test_two_experiments_stand_side_by_side(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", DIGITS.read_text())
    other = (
        DIGITS.read_text()
        .replace("name: digits\n", "name: other\n", 1)
        .replace("digits_classifier", "other_classifier")
    )
    write(tmp_path, "two.yaml", f"{other}\ndeploy:\n  service: other\n")
    definitions = build_defs(tmp_path)
    dg.Definitions.validate_loadable(definitions)
    names = keys(definitions)
    assert {"digits/model", "other/model"} <= names
    assert len(names) == 30


def run_config(definitions: dg.Definitions, override: dict[str, object]) -> Any:
    job = definitions.resolve_job_def("digits_experiment")
    return dg.validate_run_config(job, {"resources": {"digits_config": {"config": override}}})


def test_an_override_changes_one_field_and_keeps_the_yaml_values(digits: dg.Definitions) -> None:
    validated = run_config(digits, {"train": {"epochs": 2}})
    train = validated["resources"]["digits_config"]["config"]["train"]
    assert train["epochs"] == 2
    assert train["optimizer"] == load_experiment(DIGITS).train.optimizer
    assert train["augment"]["rotate_degrees"] == load_experiment(DIGITS).train.augment.rotate_degrees


def test_of_a_section_within_a_section_a_run_names_what_differs(digits: dg.Definitions) -> None:
    validated = run_config(digits, {"train": {"transfer": {"freeze_until": 2}}})
    train = validated["resources"]["digits_config"]["config"]["train"]  # type: ignore[index]
    assert train["transfer"] == {
        "head": "auto",
        "freeze_until": 2,
        "rate_decay": 0.85,
        "freeze_wide_kernels": False,
    }


@pytest.mark.parametrize(
    "override",
    [{"train": {"epoch": 2}}, {"train": {"epochs": "many"}}, {"trian": {}}, {"train": {"optimizer": "magic"}}],
)
def test_wrong_overrides_are_refused_before_the_run(digits: dg.Definitions, override: dict[str, object]) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError):
        run_config(digits, override)


def test_the_resource_resolves_to_the_yamls_experiment() -> None:
    experiment = load_experiment(DIGITS)
    assert experiment_resource(experiment).resolve() == experiment


def cli(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]],
        cwd=REPOSITORY,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix, "COLUMNS": "240", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


VALIDATE = ("dagster", "definitions", "validate", "-w", "workspace.yaml")
CHECK = ("dg", "check", "defs")


def test_a_check_of_the_definitions_passes() -> None:
    """`dg check defs` is in `make check`."""
    whole = cli(*VALIDATE, CV_STRICT_CONFIGS="1")
    assert whole.returncode == 0, whole.stdout + whole.stderr


@pytest.mark.parametrize("command", [VALIDATE, CHECK], ids=["dagster", "dg"])
def test_a_check_of_the_definitions_fails_on_a_broken_config(tmp_path: Path, command: tuple[str, ...]) -> None:
    write(tmp_path, "digits.yaml", DIGITS.read_text())
    write(tmp_path, "broken.yaml", "name: x\nmodel: {}\n")
    broken = cli(*command, CV_STRICT_CONFIGS="1", CV_CONFIGS=str(tmp_path))
    assert broken.returncode != 0
    assert "model.model_name: missing" in broken.stdout + broken.stderr


def test_dg_lists_and_launches_what_there_is(tmp_path: Path) -> None:
    listed = cli("dg", "list", "defs", "--json")
    assert listed.returncode == 0, listed.stderr
    keys = {asset["asset_key"] for asset in json.loads(listed.stdout)["assets"]}
    made = {f"digits/{asset}" for asset in (*TRAINING_ASSETS, *REPORTS, GROWN)}
    assert keys == made | {f"observed/digits_{name}" for name in ("dataset_repository", "request_log", "loop")}
    home, instance = tmp_path / "home", tmp_path / "dagster"
    instance.mkdir()
    environment = {"CV_HOME": str(home), "DAGSTER_HOME": str(instance)}
    launched = cli("dg", "launch", "--assets", "key:digits/dataset", **environment)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert RecordStore(home, "digits").latest(DatasetVersion) is not None
