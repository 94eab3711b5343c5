"""The Dagster code location: one branch of the graph per YAML in `configs/` (or `CV_CONFIGS`). Assembly only.

Loaded by `workspace.yaml`, and by `dagster asset materialize --select '*' -m cv_platform.definitions`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import dagster as dg

from cv_platform.config import ExperimentConfig, config_files, load_experiment
from cv_platform.defs.automation import run_failure_sensor
from cv_platform.defs.experiment import broken_config_definitions, experiment_definitions
from cv_platform.defs.interrupted_runs import interrupted_runs_sensor
from cv_platform.defs.io_managers import RecordIOManager
from cv_platform.defs.resources import Installation, MlflowTracking
from cv_platform.defs.retention import retention_definitions
from cv_platform.errors import ConfigError
from cv_platform.settings import Settings


def build_defs(configs: Path | None = None) -> dg.Definitions:
    """Returns the definitions of all the experiments in `configs`: a YAML file or a folder; by default `CV_CONFIGS`.

    A file that cannot be loaded becomes one asset that shows the error; the other experiments are not touched.

    Raises:
        ConfigError: there is no such file or folder.
    """
    experiments, broken = _load(config_files(configs or Settings.from_environment().configs))
    return dg.Definitions.merge(
        dg.Definitions(
            resources={
                "installation": Installation(),
                "mlflow": MlflowTracking(),
                "io_manager": RecordIOManager(),
            },
            sensors=[run_failure_sensor(experiments), interrupted_runs_sensor()],
            # A launched run is a process of its own already; a process per step would load TensorFlow again and again.
            executor=dg.in_process_executor,
        ),
        retention_definitions(experiments, broken),
        *(experiment_definitions(experiment) for experiment in experiments),
        *(broken_config_definitions(file_name, error) for file_name, error in broken.items()),
    )


def _load(files: Iterable[Path]) -> tuple[list[ExperimentConfig], dict[str, str]]:
    """Returns the experiments, and by file name what is wrong with the files that give none."""
    found: dict[str, list[tuple[Path, ExperimentConfig]]] = defaultdict(list)
    broken: dict[str, str] = {}
    for path in files:
        try:
            experiment = load_experiment(path)
        except ConfigError as err:
            broken[path.name] = str(err)
        else:
            found[experiment.name].append((path, experiment))
    for name, same in found.items():
        if len(same) > 1:
            names = ", ".join(path.name for path, _ in same)
            error = f"Expected one experiment of each name. Received: {name} in {names}. Rename all but one."
            broken.update((path.name, error) for path, _ in same)
    return [same[0][1] for same in found.values() if len(same) == 1], broken


defs = build_defs()
