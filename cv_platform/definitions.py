"""The Dagster code location: one branch of the graph per YAML in `configs/` (or `CV_CONFIGS`). Assembly only.

Loaded by `workspace.yaml`, and by `dagster asset materialize --select '*' -m cv_platform.definitions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import dagster as dg

from cv_platform.config import ExperimentConfig, config_files, load_experiments
from cv_platform.defs.automation import run_failure_sensor, service_alerts_sensor
from cv_platform.defs.experiment import broken_configs_definitions, experiment_definitions
from cv_platform.defs.io_managers import RecordIOManager
from cv_platform.defs.resources import Installation, MlflowTracking
from cv_platform.defs.retention import retention_definitions
from cv_platform.defs.runs.interrupted import interrupted_runs_sensor
from cv_platform.errors import ConfigError
from cv_platform.settings import Settings


def build_defs(configs: Path | None = None) -> dg.Definitions:
    """Returns the definitions of all the experiments in `configs`: a YAML file or a folder; by default `CV_CONFIGS`.

    A file that cannot be loaded, or of which Dagster makes no definitions, becomes one asset that shows the error; the
    other experiments are not touched.

    Raises:
        ConfigError: there is no such file or folder; or a file cannot be loaded, and `CV_STRICT_CONFIGS` is set.
    """
    settings = Settings.from_environment()
    found, errors = load_experiments(config_files(configs or settings.configs))
    shared = dg.Definitions(
        resources={"installation": Installation(), "mlflow": MlflowTracking(), "io_manager": RecordIOManager()},
        # A launched run is a process of its own already; a process per step would load TensorFlow again and again.
        executor=dg.in_process_executor,
    )
    branches, refused = _branches(found, shared)
    errors |= refused
    if errors and settings.strict_configs:
        raise ConfigError("\n".join(sorted(set(errors.values()))))
    experiments = [experiment for path, experiment in found.items() if path in branches]
    broken = {path.name: error for path, error in errors.items()}
    return dg.Definitions.merge(
        shared,
        dg.Definitions(
            sensors=[run_failure_sensor(experiments), service_alerts_sensor(experiments), interrupted_runs_sensor()]
        ),
        retention_definitions(experiments, broken),
        *branches.values(),
        broken_configs_definitions(broken),
    )


def _branches(
    found: Mapping[Path, ExperimentConfig], shared: dg.Definitions
) -> tuple[dict[Path, dg.Definitions], dict[Path, str]]:
    """Returns the experiments' definitions by file, and by file why Dagster refuses those of the others."""
    branches, refused = dict[Path, dg.Definitions](), dict[Path, str]()
    for path, experiment in found.items():
        try:
            branch = experiment_definitions(experiment)
            dg.Definitions.validate_loadable(dg.Definitions.merge(shared, branch))
        except Exception as err:  # Of whatever kind: the others are to stand.
            refused[path] = (
                f"{path}: expected an experiment that becomes definitions of Dagster. Received: {type(err).__name__}: "
                f"{err}. Correct the file; where it is right, this is a mistake of the platform."
            )
        else:
            branches[path] = branch
    return branches, refused


defs = build_defs()
