"""The asset `batch_scores`: what the model in production says of the images of a place that the config names."""

import dagster as dg

from cv_platform.defs.branch import Branch
from cv_platform.defs.metadata import file_link
from cv_platform.records import BatchScores, Deployment


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
        source = run.config.score.source or ""
        directory = run.settings.home.absolute() / "scores" / run.config.name / deployment.model.version
        output = directory / BatchScores.FILE
        scored = score_images(source, deployment.model.version, output, settings=run.settings, engine=run.engine)
        record = BatchScores.of_file(deployment.model, source, directory)
        return run.result(
            record,
            metadata={
                "dagster/row_count": scored.images,
                "file": file_link(output),
                "model_version": deployment.model.version,
                "without_an_answer": scored.problems,
                "unknown": scored.unknown,
                "images_per_second": scored.computed / max(scored.seconds, 1e-9),
            },
        )

    return batch_scores
