"""A temporary installation of the platform with a deployed model, built by the graph itself."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.options import REPOSITORY
from cv_platform.config import ExperimentConfig, load_experiment, parse_experiment
from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.graph import materialize
from cv_platform.settings import Settings

ORIGINAL_ARCHITECTURE: dict[str, Any] = {"architecture": "small_cnn", "input_size": {"h": 50, "w": 50}}


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Yields a temporary folder in which PostgreSQL's own user can reach its data when root runs the benchmark."""
    folder = Path(tempfile.mkdtemp(prefix=f"cv-{name}-"))
    try:
        folder.chmod(0o711)
        yield folder
    finally:
        shutil.rmtree(folder)


def isolated_settings(home: Path, configs: Path, **values: Any) -> Settings:
    """Returns the settings of an installation that shares nothing with the one of the environment."""
    settings = Settings.from_environment({"CV_HOME": str(home), "CV_CONFIGS": str(configs)})
    return settings.model_copy(update=values)


def isolated_environment(settings: Settings, *, database_url: str) -> dict[str, str]:
    """Returns the environment of this installation's processes: what the caller's says about another one is left out.

    A benchmark that logged to somebody's production database, or that met somebody's API keys, would be none.
    """
    environment = platform_environment(settings, database_url=database_url)
    foreign = {name for name in environment if name.startswith("CV_")} | {"EVIDENTLY_URL", "DAGSTER_HOME"}
    own = {
        "CV_HOME": str(settings.home),
        "CV_CONFIGS": str(settings.configs),
        "CV_STORAGE": settings.storage_url,
        "CV_SERVICE": settings.service_name,
        "CV_SERVICE_WORKERS": str(settings.service_workers),
        "CV_LOG_IMAGES": settings.log_images,
        "DAGSTER_HOME": str(settings.dagster_home),
    }
    return {name: value for name, value in environment.items() if name not in foreign} | own


def quick_experiment(name: str = "benchmark", *, model: Mapping[str, Any] = ORIGINAL_ARCHITECTURE) -> ExperimentConfig:
    """Returns the digits experiment with another network (by default the original's), two epochs and an open gate.

    Speed does not depend on what was learnt.
    """
    digits = load_experiment(REPOSITORY / "configs" / "digits.yaml").model_dump(mode="json")
    content = {
        **digits,
        "name": name,
        "model": {**digits["model"], **model, "model_name": f"{name}_classifier"},
        "train": {**digits["train"], "epochs": 2, "optimizer": "adam", "init_lr": 1e-3},
        "validate": {**digits["validate"], "deepchecks_suites": "off", "label_issues": "off"},
        "evaluate": {**digits["evaluate"], "min_accuracy": 0.0, "min_macro_f1": 0.0},
    }
    content["model"]["drift_detection"] = {**digits["model"]["drift_detection"], "uae_encoding_dims": 128}
    return parse_experiment(content, origin="benchmarks.installation.quick_experiment")


def write_config(experiment: ExperimentConfig, folder: Path) -> Path:
    """Writes an experiment as YAML and returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{experiment.name}.yaml"
    content = experiment.model_dump(mode="json")
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def deploy_by_graph(
    experiment: ExperimentConfig, settings: Settings, environment: Mapping[str, str], say: Callable[[str], None]
) -> None:
    """Materialises everything up to `deployment`.

    Raises:
        CvPlatformError: the run failed; the message says why, and where its log is.
    """
    prepare_home(settings)
    selection = f"+key:{experiment.name}/deployment"
    say(f"materialising {selection} …")
    materialize(selection, environment, log=settings.home / "logs" / "benchmark-graph.log", say=say)
