"""What the assets of one experiment share: key prefix, group, owners, resources, and the way to their config."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import FunctionType
from typing import Any

import dagster as dg

from cv_platform.compute import open_engine
from cv_platform.compute.engine import Engine, patiently
from cv_platform.config import ExperimentConfig
from cv_platform.defs.io_managers import first_attempt
from cv_platform.defs.resources import ExperimentResource, Installation, MlflowTracking
from cv_platform.defs.versions import Reads, Recipe, code_fingerprint
from cv_platform.errors import (
    CvPlatformError,
    DatabaseUnavailableError,
    LockHeldError,
    PromotionBusyError,
    ServiceError,
    StorageError,
    TrackingError,
)
from cv_platform.records import Record
from cv_platform.settings import Settings

GPU = "gpu"
"""Pool of the assets that compute by TensorFlow: one run of them at a time."""
_RETRIES = dg.RetryPolicy(max_retries=2, delay=10, backoff=dg.Backoff.EXPONENTIAL)
_MAY_PASS = (DatabaseUnavailableError, LockHeldError, PromotionBusyError, ServiceError, StorageError, TrackingError)


@dataclass(frozen=True)
class AssetRun:
    """What an asset body works with in one Dagster run."""

    context: dg.AssetExecutionContext
    config: ExperimentConfig
    """The effective config: the YAML's values with the run's overrides over them."""
    installation: Installation
    settings: Settings
    mlflow: MlflowTracking
    code_version: str
    """Of the asset, under the effective config."""
    asked: datetime
    """When the run, or the first attempt that it goes on with, was asked for: a retry sees the same moment."""

    @property
    def engine(self) -> Engine:
        """Returns who works on shards in this installation."""
        return open_engine(self.settings)

    @property
    def shared_in(self) -> str | None:
        """Returns the URL of central storage, if this installation shares data by it."""
        return self.settings.storage_url if self.settings.share_packs else None

    def alert(self, title: str, body: str, picture: bytes | None = None) -> None:
        """Tells people; who could not be reached is named in the run's log."""
        from cv_platform.monitoring.alerts import send_alert

        urls = [url.get_secret_value() for url in self.settings.alert_urls]
        for failure in send_alert(urls, f"{self.config.name}: {title}", body, picture):
            self.context.log.warning(failure)

    def result(
        self,
        record: Record,
        metadata: Mapping[str, Any],
        checks: Sequence[dg.AssetCheckResult] = (),
        read: Mapping[dg.AssetKey, str] | None = None,
    ) -> dg.MaterializeResult:
        """Hands a record on, with the versions of what it contains and of what has made it.

        Dagster would note the code version of the YAML, whatever the run has overridden, and of what is observed the
        version that was seen last: `read` has what was there when it was read.
        """
        inputs = {
            f"dagster/input_data_version/{key.to_user_string()}": version for key, version in (read or {}).items()
        }
        return dg.MaterializeResult(
            value=record,
            data_version=dg.DataVersion(record.content_version()),
            tags={"dagster/code_version": self.code_version, **inputs},
            metadata=metadata,
            check_results=checks,
        )


@dataclass(frozen=True)
class Branch:
    """One experiment's branch of the graph."""

    config: ExperimentConfig
    recipes: dict[str, Recipe] = field(default_factory=dict[str, Recipe], compare=False)
    """Of the assets declared so far, by name."""

    @property
    def config_resource(self) -> str:
        """Returns the resource key under which a run overrides this experiment's fields."""
        return f"{self.config.name}_config"

    def overrides(self, sections: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the run config that overrides fields of this experiment, by section."""
        return {"resources": {self.config_resource: {"config": sections}}}

    def key(self, asset: str) -> dg.AssetKey:
        """Returns the key of one of the branch's assets."""
        return dg.AssetKey([self.config.name, asset])

    def asset(
        self,
        *,
        value: type[Record],
        reads: Sequence[str] | Reads = (),
        ins: Mapping[str, str] | None = None,
        deps: Sequence[str] = (),
        observes: Sequence[dg.AssetKey] = (),
        checks: Sequence[dg.AssetCheckSpec] = (),
        is_retried: bool = False,
        **arguments: Any,
    ) -> Callable[[Any], dg.AssetsDefinition]:
        """Declares an asset of this branch from a body `(context, …inputs)`.

        Args:
            value: the record that the asset hands on.
            reads: the fields of the config that decide what it contains, or more than fields.
            ins: body argument → upstream asset of this branch, loaded as the type that the body annotates.
            deps: upstream assets that are not loaded.
            observes: what others write and the body reads (`observed`).
            checks: specs of the checks that the body returns results for.
            is_retried: after an error that may pass by itself, as servers that are away do.
            **arguments: anything else that `dagster.asset` takes, such as `kinds`.
        """

        read = reads if isinstance(reads, Reads) else Reads(reads)

        def declare(body: FunctionType) -> dg.AssetsDefinition:
            upstream = [*(ins or {}).values(), *deps]
            recipe = Recipe(
                tuple(read.fields),
                tuple(read.ignores),
                tuple(read.source),
                code_fingerprint(body, read.code),
                tuple(self.recipes[name] for name in upstream),
                tuple(read.functions),
            )
            self.recipes[body.__name__] = recipe
            return dg.asset(
                key_prefix=self.config.name,
                group_name=self.config.name,
                owners=list(self.config.owners),
                # Said here, as Dagster 1.13 takes MaterializeResult[X] on a body with checks for several outputs.
                dagster_type=_dagster_type(value),
                code_version=recipe.version(self.config),
                ins={argument: dg.AssetIn(key=self.key(name)) for argument, name in (ins or {}).items()},
                deps=[*observes, *(self.key(name) for name in deps)],
                check_specs=list(checks),
                retry_policy=_RETRIES if is_retried else None,
                required_resource_keys={"installation", "mlflow", self.config_resource},
                **arguments,
            )(_without_vain_retries(body) if is_retried else body)

        return declare

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
            storage, service = installation.storage(), config.deploy.service
            patiently(service, require_service, config.deploy, experiment=config.name, storage=storage)
        attempt = context.instance.get_run_record_by_id(first_attempt(context.run, context.instance))
        return AssetRun(
            context,
            config,
            installation,
            installation.settings(),
            context.resources.mlflow,
            code_version=self.recipes[context.asset_key.path[-1]].version(config),
            asked=attempt.create_timestamp if attempt else datetime.now(UTC),
        )


def checked(
    check: dg.AssetCheckSpec, passed: bool, description: str | None = None, *, stops: bool = True, **metadata: Any
) -> list[dg.AssetCheckResult]:
    """Returns the result of an asset's only check: an error where it blocks and is to stop the run, else a warning."""
    severity = dg.AssetCheckSeverity.ERROR if check.blocking and stops else dg.AssetCheckSeverity.WARN
    return [
        dg.AssetCheckResult(
            check_name=check.name, passed=passed, severity=severity, description=description, metadata=metadata
        )
    ]


def _without_vain_retries(body: Callable[..., Any]) -> Callable[..., Any]:
    """Lets an error fail the step at once that would be the same again."""

    @functools.wraps(body)
    def once(*arguments: Any, **inputs: Any) -> Any:
        try:
            return body(*arguments, **inputs)
        except CvPlatformError as err:
            if isinstance(err, _MAY_PASS):
                raise
            raise dg.Failure(str(err), allow_retries=False) from err

    return once


@functools.cache
def _dagster_type(record: type[Record]) -> dg.PythonObjectDagsterType:
    """Returns the one Dagster type of a record: two of one name, in two experiments, would not load."""
    return dg.PythonObjectDagsterType(record)
