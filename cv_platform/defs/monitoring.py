"""The assets that look at requests: `drift_report` (a window's verdict), `production_metrics` (what people said of it),
and `labeling_queue` (what people are asked to label next).
"""

from datetime import timedelta
from typing import Any

import dagster as dg

from cv_platform.defs.branch import Branch, checked
from cv_platform.defs.metadata import file_link, table
from cv_platform.defs.observed import request_log_key
from cv_platform.defs.versions import Reads
from cv_platform.records import (
    BatchScores,
    DatasetVersion,
    Deployment,
    DriftDetectors,
    DriftReport,
    Embeddings,
    LabelingQueue,
    PackedImages,
    ProductionMetrics,
    Replay,
)

JUDGING = (
    "alpha",
    "false_alarms_per_year",
    "min_samples",
    "max_samples",
    "repeats",
    "permutations",
    "max_reference_rows",
    "seed",
    "detectors",
    "max_encoded",
)
"""Fields of `monitor` that decide the verdict on given requests; the others say when, and on which."""


def drift_report_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/drift_report`."""
    no_drift = branch.check(
        "no_drift", "drift_report", blocking=False, description="The window's requests look like the reference."
    )

    @branch.asset(
        value=DriftReport,
        is_retried=True,
        freshness_policy=_freshness(branch),
        kinds={"evidently", "postgres"},
        reads=[
            *(f"monitor.{field}" for field in JUDGING),
            *(["encoder"] if branch.config.monitor.needs_encoder else []),
        ],
        ins={"deployment": "deployment"},
        deps=["reference_data"],
        observes=[request_log_key(branch.config.name)],
        checks=[no_drift],
    )
    def drift_report(context: dg.AssetExecutionContext, deployment: Deployment) -> dg.MaterializeResult:
        """The verdict on a window of requests of one model version, with what moved.

        The window is half-open, in UTC: the schedule's, the config's, or the last days until the run was asked for. One
        family-wise test decides (`monitor.detectors`, by the same permutations). Kept in Postgres, in central storage
        and in the Evidently workspace.
        """
        from cv_platform.monitoring.episodes import what_changed
        from cv_platform.monitoring.exported_metrics import export_drift
        from cv_platform.monitoring.report import ReportPlace, report_on_service
        from cv_platform.monitoring.sentences import drift_summary
        from cv_platform.monitoring.top_images import contact_sheet
        from cv_platform.record_store import RecordStore

        run = branch.run(context)
        home = run.settings.home
        evidently = run.settings.evidently_url or home / "evidently"
        records = RecordStore(home, run.config.name)
        shown = records.latest(PackedImages), records.latest(DriftDetectors)
        place = ReportPlace(run.installation.storage(), evidently, home, *shown)
        with run.installation.engine() as engine:
            report, reference = report_on_service(
                run.config, deployment.model, engine=engine, place=place, now=run.asked
            )
            change = what_changed(engine, report)
            is_shown = change in ("drift", "drift has changed") and run.config.alerts.with_images
            sheet = contact_sheet(report, engine, run.config.model.sample_bits) if is_shown else None
        summary = drift_summary(report)
        if change and run.config.alerts.on_drift:
            run.alert(change, summary, sheet)
        export_drift(home, report)
        metadata = {**drift_metadata(report), "reference": reference}
        return run.result(report, metadata, checked(no_drift, report.verdict != "drift", summary))

    return drift_report


def production_metrics_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/production_metrics`."""
    as_on_the_test_split = branch.check(
        "accuracy_holds_in_production",
        "production_metrics",
        blocking=False,
        description="Predictions with feedback are not significantly less often right than those of the test split.",
    )

    @branch.asset(
        value=ProductionMetrics,
        is_retried=True,
        freshness_policy=_freshness(branch),
        kinds={"postgres", "mlflow"},
        reads=["monitor.alpha", "monitor.min_feedback"],
        deps=["deployment"],
        observes=[request_log_key(branch.config.name)],
        checks=[as_on_the_test_split],
    )
    def production_metrics(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Accuracy in production by model version, from the feedback on the predictions of the monitor's window.

        A prediction's latest feedback counts, from any source. People choose what they comment on, mistakes more often
        than hits: these figures are of the predictions with feedback, and of all only where those are a random sample.
        """
        from cv_platform.errors import TrackingError
        from cv_platform.monitoring.exported_metrics import export_production
        from cv_platform.monitoring.production_metrics import log_production, measure_production
        from cv_platform.monitoring.sentences import production_summary

        run = branch.run(context)
        with run.installation.engine() as engine:
            metrics = measure_production(
                run.config,
                model_name=run.config.model.model_name,
                engine=engine,
                storage=run.installation.storage(),
                now=run.asked,
                directory=run.settings.home / "production_metrics" / run.config.name,
            )
        if metrics.with_feedback:
            try:
                with run.mlflow.stage(context, run.settings, run.config, run.config.evaluate.mlflow) as mlflow_run:
                    log_production(mlflow_run, metrics)
            except TrackingError as err:  # What people said of a window counts without its place among the trainings.
                context.log.warning(f"These figures are not in MLflow: {err}")
        export_production(run.settings.home, metrics)
        checks = checked(as_on_the_test_split, not metrics.worse_versions, production_summary(metrics))
        return run.result(metrics, _production_metadata(metrics), checks)

    return production_metrics


def labeling_queue_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/labeling_queue`."""

    @branch.asset(
        value=LabelingQueue,
        is_retried=True,
        kinds={"postgres", "onnx"},
        reads=Reads(["labels", "encoder"], ignores=["labels.max_wrong_fraction", "labels.keep_expired"]),
        ins={"dataset": "dataset", "embeddings": "embeddings"},
        deps=["drift_report"],
        observes=[request_log_key(branch.config.name)],
    )
    def labeling_queue(
        context: dg.AssetExecutionContext, dataset: DatasetVersion, embeddings: Embeddings
    ) -> dg.MaterializeResult:
        """What people are asked to label next, of the requests that came since they were asked last.

        A random share, what the model does not know, what drives the drift report, what the dataset has nothing like,
        what a challenger answers otherwise, and what the model is least sure of. The items are in Postgres, each with
        its reason.
        """
        from cv_platform.monitoring.labeling_queue import QueueSources, fill_queue
        from cv_platform.record_store import RecordStore
        from cv_platform.scoring.unlabelled import UnlabelledImages

        run = branch.run(context)
        records = RecordStore(run.settings.home, run.config.name)
        report, replay, scores = records.latest(DriftReport), records.latest(Replay), records.latest(BatchScores)
        folder = UnlabelledImages(scores, run.settings.home / "cache" / "unlabelled") if scores else None
        sources = QueueSources(dataset, embeddings, report, run.installation.storage(), run.settings, replay, folder)
        with run.installation.engine() as engine:
            queue = fill_queue(run.config, engine, sources, now=run.asked)
        return run.result(
            queue,
            metadata={
                "dagster/row_count": sum(queue.counts.values()),
                "requests": queue.requests,
                "candidates": queue.candidates,
                "waiting": queue.waiting,
                "reasons": table([{"reason": name, "images": count} for name, count in queue.counts.items()]),
                "problems": list(queue.problems),
            },
        )

    return labeling_queue


def _freshness(branch: Branch) -> dg.FreshnessPolicy:
    """Returns when the page warns: two hours after a scheduled window that nobody has judged; a day after it, fails."""
    period = branch.config.monitor.period
    return dg.FreshnessPolicy.time_window(
        fail_window=period + timedelta(days=1), warn_window=period + timedelta(hours=2)
    )


def drift_metadata(report: DriftReport) -> dict[str, Any]:
    """Returns what Dagster's page shows of a report."""
    columns = {"class_name", "ks_distance", "reference_share", "current_share", "adjusted_p_value"}
    return {
        "verdict": report.verdict,
        "dagster/row_count": report.rows,
        "late_rows": report.late_rows,
        "other_requests": report.other_requests,
        "model_version": report.model.version,
        "window_start_utc": dg.MetadataValue.text(report.window_start_utc.isoformat()),
        "window_end_utc": dg.MetadataValue.text(report.window_end_utc.isoformat()),
        # Numbers of their own are what the page plots over time.
        **{f"adjusted_p_{name}": p for name, p in report.adjusted_p_values.items()},
        "p_values": table([{"test": name, "p": p} for name, p in report.p_values.items()]),
        "moved_classes": table([movement.model_dump(include=columns) for movement in report.moved_classes]),
        "slices": table([one.model_dump() for one in report.slices]),
        "encoded_rows": report.encoded_rows,
        "images": table(report.top_images[:20]),
        "report_id": report.report_id,
        "report": report.report_url,
        "evidently_run_id": report.evidently_run_id or "",
    }


def _production_metadata(metrics: ProductionMetrics) -> dict[str, Any]:
    from cv_platform.monitoring.sentences import production_figures, production_summary, version_row

    return {
        "summary": production_summary(metrics),
        "predictions": metrics.predictions,
        "late_rows": metrics.late_rows,
        **production_figures(metrics),
        "with_feedback": metrics.with_feedback,
        "versions": table([version_row(version) for version in metrics.versions]),
        **{f"per_class_{v.model_version}": table(v.per_class) for v in metrics.versions if v.per_class},
        **{
            f"slices_{v.model_version}": table([one.model_dump() for one in v.slices])
            for v in metrics.versions
            if v.slices
        },
        **{name: file_link(path) for name, path in metrics.plots.items()},
        "problems": list(metrics.problems),
    }
