"""The Dagster code location: one branch of the graph per YAML in `configs/` (or `CV_CONFIGS`). Assembly only.

Loaded by `workspace.yaml`, and by `dagster asset materialize --select '*' -m cv_platform.definitions`.
"""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from cv_platform.config import config_files, load_experiments
from cv_platform.defs.automation import run_failure_sensor, service_alerts_sensor
from cv_platform.defs.experiment import broken_config_definitions, experiment_definitions
from cv_platform.defs.io_managers import RecordIOManager
from cv_platform.defs.resources import Installation, MlflowTracking
from cv_platform.defs.retention import retention_definitions
from cv_platform.defs.runs.interrupted import interrupted_runs_sensor
from cv_platform.errors import ConfigError
from cv_platform.settings import Settings


def build_defs(configs: Path | None = None) -> dg.Definitions:
    """Returns the definitions of all the experiments in `configs`: a YAML file or a folder; by default `CV_CONFIGS`.

    A file that cannot be loaded becomes one asset that shows the error; the other experiments are not touched.

    Raises:
        ConfigError: there is no such file or folder; or a file cannot be loaded, and `CV_STRICT_CONFIGS` is set.
    """
    settings = Settings.from_environment()
    found, errors = load_experiments(config_files(configs or settings.configs))
    if errors and settings.strict_configs:
        raise ConfigError("\n".join(sorted(set(errors.values()))))
    experiments, broken = list(found.values()), {path.name: error for path, error in errors.items()}
    return dg.Definitions.merge(
        dg.Definitions(
            resources={
                "installation": Installation(),
                "mlflow": MlflowTracking(),
                "io_manager": RecordIOManager(),
            },
            sensors=[run_failure_sensor(experiments), service_alerts_sensor(experiments), interrupted_runs_sensor()],
            # A launched run is a process of its own already; a process per step would load TensorFlow again and again.
            executor=dg.in_process_executor,
        ),
        retention_definitions(experiments, broken),
        *(experiment_definitions(experiment) for experiment in experiments),
        *(broken_config_definitions(file_name, error) for file_name, error in broken.items()),
    )


defs = build_defs()
