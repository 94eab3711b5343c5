"""What the assets of one experiment share: key prefix, group, owners, resources, and the way to their config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from pydantic import BaseModel

from cv_platform.config import ExperimentConfig
from cv_platform.defs.resources import ExperimentResource, Installation, MlflowTracking
from cv_platform.settings import Settings


@dataclass(frozen=True)
class AssetRun:
    """What an asset body works with in one Dagster run."""

    context: dg.AssetExecutionContext
    config: ExperimentConfig
    """The effective config: the YAML's values with the run's overrides over them."""
    installation: Installation
    settings: Settings
    mlflow: MlflowTracking


@dataclass(frozen=True)
class Branch:
    """One experiment's branch of the graph."""

    config: ExperimentConfig

    @property
    def config_resource(self) -> str:
        """Returns the resource key under which a run overrides this experiment's fields."""
        return f"{self.config.name}_config"

    def key(self, asset: str) -> dg.AssetKey:
        """Returns the key of one of the branch's assets."""
        return dg.AssetKey([self.config.name, asset])

    def asset(
        self,
        *,
        value: type[BaseModel],
        kinds: set[str],
        sections: Sequence[str],
        ins: Mapping[str, str] | None = None,
        deps: Sequence[str] = (),
        checks: Sequence[dg.AssetCheckSpec] = (),
        **arguments: Any,
    ) -> Callable[[Callable[..., Any]], dg.AssetsDefinition]:
        """Declares an asset of this branch from a body `(context, …inputs)`.

        Args:
            value: the record that the asset hands on.
            kinds: what the page shows as icons.
            sections: the config's sections that the asset's code depends on; they make its code version.
            ins: body argument → upstream asset of this branch, loaded as the type that the body annotates.
            deps: upstream assets that are not loaded.
            checks: specs of the checks that the body returns results for.
            **arguments: anything else that `dagster.asset` takes.
        """
        return dg.asset(
            key_prefix=self.config.name,
            group_name=self.config.name,
            owners=list(self.config.owners),
            # Said here, as Dagster 1.13 takes MaterializeResult[X] on a body with checks for several outputs.
            dagster_type=_dagster_type(value),
            kinds=kinds,
            code_version=self.config.fingerprint("name", *sections),
            ins={argument: dg.AssetIn(key=self.key(upstream)) for argument, upstream in (ins or {}).items()},
            deps=[self.key(upstream) for upstream in deps],
            check_specs=list(checks),
            required_resource_keys={"installation", "mlflow", self.config_resource},
            **arguments,
        )

    def check(self, name: str, asset: str, *, blocking: bool, description: str) -> dg.AssetCheckSpec:
        """Declares a check of one of the branch's assets."""
        return dg.AssetCheckSpec(name, asset=self.key(asset), blocking=blocking, description=description)

    def run(self, context: dg.AssetExecutionContext) -> AssetRun:
        """Returns what the body of an asset needs in this run.

        Raises:
            DeploymentError: the run is going to deploy to a service that is another experiment's.
        """
        from cv_platform.deployment.rollout import require_service

        installation: Installation = context.resources.installation
        experiment: ExperimentResource = getattr(context.resources, self.config_resource)
        config = experiment.resolve()
        if self.key("deployment") in context.job_def.asset_layer.selected_asset_keys:
            require_service(config.deploy, experiment=config.name, storage=installation.storage())
        return AssetRun(context, config, installation, installation.settings(), context.resources.mlflow)


@functools.cache
def _dagster_type(record: type[BaseModel]) -> dg.PythonObjectDagsterType:
    """Returns the one Dagster type of a record: two of one name, in two experiments, would not load."""
    return dg.PythonObjectDagsterType(record)
