"""The loop: the asset `labelled_version`, the sensor that decides what is next, and the asset that shows its page."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg

from cv_platform.audit import AuditLog, Note
from cv_platform.config import ExperimentConfig
from cv_platform.defs.branch import Branch
from cv_platform.defs.observed import request_log_key
from cv_platform.defs.runs.unfinished import UNFINISHED
from cv_platform.defs.versions import Reads
from cv_platform.errors import CvPlatformError
from cv_platform.record_store import RecordStore
from cv_platform.records import LabelledVersion
from cv_platform.settings import Settings
from cv_platform.storage import CentralStorage

if TYPE_CHECKING:
    from cv_platform.monitoring.loop import Decision, LoopFacts

_ACTION, _DATA = "cv-platform/loop", "cv-platform/loop_data"
"""Tags of the runs that the loop has asked for: what for, and on which data and recipe."""


def loop_key(experiment: str) -> dg.AssetKey:
    """Returns the key of the asset that shows where an experiment's loop stands."""
    return dg.AssetKey(["observed", f"{experiment}_loop"])


def loop_page_asset(config: ExperimentConfig) -> dg.AssetSpec:
    """Returns the asset that shows where the loop stands; each of its observations is a decision."""
    return dg.AssetSpec(
        loop_key(config.name),
        description="Where the loop stands: its step and why, budget, open episode, labels, the latest model, and its "
        "figures beside the champion's on live traffic. Each observation is a decision of the sensor `…_loop`.",
        group_name=config.name,
        owners=list(config.owners),
        kinds={"dagster"},
    )


def labelled_version_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/labelled_version`."""
    fit = branch.check(
        "labels_fit_the_images",
        "labelled_version",
        blocking=False,
        description="The labels of no source contradict what the other images show; else they make no version.",
    )

    @branch.asset(
        value=LabelledVersion,
        is_retried=True,
        kinds={"dvc", "postgres"},
        reads=Reads(["labels.max_wrong_fraction", "labels.keep_expired", "loop.trust", "loop.without", "encoder"]),
        deps=["labeling_queue"],
        observes=[request_log_key(branch.config.name)],
        checks=[fit],
    )
    def labelled_version(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """The version that the labels in the log make of the dataset; unless `loop.enabled`, what it would be.

        Labels that contradict the images make none: the check fails, and the version stays as it was.
        """
        from cv_platform.monitoring.loop import grow_by_labels

        run = branch.run(context)
        settings, before = run.settings, RecordStore(run.settings.home, run.config.name).latest(LabelledVersion)
        with run.installation.engine() as engine:
            version = grow_by_labels(
                run.config, engine, home=settings.home, now=datetime.now(UTC), spare_bytes=settings.spare_disk_bytes
            )
        is_told = before is not None and before.refused and before.suspects == version.suspects
        if version.refused and run.config.loop.enabled and run.config.alerts.on_refused_labels and not is_told:
            run.alert("labels refused, the loop has stopped", version.refused)
        metadata = {
            **version.model_dump(include={"base", "tag", "dvc_md5", "refused"}),
            "suspects": list(version.suspects),
            "summary": dg.MetadataValue.md("\n".join(f"* {line}" for line in version.summary)),
        }
        said = version.refused or " ".join(version.summary)
        check = dg.AssetCheckResult(check_name=fit.name, passed=not version.refused, description=said)
        return run.result(version, metadata, [check])

    return labelled_version


def loop_sensor(branch: Branch, experiment_jobs: Sequence[Any]) -> dg.SensorDefinition:
    """Returns the sensor that closes the loop, where `loop.enabled` says so; else it shows what it would do."""
    config, loop = branch.config, branch.config.loop
    acting = {f"{config.name}_grow", f"{config.name}_retrain"}

    @dg.sensor(
        name=f"{config.name}_loop",
        jobs=[job for job in experiment_jobs if job.name in acting],
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="After drift or enough new labels: grows the dataset and retrains, within its budget and never on "
        "the same data twice. Acts where loop.enabled is set. The cursor is its last decision.",
    )
    def closes_the_loop(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from cv_platform.monitoring.loop import decide

        settings = Settings.from_environment()
        try:
            facts = _facts(branch, settings, context.instance)
        except CvPlatformError as err:
            return dg.SkipReason(str(err))
        if facts is None:
            return dg.SkipReason("The request log is not running; `make up` starts it, or set DATABASE_URL.")
        decision = decide(facts, loop)
        said = f"{decision.step}: {decision.reason}"
        cursor = json.dumps([loop.enabled, said, facts.progress])
        events = [_shown(config, facts, decision)]
        if not loop.enabled or decision.action == "wait":
            off = "" if loop.enabled else "Off (loop.enabled). It would be "
            is_new = context.cursor != cursor
            return dg.SensorResult(asset_events=events if is_new else [], cursor=cursor, skip_reason=f"{off}{said}")
        done = f"{config.name}: {decision.action} {facts.target}"
        try:
            AuditLog(settings.storage_url).write("loop", done, Note("the loop", decision.reason))
        except CvPlatformError as err:
            return dg.SkipReason(f"What cannot be noted is not done. {err}")
        return dg.SensorResult(run_requests=[_request(branch, facts, decision)], asset_events=events, cursor=cursor)

    return closes_the_loop


def _shown(config: ExperimentConfig, facts: "LoopFacts", decision: "Decision") -> dg.AssetObservation:
    """Returns where the loop stands, for Dagster's page."""
    from cv_platform.monitoring.loop import loop_page

    page = dg.MetadataValue.md(loop_page(facts, decision, config))
    told = {"step": decision.step, "decision": decision.action, "why": decision.reason}
    return dg.AssetObservation(loop_key(config.name), metadata={"page": page, **told, "enabled": config.loop.enabled})


def _request(branch: Branch, facts: "LoopFacts", decision: "Decision") -> dg.RunRequest:
    """Returns the run that grows the dataset or retrains, once on the same data."""
    name, loop, is_retrain = branch.config.name, branch.config.loop, decision.action == "retrain"
    key = facts.target_key if is_retrain else f"{facts.last_statement}-{loop.trust}-{loop.without}"
    return dg.RunRequest(
        run_key=f"{name}-loop-{decision.action}-{key}",
        job_name=f"{name}_{decision.action}",
        run_config=branch.overrides({"dataset": {"dvc_tag": facts.target}} if is_retrain else {}),
        tags={_ACTION: decision.action, _DATA: key, "reason": decision.reason[:200], "experiment": name},
    )


def _facts(branch: Branch, settings: Settings, instance: dg.DagsterInstance) -> "LoopFacts | None":
    """Returns the facts with what Dagster knows of runs; None where no request log is running."""
    from dataclasses import replace

    from cv_platform.database.address import running_database_url
    from cv_platform.database.connection import make_engine
    from cv_platform.monitoring.loop import WEEK, read_facts

    url, now, config = running_database_url(settings), datetime.now(UTC), branch.config
    if url is None:
        return None
    engine = make_engine(url)
    try:
        facts = read_facts(config, engine, home=settings.home, storage=CentralStorage(settings.storage_url), now=now)
    finally:
        engine.dispose()
    ours = {"experiment": config.name}
    at_work = [
        f"{run.job_name}, run {run.run_id[:8]},"
        for run in instance.get_runs(dg.RunsFilter(tags=ours, statuses=UNFINISHED))
        if not run.job_name.endswith("_drift_report")
    ]
    trainings = instance.get_run_records(dg.RunsFilter(tags={**ours, _ACTION: "retrain"}, created_after=now - WEEK))
    tried = instance.get_runs(dg.RunsFilter(tags={**ours, _DATA: facts.target_key}), limit=1)
    return replace(
        facts,
        unfinished=at_work[0] if at_work else "",
        trainings=tuple(sorted((record.create_timestamp for record in trainings), reverse=True)),
        tried=f"run {tried[0].run_id[:8]} on {facts.target} ended as {tried[0].status.value}" if tried else "",
    )
