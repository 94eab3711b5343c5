"""What runs by itself: jobs, the weekly drift report, and the sensors."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from cv_platform.config import ExperimentConfig
from cv_platform.defs.branch import Branch
from cv_platform.errors import TrackingError
from cv_platform.settings import Settings

RUN = "Dagster run "
"""How a move of the pointer begins its `by`, where the asset `deployment` made it and shows it itself."""
_TOLD_AGAIN = "cv-platform/retold"
"""Tag of a killed run about which Dagster's daemon was told a second time: its own id, as a retry inherits tags."""
_WINDOW_END = "cv-platform/window_end"
"""Tag of a scheduled run: the end of its window, where the next one begins."""
_RUNS_LOOKED_AT = 50
TRAINING_ASSETS = (
    "dataset",
    "embeddings",
    "validation_report",
    "packed_images",
    "model",
    "evaluation",
    "drift_detectors",
    "reference_data",
    "bento",
    "challenger_replay",
    "deployment",
)


def experiment_jobs(branch: Branch) -> list[Any]:
    """Returns `<name>_experiment` (everything), `<name>_retrain` (up to the deployment), `<name>_drift_report` and
    `<name>_grow` (the version that the labels make).

    The report's makes the production metrics and the labelling queue, too.
    """
    name = branch.config.name
    selections = {
        f"{name}_experiment": dg.AssetSelection.groups(name),
        f"{name}_retrain": dg.AssetSelection.assets(*(branch.key(asset) for asset in TRAINING_ASSETS)),
        f"{name}_drift_report": dg.AssetSelection.assets(
            *(branch.key(asset) for asset in ("drift_report", "production_metrics", "labeling_queue"))
        ),
        f"{name}_grow": dg.AssetSelection.assets(branch.key("labelled_version")),
    }
    return [
        # Alerts about a run name its experiment by the tag.
        dg.define_asset_job(job, selection=selection, tags={"experiment": name})
        for job, selection in selections.items()
    ]


def drift_schedule(branch: Branch) -> dg.ScheduleDefinition:
    """Returns the schedule that makes the drift report; weekly unless the config says otherwise.

    Its runs carry their window, so that a retry has the same. Partitions would say it too, but then `--select '*'`, and
    a run by hand, would have to name one.
    """
    name, monitor = branch.config.name, branch.config.monitor
    schedule_name = f"{name}_weekly_drift_report"

    @dg.schedule(
        name=schedule_name,
        job_name=f"{name}_drift_report",
        cron_schedule=monitor.schedule_cron,
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Judges the requests since the window of its last run, and counts what people said about them.",
    )
    def scheduled_window(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        end = context.scheduled_execution_time.astimezone(UTC)
        asked = {"dagster/schedule_name": schedule_name}
        return _next_window(branch, context.instance, asked, end, run_key=end.isoformat())

    return scheduled_window


def _next_window(
    branch: Branch, instance: dg.DagsterInstance, asked: dict[str, str], end: datetime, *, run_key: str
) -> dg.RunRequest:
    """Returns the request for a report of what was logged since the window of the latest run with the tag `asked`."""
    start = _window_start(branch, instance, asked, end)
    window = {"window_start_utc": start.isoformat(), "window_end_utc": end.isoformat(), "window_by": "logged"}
    return dg.RunRequest(
        run_key=run_key, run_config=branch.overrides({"monitor": window}), tags={_WINDOW_END: end.isoformat()}
    )


def _window_start(branch: Branch, instance: dg.DagsterInstance, asked: dict[str, str], end: datetime) -> datetime:
    """Returns where the window of the latest run with the tag `asked` ended; without one, `window_days` before `end`.

    By what was asked, not by the cron: an edited cron, and ticks missed while nothing ran, leave no gap.
    """
    runs = instance.get_runs(dg.RunsFilter(tags=asked), limit=_RUNS_LOOKED_AT)
    ends = [datetime.fromisoformat(run.tags[_WINDOW_END]) for run in runs if _WINDOW_END in run.tags]
    first = end - timedelta(days=branch.config.monitor.window_days)
    return max((before for before in ends if before < end), default=first)


def new_predictions_sensor(branch: Branch) -> dg.SensorDefinition:
    """Returns the sensor that asks for a drift report after every `monitor.new_rows_trigger` new predictions.

    Each report judges what was logged since the one before: a week that began with drift would hide its end.
    """
    config, sensor_name = branch.config, f"{branch.config.name}_new_predictions"

    @dg.sensor(
        name=sensor_name,
        job_name=f"{config.name}_drift_report",
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for a drift report after enough new predictions. The cursor is the end of its last window.",
    )
    def new_predictions(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from cv_platform.database.address import running_database_url
        from cv_platform.database.connection import make_engine
        from cv_platform.errors import DatabaseError
        from cv_platform.monitoring.window import count_requests

        url = running_database_url(Settings.from_environment())
        if url is None:
            return dg.SkipReason("The request log is not running; `make up` starts it, or set DATABASE_URL.")
        asked, now, known = {"dagster/sensor_name": sensor_name}, datetime.now(UTC), context.cursor or ""
        # A former release's cursor is a number of the log, which says nothing of the time.
        has_moment = known and not known.isdigit()
        since = datetime.fromisoformat(known) if has_moment else _window_start(branch, context.instance, asked, now)
        # Of fewer than `min_samples` each report would say no more than that.
        needed = max(config.monitor.new_rows_trigger, config.monitor.min_samples)
        engine = make_engine(url)
        try:
            rows = count_requests(engine, model_name=config.model.model_name, after=since, most=needed)
        except DatabaseError as err:
            return dg.SkipReason(str(err))
        finally:
            engine.dispose()
        if rows < needed:
            return dg.SkipReason(f"{rows} new predictions; a report is made from {needed} on.")
        # The same again, should Dagster die before it has kept the cursor: it makes one run of a key.
        key = f"{config.name}-predictions-since-{since.isoformat()}"
        request = _next_window(branch, context.instance, asked, now, run_key=key)
        return dg.SensorResult(run_requests=[request], cursor=now.isoformat())

    return new_predictions


def new_dataset_version_sensor(branch: Branch) -> dg.SensorDefinition:
    """Returns the sensor that retrains on a new tag of the dataset repository; shipped stopped."""
    config = branch.config

    @dg.sensor(
        name=f"{config.name}_new_dataset_version",
        job_name=f"{config.name}_retrain",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description=(
            "Retrains on a tag that appears in the dataset repository. The run overrides dataset.dvc_tag; "
            "write the tag into the YAML to keep it."
        ),
    )
    def new_dataset_version(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from cv_platform.datasets.versions import list_tags
        from cv_platform.errors import DatasetError

        try:
            tags = list_tags(config.dataset, home=Settings.from_environment().home)
        except DatasetError as err:
            return dg.SkipReason(str(err))
        known: dict[str, str] = json.loads(context.cursor) if context.cursor else tags
        fresh = {tag: md5 for tag, md5 in tags.items() if md5 not in known.values()}
        requests = [
            dg.RunRequest(
                run_key=f"{config.name}-{tag}-{md5}",
                run_config=branch.overrides({"dataset": {"dvc_tag": tag}}),
                tags={"reason": f"dataset {tag}"},
            )
            for tag, md5 in fresh.items()
        ]
        return dg.SensorResult(run_requests=requests, cursor=json.dumps(tags, sort_keys=True))

    return new_dataset_version


def pointer_sensor(branch: Branch) -> dg.SensorDefinition:
    """Returns the sensor that shows at the asset `deployment` what people did to its service: who, when and why."""
    config = branch.config

    @dg.sensor(
        name=f"{config.name}_pointer",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Notes promotions and rollbacks by people as observations of the deployment. The cursor is the "
        "time of the latest.",
    )
    def pointer_moves(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from cv_platform.errors import StorageError
        from cv_platform.storage import CentralStorage

        try:
            pointer = CentralStorage(Settings.from_environment().storage_url).read_pointer(config.deploy.service)
        except StorageError as err:
            return dg.SkipReason(str(err))
        moves = pointer.history if pointer else ()
        seen = datetime.fromisoformat(context.cursor) if context.cursor else datetime.min.replace(tzinfo=UTC)
        fresh = [move for move in reversed(moves) if move.since_utc > seen]
        if not fresh:
            return dg.SkipReason("Nobody has moved the pointer since.")
        return dg.SensorResult(
            asset_events=[
                dg.AssetObservation(branch.key("deployment"), metadata=move.model_dump(mode="json"))
                for move in fresh
                if not move.by.startswith(RUN)
            ],
            cursor=fresh[-1].since_utc.isoformat(),
        )

    return pointer_moves


def run_failure_sensor(experiments: Sequence[ExperimentConfig]) -> dg.SensorDefinition:
    """Returns the sensor that follows failed runs: alerts, where `alerts.on_run_failure` says so, and tidies MLflow."""
    silent = {config.name for config in experiments if not config.alerts.on_run_failure}

    @dg.run_failure_sensor(
        name="run_failure",
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Alerts about failed runs that are not retried, and closes the MLflow runs that they left open.",
    )
    def run_failure(context: dg.RunFailureSensorContext) -> None:
        from cv_platform.monitoring.alerts import send_alert
        from cv_platform.tracking import end_leftover_runs

        settings, run = Settings.from_environment(), context.dagster_run
        if _goes_on(run, context.instance):
            return
        message, names = context.failure_event.message, _experiments_of(context)
        if run.tags.get("dagster/will_retry") == "true":
            message = f"{message} No retry was started: run it again from Dagster's page."
        if not names or not names <= silent:
            failures = send_alert(
                [url.get_secret_value() for url in settings.alert_urls],
                f"{', '.join(sorted(names)) or run.job_name}: run failed",
                f"Run {run.run_id} of {run.job_name}: {message}",
            )
            for failure in failures:
                context.log.warning(failure)
        try:  # After the alert: MLflow being away may be why the run failed.
            end_leftover_runs(settings.mlflow_tracking_uri, dagster_run_id=run.root_run_id or run.run_id)
        except TrackingError as err:
            context.log.warning(f"Runs that MLflow still shows as running were not closed: {err}")

    return run_failure


def _goes_on(run: dg.DagsterRun, instance: dg.DagsterInstance) -> bool:
    """Whether a failed run is retried, or may be: the last one alerts, and this one's MLflow runs go on.

    One that was killed is retried by Dagster's daemon (run_retries in dagster.yaml), which is told a second time where
    it has not begun.
    """
    if "dagster/auto_retry_run_id" in run.tags:
        return True
    if run.tags.get("dagster/will_retry") != "true" or run.tags.get(_TOLD_AGAIN) == run.run_id:
        return False
    # Dagster 1.13 stores the event of a failure before the run's new status (1.13.27, `handle_new_event`). When its
    # daemon looks between the two, it takes the run for one at work and never looks again; a second event makes it
    # look, and the sensor too. To be removed with a release that does not forget:
    # https://github.com/dagster-io/dagster/issues/33741
    instance.add_run_tags(run.run_id, {_TOLD_AGAIN: run.run_id})
    instance.report_run_failed(run, "Killed, and not retried yet: Dagster is told again.")
    return True


def _experiments_of(context: dg.RunFailureSensorContext) -> set[str]:
    """Returns whose a run is: a job's has a tag; of `dagster asset materialize` failed steps (digits__model) tell."""
    if (name := context.dagster_run.tags.get("experiment")) is not None:
        return {name}
    return {event.step_key.partition("__")[0] for event in context.get_step_failure_events() if event.step_key}


def service_alerts_sensor(experiments: Sequence[ExperimentConfig]) -> dg.SensorDefinition:
    """Returns the sensor that tells people what is wrong with the service, its log and its monitoring."""
    periods = {config.name: config.monitor.period for config in experiments}

    @dg.sensor(
        name="service_alerts",
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Tells CV_ALERT_URLS, once it begins and once it is over, what is wrong with the service, its log "
        "and its monitoring: what fires in Prometheus, or without one what the service's own metrics say.",
    )
    def service_alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        from cv_platform.errors import CvPlatformError
        from cv_platform.monitoring.alerts import send_alert
        from cv_platform.monitoring.service_alerts import AlertState, look, tell

        settings, now = Settings.from_environment(), datetime.now(UTC)
        urls = [url.get_secret_value() for url in settings.alert_urls]
        if not urls:
            return dg.SkipReason("CV_ALERT_URLS names nobody who wants to know.")

        def send(title: str, body: str) -> bool:
            failures = send_alert(urls, title, body)
            for failure in failures:
                context.log.warning(failure)
            return len(failures) < len(urls)

        try:
            troubles, state = look(settings, AlertState.read(context.cursor), periods, now)
        except CvPlatformError as err:
            return dg.SkipReason(str(err))
        state = tell(state, troubles, send)
        said = f"Wrong now: {', '.join(state.told) or 'nothing'}."
        return dg.SensorResult(cursor=state.model_dump_json(), skip_reason=said)

    return service_alerts
