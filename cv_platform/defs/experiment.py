"""One experiment config becomes its branch of the graph: its assets with checks, jobs, a schedule and sensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

import dagster as dg

from cv_platform.config import ExperimentConfig
from cv_platform.defs.automation import (
    drift_schedule,
    experiment_jobs,
    new_dataset_version_sensor,
    new_predictions_sensor,
    pointer_sensor,
)
from cv_platform.defs.branch import Branch
from cv_platform.defs.datasets import dataset_asset, embeddings_asset, packed_images_asset
from cv_platform.defs.deployment import bento_asset, challenger_replay_asset, deployment_asset
from cv_platform.defs.drift import drift_detectors_asset, reference_data_asset
from cv_platform.defs.evaluation import evaluation_asset
from cv_platform.defs.loop import labelled_version_asset, loop_page_asset, loop_sensor
from cv_platform.defs.monitoring import drift_report_asset, labeling_queue_asset, production_metrics_asset
from cv_platform.defs.observed import observed_assets, observed_sensor
from cv_platform.defs.resources import experiment_resource
from cv_platform.defs.scoring import batch_drift_report_asset, batch_scores_asset
from cv_platform.defs.training import model_asset
from cv_platform.defs.validation import validation_report_asset


def experiment_definitions(config: ExperimentConfig) -> dg.Definitions:
    """Returns everything of one experiment."""
    branch = Branch(config)
    jobs = experiment_jobs(branch)
    return dg.Definitions(
        assets=[observed_assets(config), loop_page_asset(config), *experiment_assets(branch)],
        jobs=jobs,
        schedules=[drift_schedule(branch)],
        sensors=[
            observed_sensor(config),
            new_predictions_sensor(branch),
            loop_sensor(branch, jobs),
            new_dataset_version_sensor(branch),
            pointer_sensor(branch),
        ],
        resources={branch.config_resource: experiment_resource(config)},
    )


def experiment_assets(branch: Branch) -> list[dg.AssetsDefinition]:
    """Declares the assets of a branch, in the order in which data walk through it."""
    return [
        dataset_asset(branch),
        embeddings_asset(branch),
        validation_report_asset(branch),
        packed_images_asset(branch),
        model_asset(branch),
        evaluation_asset(branch),
        drift_detectors_asset(branch),
        reference_data_asset(branch),
        bento_asset(branch),
        challenger_replay_asset(branch),
        deployment_asset(branch),
        drift_report_asset(branch),
        production_metrics_asset(branch),
        labeling_queue_asset(branch),
        labelled_version_asset(branch),
        *([batch_scores_asset(branch), batch_drift_report_asset(branch)] if branch.config.score.source else []),
    ]


def broken_configs_definitions(broken: Mapping[str, str]) -> dg.Definitions:
    """Returns an asset for each config file that cannot be loaded, named after it, whose description is the error."""
    specs = dict[str, dg.AssetSpec]()
    for file_name, error in broken.items():
        name = re.sub(r"\W", "_", file_name, flags=re.ASCII)
        while name in specs:  # Of `cats-1.yaml` beside `cats_1.yaml`.
            name += "_"
        specs[name] = dg.AssetSpec(
            key=dg.AssetKey(["broken_configs", name]),
            group_name="broken_configs",
            description=f"This config cannot be loaded, so its experiment is missing.\n\n```\n{error}\n```",
            kinds={"yaml"},
        )
    return dg.Definitions(assets=list(specs.values()))
