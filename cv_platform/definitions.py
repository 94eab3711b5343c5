"""The Dagster code location: one branch of the graph per YAML in `configs/` (or `CV_CONFIGS`). Assembly only.

Loaded by `workspace.yaml`, and by `dagster asset materialize --select '*' -m cv_platform.definitions`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import dagster as dg

from cv_platform.config import ExperimentConfig, Settings, config_files, load_experiment
from cv_platform.defs.automation import run_failure
from cv_platform.defs.experiment import broken_config_definitions, experiment_definitions
from cv_platform.defs.io_managers import RecordIOManager
from cv_platform.defs.resources import Installation, MlflowTracking
from cv_platform.errors import ConfigError


def build_defs(configs: Path | None = None) -> dg.Definitions:
    """Returns the definitions of all the experiments in `configs`: a YAML file or a folder; by default `CV_CONFIGS`.

    A file that cannot be loaded becomes one asset that shows the error; the other experiments are not touched.

    Raises:
        ConfigError: there is no such file or folder.
    """
    files = config_files(configs or Settings.from_environment().configs)
    return dg.Definitions.merge(
        dg.Definitions(
            resources={
                "installation": Installation(),
                "mlflow": MlflowTracking(),
                "io_manager": RecordIOManager(),
            },
            sensors=[run_failure],
            # A launched run is a process of its own already; a process per step would load TensorFlow again and again.
            executor=dg.in_process_executor,
        ),
        *_branches(files),
    )


def _branches(files: Iterable[Path]) -> Iterable[dg.Definitions]:
    experiments: dict[str, list[tuple[Path, ExperimentConfig]]] = defaultdict(list)
    for path in files:
        try:
            experiment = load_experiment(path)
        except ConfigError as err:
            yield broken_config_definitions(path.name, str(err))
        else:
            experiments[experiment.name].append((path, experiment))
    for name, found in experiments.items():
        if len(found) == 1:
            yield experiment_definitions(found[0][1])
            continue
        names = ", ".join(path.name for path, _ in found)
        for path, _ in found:
            yield broken_config_definitions(
                path.name, f"Expected one experiment of each name. Received: {name} in {names}. Rename all but one."
            )


defs = build_defs()
