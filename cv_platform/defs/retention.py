"""The daily job that deletes what the request log has kept long enough; one for all experiments, as they share it."""

from collections.abc import Collection, Sequence

import dagster as dg

from cv_platform.config import ExperimentConfig
from cv_platform.errors import ConfigError
from cv_platform.settings import Settings

JOB = "log_retention"


class RetentionOptions(dg.Config):
    """How a run of the job is made."""

    is_dry_run: bool = False


def retention_definitions(experiments: Sequence[ExperimentConfig], broken: Collection[str]) -> dg.Definitions:
    """Returns the job `log_retention` and its schedule, which leave alone what the monitors of `experiments` judge.

    Args:
        experiments: whose windows are kept.
        broken: config files that cannot be loaded. While there are any, nothing is deleted: nobody knows what their
            monitors still need.
    """

    @dg.op(
        required_resource_keys={"installation"},
        description="Deletes requests, predictions, feedback and uploads that are older than their retention.",
    )
    def delete_expired_log(context: dg.OpExecutionContext, config: RetentionOptions) -> None:
        from datetime import UTC, datetime

        from cv_platform.monitoring.exported_metrics import export_retention
        from cv_platform.monitoring.log_retention import expire_log

        if broken:
            raise ConfigError(
                "Expected configs that can be loaded, as their monitors say which requests are still needed. "
                f"Received: {', '.join(sorted(broken))}. Correct them, or take them out of the folder."
            )
        installation = context.resources.installation
        settings: Settings = installation.settings()
        with installation.engine() as engine:
            result = expire_log(engine, experiments, settings, datetime.now(UTC), is_dry_run=config.is_dry_run)
        if not config.is_dry_run:
            export_retention(settings.home)
        context.log.info(result.summary())
        for warning in result.warnings:
            context.log.warning(warning)
        context.add_output_metadata({"summary": result.summary(), **result.model_dump(mode="json")})

    @dg.job(
        name=JOB,
        description="Deletes log rows after CV_LOG_RETENTION_DAYS, and uploads after CV_IMAGE_RETENTION_DAYS.",
    )
    def log_retention() -> None:
        delete_expired_log()

    daily = dg.ScheduleDefinition(
        name=f"daily_{JOB}",
        job_name=JOB,
        cron_schedule="30 3 * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Deletes what is older than its retention.",
    )
    return dg.Definitions(jobs=[log_retention], schedules=[daily])
