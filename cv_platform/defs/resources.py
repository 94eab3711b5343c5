"""Thin Dagster resources around plain objects: the installation, an experiment's effective config, MLflow runs.

Nothing is opened when the code location loads; every method opens what it needs when an asset body calls it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel, Field, create_model

from cv_platform.audit import AuditLog
from cv_platform.config import ExperimentConfig, MlflowConfig, parse_experiment
from cv_platform.defs.runs.interrupted import at_work, end_dead_runs
from cv_platform.settings import Settings, prepare_process
from cv_platform.storage import CentralStorage

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from cv_platform.tracking import MlflowRun


class Installation(dg.ConfigurableResource):
    """This installation's settings, central storage and request log; all from the environment of the run's process."""

    @contextmanager
    def yield_for_execution(self, context: dg.InitResourceContext) -> Iterator[Installation]:
        """Switches telemetry, import chatter and proxies before loopback off, before the heavy libraries load.

        While the run is at work, others can see it; runs that were killed are ended, so that they hold no place.

        Raises:
            ConfigError: the installation was moved, and still names its old folder.
        """
        from cv_platform.maintenance.moved_home import require_settled

        prepare_process()
        settings = self.settings()
        require_settled(settings.home)
        if context.run is None or context.instance is None:
            yield self
            return
        with at_work(context.run.run_id, settings.home):
            end_dead_runs(context.instance, settings.home)
            yield self

    def settings(self) -> Settings:
        """Reads the settings from the environment."""
        return Settings.from_environment()

    def storage(self) -> CentralStorage:
        """Opens central storage."""
        return CentralStorage(self.settings().storage_url)

    def audit(self) -> AuditLog:
        """Opens the audit log of central storage."""
        return AuditLog(self.settings().storage_url)

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Connects to the request log, migrated; starts the embedded PostgreSQL for as long as it is needed."""
        from cv_platform.database.connection import database_url, make_engine
        from cv_platform.database.migrate import migrate

        with database_url(self.settings()) as url:
            migrate(url)
            engine = make_engine(url)
            try:
                yield engine
            finally:
                engine.dispose()


class ExperimentResource(dg.ConfigurableResource):
    """Base of the resources that `experiment_resource` makes: an experiment whose fields a run may override."""

    _experiment: ClassVar[ExperimentConfig]

    def resolve(self) -> ExperimentConfig:
        """Returns the effective config of this run: the YAML's values with the run config's over them.

        Raises:
            ConfigError: the values do not fit together, or one is out of its range.
        """
        yaml_values = self._experiment.model_dump(mode="json")
        overridden = {name: getattr(self, name).model_dump() for name in OVERRIDABLE_SECTIONS}
        return parse_experiment({**yaml_values, **overridden}, origin=f"effective config of {self._experiment.name}")


OVERRIDABLE_SECTIONS = ("model", "dataset", "validate", "train", "evaluate", "deploy", "monitor", "alerts")


def experiment_resource(config: ExperimentConfig) -> ExperimentResource:
    """Returns a resource whose run-config schema has the YAML's values as defaults.

    Dagster's run config replaces a resource's values instead of merging them, so a field that is not overridden must
    find its YAML value as the schema's own default. Overriding one field is then
    `{"resources": {"digits_config": {"config": {"train": {"epochs": 2}}}}}`; wrong names and types are refused before
    the run starts, values out of range as its first act.
    """
    sections = {field.alias or name: getattr(config, name) for name, field in ExperimentConfig.model_fields.items()}
    with warnings.catch_warnings():
        # The section `validate` hides a method that pydantic deprecated; Dagster does not call it.
        warnings.filterwarnings("ignore", message='Field name "validate"', category=UserWarning)
        fields: dict[str, Any] = {}
        for name in OVERRIDABLE_SECTIONS:
            section = _dagster_config(sections[name])
            fields[name] = (section, section())
        resource = create_model(f"{config.name}_config", __base__=ExperimentResource, **fields)
    resource._experiment = config
    return resource()


def _dagster_config(section: BaseModel) -> type[dg.Config]:
    """Returns a Dagster config class with a section's fields, constraints and descriptions, its values the defaults."""
    fields: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            nested = _dagster_config(value)
            fields[name] = (nested, nested())
        elif get_origin(field.annotation) is tuple:  # Dagster's config has lists only.
            kind = Any if get_args(field.annotation)[0] is Any else str
            fields[name] = (list[kind], Field(list(value), description=field.description))
        else:
            annotation = _bare(field.annotation)
            if any(get_origin(member) is Literal for member in get_args(annotation)):
                annotation = str | None  # Dagster knows Literal, but not an optional one; `resolve` judges the value.
            if field.metadata:
                annotation = Annotated[(annotation, *field.metadata)]
            fields[name] = (annotation, Field(value, description=field.description))
    return create_model(type(section).__name__, __base__=dg.Config, **fields)


def _bare(annotation: Any) -> Any:
    """Returns an annotation without the validators in it, which Dagster does not know; `resolve` applies them."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _bare(members[0])
    if origin in (Union, UnionType):
        return Union[tuple(_bare(member) for member in members)]  # noqa: UP007
    if origin is dict:
        return dict[_bare(members[0]), _bare(members[1])]
    return annotation


class MlflowTracking(dg.ConfigurableResource):
    """MLflow runs, one per asset, through dagster-mlflow.

    dagster-mlflow's own resource opens one run for everything in a Dagster run, so two experiments in one
    `--select '*'` would mix their parameters. Here each asset's run is opened first; dagster-mlflow joins it by its id.
    """

    @contextmanager
    def stage(
        self, context: dg.AssetExecutionContext, settings: Settings, experiment: ExperimentConfig, mlflow: MlflowConfig
    ) -> Iterator[MlflowRun]:
        """Opens the asset's MLflow run, resuming the one that an interrupted attempt of this Dagster run has left."""
        from cv_platform.tracking import start_run

        stage = context.asset_key.path[-1]
        recipe = experiment.fingerprint("model", "dataset", "train", "evaluate")
        with start_run(
            tracking_uri=settings.mlflow_tracking_uri,
            experiment=mlflow.exp_name or experiment.name,
            run_name=f"{experiment.name} {stage}",
            # A retry resumes its run; one with other settings is another run, as MLflow's parameters never change.
            run_key=f"{context.run.root_run_id or context.run.run_id}:{context.asset_key.to_user_string()}:{recipe}",
            tags={"experiment": experiment.name, "stage": stage},
            # Without it MLflow 3 opens its pages for language models.
            experiment_tags={
                "mlflow.experimentKind": "custom_model_development",
                **({"mlflow.note.content": mlflow.exp_desc} if mlflow.exp_desc else {}),
                **mlflow.exp_tags,
            },
            artifact_root=settings.home / "mlflow" / "artifacts",
        ) as run:
            self._join(context, settings, mlflow.exp_name or experiment.name, run.run_id)
            yield run

    @staticmethod
    def _join(context: dg.AssetExecutionContext, settings: Settings, exp_name: str, run_id: str) -> None:
        with warnings.catch_warnings():
            # dagster-mlflow 0.29 calls all of itself beta; requirements.lock holds the version that was tried.
            warnings.simplefilter("ignore", dg.BetaWarning)
            from dagster_mlflow.resources import MlFlow

            MlFlow(
                SimpleNamespace(
                    log=context.log,
                    run_id=context.run.run_id,
                    dagster_run=context.run,
                    resource_config={
                        "experiment_name": exp_name,
                        "mlflow_tracking_uri": settings.mlflow_tracking_uri,
                        "mlflow_run_id": run_id,
                        "extra_tags": {"dagster_asset": context.asset_key.to_user_string()},
                    },
                )
            )
