"""A search tries what its space says, goes on where it was, and leaves a config that validates."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from benchmarks.ray_nodes import ray_nodes
from cv_platform.commands.tune import with_options, write_best
from cv_platform.compute.ray_engine import RayEngine
from cv_platform.config import ExperimentConfig, load_experiment
from cv_platform.errors import ConfigError, DatabaseUnavailableError, TrainingError
from cv_platform.records import PackedImages
from cv_platform.tracking import start_run
from cv_platform.training import search as searching
from cv_platform.training.search import Search, run_search, search_page, study_name
from cv_platform_tests.support import poison
from cv_platform_tests.support.tiny_training import experiment

SPACE = {
    "train.init_lr": {"low": 0.001, "high": 0.01, "log": True},
    "train.batch_size": {"low": 8, "high": 24},
    "train.optimizer": ["adam", "sgd"],
}

FLIPS: Any = [["Fliplr"], ["Flipud"]]


def searched(trials: int, **changes: Any) -> ExperimentConfig:
    return experiment(train__epochs=1, tune={"trials": trials, "space": SPACE, **changes})


@pytest.mark.xdist_group("training")
def test_a_killed_search_goes_on_and_writes_the_best_config(tiny_packed: PackedImages, tmp_path: Path) -> None:
    import optuna
    from mlflow import MlflowClient

    uri, config = f"sqlite:///{tmp_path}/mlflow.db", searched(3)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/studies.db")
    left = {"train.init_lr": 0.005, "train.batch_size": 20, "train.optimizer": "sgd"}
    with start_run(uri, "tiny", run_name="tune", artifact_root=tmp_path / "artifacts") as run:
        search = Search(tiny_packed, storage, tmp_path / "work", run)
        first = run_search(search, searched(1))
        # What a process leaves that is killed in a trial: one that runs, with its values.
        first.enqueue_trial(left)
        killed = first.ask()
        killed.suggest_float("train.init_lr", 0.001, 0.01, log=True)
        killed.suggest_int("train.batch_size", 8, 24)
        killed.suggest_categorical("train.optimizer", ["adam", "sgd"])
        study = run_search(search, config)
        again = run_search(search, config)
        parent = run.run_id

    states = [trial.state.name for trial in study.trials]
    assert (states.count("COMPLETE"), states.count("FAIL")) == (3, 1)
    assert len(again.trials) == len(study.trials)  # The budget is used: nothing more is trained.
    own, _, taken_up, _ = study.trials
    assert own.params == {"train.init_lr": 0.003, "train.batch_size": 16, "train.optimizer": "adam"}
    assert taken_up.params == left
    assert not list((tmp_path / "work").glob("trial-*"))
    client = MlflowClient(uri)
    (found,) = client.search_experiments(filter_string="name = 'tiny'")
    children = [
        one for one in client.search_runs([found.experiment_id]) if one.data.tags.get("mlflow.parentRunId") == parent
    ]
    assert sorted(one.data.metrics["trial"] for one in children) == [0, 2, 3]
    assert {one.info.status for one in children} == {"FINISHED"}

    write_best(study, config, tmp_path / "best.yaml")

    best = load_experiment(tmp_path / "best.yaml")
    assert best.with_fields({}) == config.with_fields(study.best_params)
    page = search_page(study, config)
    # Booleans: to show where a text of megabytes differs takes minutes.
    assert bool("Plotly.newPlot" in page)
    assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]*", page) == []


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_trial_that_ends_rays_workers_has_failed_and_the_others_go_on(
    tiny_packed: PackedImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    monkeypatch.setattr(searching, "_outcome", poison.trains)
    uri, storage = f"sqlite:///{tmp_path}/mlflow.db", optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/studies.db")
    with (
        start_run(uri, "tiny", run_name="tune", artifact_root=tmp_path / "artifacts") as run,
        ray_nodes(2) as cluster,
    ):
        study = run_search(
            Search(tiny_packed, storage, tmp_path / "work", run), searched(2), RayEngine(str(cluster.address))
        )
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_trials_are_trained_by_ray_as_many_at_a_time_as_it_has_cores(tiny_packed: PackedImages, tmp_path: Path) -> None:
    import optuna

    uri, storage = f"sqlite:///{tmp_path}/mlflow.db", optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/studies.db")
    with (
        start_run(uri, "tiny", run_name="tune", artifact_root=tmp_path / "artifacts") as run,
        ray_nodes(2) as cluster,
    ):
        search = Search(tiny_packed, storage, tmp_path / "work", run)
        study = run_search(search, searched(4), RayEngine(str(cluster.address)))

    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
    begun = [trial.datetime_start for trial in study.trials if trial.datetime_start]
    ended = [trial.datetime_complete for trial in study.trials if trial.datetime_complete]
    assert begun[1] < ended[0], "two at a time"
    assert begun[2] > min(ended[:2]), "the third when there is a core for it"


def test_other_data_or_another_space_is_another_study_and_a_larger_budget_is_not(tiny_packed: PackedImages) -> None:
    name = study_name(tiny_packed, searched(3))

    assert study_name(tiny_packed, searched(50, max_seconds=10)) == name
    assert study_name(tiny_packed, searched(3, metric="val_cross_entropy")) != name
    assert study_name(tiny_packed.model_copy(update={"directory": Path("/elsewhere/v2")}), searched(3)) != name


def test_trials_that_fail_are_a_part_of_the_budget(tiny_packed: PackedImages, tmp_path: Path) -> None:
    import optuna

    uri, config = f"sqlite:///{tmp_path}/mlflow.db", searched(2)
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name=study_name(tiny_packed, config), direction="maximize")
    study.add_trials([optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL) for _ in range(2)])

    with start_run(uri, "tiny", run_name="tune", artifact_root=tmp_path / "artifacts") as run:
        search = Search(tiny_packed, storage, tmp_path / "work", run)
        with pytest.raises(TrainingError, match=r"as many as tune\.trials have failed before"):
            run_search(search, config)

    assert len(study.trials) == 2


def test_a_database_that_goes_away_ends_the_search_in_words_and_it_goes_on_afterwards(
    tiny_packed: PackedImages, tmp_path: Path
) -> None:
    import optuna

    config, database = searched(2), tmp_path / "studies.db"
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    study = optuna.create_study(storage=storage, study_name=study_name(tiny_packed, config), direction="maximize")
    study.add_trials([optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL) for _ in range(2)])
    search, content = Search(tiny_packed, storage, tmp_path / "work", cast(Any, None)), database.read_bytes()

    database.write_bytes(b"no database " * 1000)
    with pytest.raises(DatabaseUnavailableError, match=r"trials of tiny-.*type the command again"):
        run_search(search, config)

    database.write_bytes(content)
    with pytest.raises(TrainingError, match="have failed before"):
        run_search(search, config)


@pytest.mark.filterwarnings("ignore:Choices for a categorical")
def test_a_space_of_whole_lists_has_a_page() -> None:
    import optuna

    config = searched(3, space={"train.augment.operations": FLIPS, "train.init_lr": [0.01, 0.02]})
    study = optuna.create_study(direction="maximize")
    for value in (0.5, 0.6, 0.7):
        trial = study.ask()
        trial.suggest_categorical("train.augment.operations", FLIPS)
        trial.suggest_categorical("train.init_lr", [0.01, 0.02])
        study.tell(trial, value)

    page = search_page(study, config)

    assert bool("Plotly.newPlot" in page)


def test_the_best_config_says_no_more_than_the_users_and_the_search(tmp_path: Path) -> None:
    import optuna

    file = tmp_path / "mine.yaml"
    model = {"model_name": "mine", "classes": ["a", "b"], "input_size": {"h": 8, "w": 8}}
    dataset = {"ds_name": "mine", "dvc_tag": "v1"}
    file.write_text(yaml.safe_dump({"name": "mine", "model": model, "dataset": dataset}))
    (tmp_path / "space.yaml").write_text("space: {train.init_lr: [0.01, 0.02]}")
    options = Namespace(space=tmp_path / "space.yaml", config=file, trials=None, max_seconds=7.0)
    config = with_options(load_experiment(file), options)
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    rate = trial.suggest_categorical("train.init_lr", [0.01, 0.02])
    study.tell(trial, 0.5)

    write_best(study, config, tmp_path / "best.yaml")

    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    tune = {"space": {"train.init_lr": [0.01, 0.02]}, "max_seconds": 7.0}
    assert best == {"name": "mine", "model": model, "dataset": dataset, "tune": tune, "train": {"init_lr": rate}}


@pytest.mark.parametrize(
    ("space", "mistake"),
    [
        ({"train.init_lr": {"low": 0.1, "high": 0.01}}, "train.init_lr: Value error, expected low < high"),
        ({"train.init_lr": {"low": 0, "high": 1, "log": True}}, "log: expected low > 0"),
        ({"train.init_lr": {"lo": 1, "high": 2}}, "lo Extra inputs"),
        ({"train.init_lrr": [1, 2]}, "train.init_lrr: expected a field of this file"),
        ({"train.epochs": {"low": -3, "high": 4}}, "train.epochs: -3.0 is none"),
        ({"train.optimizer": ["adam", "lion"]}, "train.optimizer: lion is none"),
        ({"train.optimizer": ["adam"]}, "a list of different values"),
        ({"model.input_size.h": [8, 16]}, "expected a field below train, model.architecture, model.dropout"),
        ({"train.seed": [1, 2]}, "other than train.seed"),
    ],
)
def test_an_impossible_space_is_refused_with_its_field(space: dict[str, Any], mistake: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(tune={"space": space})

    assert mistake in str(caught.value)
