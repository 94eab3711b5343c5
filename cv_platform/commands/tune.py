"""`cv-platform tune`: searches for a better recipe, and writes it as a config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cv_platform.compute import open_engine
from cv_platform.config import ExperimentConfig, load_beside_others, load_experiment, parse_experiment
from cv_platform.errors import ConfigError, LockHeldError, StorageError, TrainingError
from cv_platform.files import exclusive, whole_file, write_file
from cv_platform.record_store import RecordStore
from cv_platform.records import PackedImages
from cv_platform.settings import Settings

if TYPE_CHECKING:
    import optuna

_SCHEMA = "tune"
"""Of Optuna's tables in the request log's database."""


def add_command(command: Callable[[str, object, str], argparse.ArgumentParser]) -> None:
    """Adds the command; `command` makes one of its name, function and description."""
    tune = command("tune", _tune, "search for a better recipe over the fields that the section tune names")
    tune.add_argument("config", type=Path, help="a YAML file, such as configs/digits.yaml")
    tune.add_argument("--space", type=Path, help="a YAML file with the content of the section tune, in its place")
    tune.add_argument("--trials", type=int, help="in the place of tune.trials")
    tune.add_argument("--max-seconds", type=float, help="in the place of tune.max_seconds")
    tune.add_argument("--output", type=Path, help="the best config (default: $CV_HOME/tune/<experiment>/best.yaml)")


def _tune(options: argparse.Namespace) -> int:
    settings = Settings.from_environment().model_copy(update={"configs": options.config.absolute()})
    config = with_options(load_beside_others(options.config), options)
    folder = settings.home / "tune" / config.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(folder / ".lock", timeout_seconds=0.0):
            _search(settings, config, folder, output=options.output or folder / "best.yaml")
    except LockHeldError as err:
        raise TrainingError(
            f"Expected one search of {config.name} at a time. Received: a second, while the first holds "
            f"{folder / '.lock'}. Wait for it, or stop it; then this one goes on from there."
        ) from err
    return 0


def with_options(config: ExperimentConfig, options: argparse.Namespace) -> ExperimentConfig:
    """Returns the config with the search that the command line asks for; what the user's file leaves open stays so."""
    tune = config.tune.model_dump(mode="json", exclude_unset=True)
    if options.space is not None:
        try:
            tune = yaml.safe_load(options.space.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as err:
            raise ConfigError(f"{options.space}: expected a readable YAML file. Received: {err}.") from err
        if not isinstance(tune, dict):
            raise ConfigError(f"{options.space}: expected the content of the section tune. Received: {tune!r:.80}.")
        tune = tune.get("tune", tune)
    given = {"trials": options.trials, "max_seconds": options.max_seconds}
    tune = {**tune, **{name: value for name, value in given.items() if value is not None}}
    origin = str(options.space or options.config)
    changed = parse_experiment({**config.model_dump(mode="json", exclude_unset=True), "tune": tune}, origin=origin)
    if not changed.tune.space:
        raise ConfigError(
            f"{origin}: expected tune.space, such as {{train.init_lr: {{low: 0.001, high: 0.1, log: true}}}}. "
            "Received: none. Name at least one field to search over."
        )
    return changed


def _search(settings: Settings, config: ExperimentConfig, folder: Path, *, output: Path) -> None:
    from cv_platform.local.environment import prepare_home
    from cv_platform.tracking import start_run
    from cv_platform.training.search import Search, run_search, search_page, study_name

    prepare_home(settings)
    packed = _packed_images(settings, config)
    name = study_name(packed, config)
    print(f"{name}: {config.tune.trials} trials of {packed.counts['train']} images; trials in {folder}", flush=True)
    with (
        _storage(settings) as storage,
        start_run(
            settings.mlflow_tracking_uri,
            config.train.mlflow.exp_name or config.name,
            run_name=f"{config.name} tune",
            run_key=f"tune:{name}",
            tags={"experiment": config.name, "stage": "tune", "study": name},
            artifact_root=settings.home / "mlflow" / "artifacts",
        ) as run,
    ):
        search = Search(packed, storage, folder / name, run, settings.spare_disk_bytes)
        study = run_search(search, config, open_engine(settings))
        write_best(study, config, output)
        page = folder / "search.html"
        write_file(page, search_page(study, config))
        run.log_metrics({f"best_{config.tune.metric}": study.best_value, "best_trial": study.best_trial.number})
        for path in (page, output):
            run.log_artifact(path, "tune")
    print(f"best {config.tune.metric} {study.best_value:.4f}: {json.dumps(study.best_params)}")
    print(f"  {page}\n  make run CONFIG={output}")


def write_best(study: optuna.Study, config: ExperimentConfig, output: Path) -> None:
    """Writes the best trial's config: what the user's file says, with the best values in their places; it validates."""
    content = config.model_dump(mode="json", exclude_unset=True)
    given: dict[str, Any] = json.loads(json.dumps(content))
    best = config.with_fields(study.best_params).model_dump(mode="json")
    for field in study.best_params:
        *sections, last = field.split(".")
        target, source = given, best
        for section in sections:
            target, source = target.setdefault(section, {}), source[section]
        target[last] = source[last]
    head = (
        f"# The best of {len(study.trials)} trials of {study.study_name}: trial {study.best_trial.number}, "
        f"{config.tune.metric} {study.best_value:.4f}.\n"
        f"# Written by cv-platform tune. Command: make run CONFIG={output}\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output, suffix=".yaml") as partial:
        partial.write_text(head + yaml.safe_dump(given, sort_keys=False, allow_unicode=True), encoding="utf-8")
        load_experiment(partial)


def _packed_images(settings: Settings, config: ExperimentConfig) -> PackedImages:
    """Returns the pixels that all trials share; the graph makes them where they are not there."""
    from cv_platform.local.environment import new_run_log, platform_environment
    from cv_platform.local.graph import materialize
    from cv_platform.training.trainer import mismatches

    records = RecordStore(settings.home, config.name)

    def latest() -> PackedImages | None:
        packed = records.latest(PackedImages)
        if packed is None or not packed.directory.is_dir() or mismatches(packed, config):
            return None
        return packed if packed.provenance.dvc_tag == config.dataset.dvc_tag else None

    if (packed := latest()) is not None:
        return packed
    materialize(
        f'+key:"{config.name}/packed_images"',
        platform_environment(settings),
        log=new_run_log(settings.home / "logs", config.name),
        say=lambda line: print(line, flush=True),
    )
    if (packed := latest()) is None:
        raise StorageError(f"Expected packed images of {config.name}. Received: none that belong to this config.")
    return packed


@contextmanager
def _storage(settings: Settings) -> Iterator[optuna.storages.BaseStorage]:
    """Yields Optuna's storage: a schema of its own beside the request log; a file where the home has no PostgreSQL."""
    import optuna

    if settings.database_url is None and not (settings.home / "postgres").is_dir():
        yield optuna.storages.RDBStorage(f"sqlite:///{settings.home / 'tune' / 'studies.db'}")
        return
    from sqlalchemy import text

    from cv_platform.database.connection import database_url, make_engine

    with database_url(settings) as url:
        engine = make_engine(url)
        try:
            with engine.begin() as connection:
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {_SCHEMA}"))
        finally:
            engine.dispose()
        storage = optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"options": f"-c search_path={_SCHEMA}"}, "pool_pre_ping": True},
        )
        try:
            yield storage
        finally:
            storage.engine.dispose()
