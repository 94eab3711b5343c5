"""The assets of images of a place that the config names: `batch_scores`, what the model in production says of them, and
`batch_drift_report`, whether they look like those that it was tested on.
"""

import dagster as dg

from cv_platform.defs.branch import Branch, checked
from cv_platform.defs.metadata import file_link, table
from cv_platform.defs.monitoring import JUDGING
from cv_platform.records import BatchDriftReport, BatchScores, Deployment, PackedImages


def batch_scores_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/batch_scores`, of a config that has `score.source`."""

    @branch.asset(
        value=BatchScores,
        is_retried=True,
        kinds={"onnx", "parquet"},
        reads=["score"],
        ins={"deployment": "deployment"},
    )
    def batch_scores(context: dg.AssetExecutionContext, deployment: Deployment) -> dg.MaterializeResult:
        """A row for each image of `score.source`, with the answer of the model in production, or why there is none.

        Probabilities, prediction, confidence, whether it is unknown, and what drift is judged by. A run that was killed
        goes on where it was.
        """
        from cv_platform.scoring.score import score_images

        run = branch.run(context)
        source, heat_maps = run.config.score.source or "", run.config.score.heat_maps
        directory = run.settings.home.absolute() / "scores" / run.config.name / deployment.model.version
        output = directory / BatchScores.FILE
        scored = score_images(
            source, deployment.model.version, output, settings=run.settings, engine=run.engine, heat_maps=heat_maps
        )
        record = BatchScores.of_file(deployment.model, source, directory)
        return run.result(
            record,
            metadata={
                "dagster/row_count": scored.images,
                "file": file_link(output),
                "model_version": deployment.model.version,
                "without_an_answer": scored.problems,
                "unknown": scored.unknown,
                "passed_over": scored.passed_over.line() or "nothing",
                "images_per_second": scored.computed / max(scored.seconds, 1e-9),
            },
        )

    return batch_scores


def batch_drift_report_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/batch_drift_report`, of a config that has `score.source`."""
    no_drift = branch.check(
        "no_drift", "batch_drift_report", blocking=False, description="The scored images look like the reference."
    )

    @branch.asset(
        value=BatchDriftReport,
        is_retried=True,
        kinds={"html"},
        reads=[f"monitor.{field}" for field in JUDGING],
        ins={"batch_scores": "batch_scores"},
        deps=["reference_data"],
        checks=[no_drift],
    )
    def batch_drift_report(context: dg.AssetExecutionContext, batch_scores: BatchScores) -> dg.MaterializeResult:
        """The verdict on the scored images, with what moved, as of a window of requests: a page.

        It is judged at `monitor.alpha`. Nobody is alerted, and no window of requests has less of the year's allowance.
        """
        from cv_platform.monitoring.scored import ScoredImages, report_on_scores
        from cv_platform.monitoring.sentences import drift_summary
        from cv_platform.record_store import RecordStore
        from cv_platform.scoring.sources import reader_of

        run = branch.run(context)
        home, source = run.settings.home, batch_scores.source
        scores = batch_scores.directory / BatchScores.FILE
        report = report_on_scores(
            ScoredImages(batch_scores.model, source, scores, reader_of(source)),
            run.config.monitor,
            page := batch_scores.directory / BatchDriftReport.FILE,
            experiment=run.config.name,
            storage=run.installation.storage(),
            cache=home / "cache",
            now=run.asked,
            packed=RecordStore(home, run.config.name).latest(PackedImages),
        )
        metadata = {
            "verdict": report.verdict,
            "dagster/row_count": report.rows,
            "page": file_link(page),
            "p_values": table([{"detector": name, "adjusted p": p} for name, p in report.adjusted_p_values.items()]),
        }
        return run.result(report, metadata, checked(no_drift, report.verdict != "drift", drift_summary(report)))

    return batch_drift_report
