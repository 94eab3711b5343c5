"""The asset `evaluation`: what the model reaches on the test split, and whether it may be promoted."""

import dagster as dg

from cv_platform.defs.branch import GPU, AssetRun, Branch
from cv_platform.defs.metadata import file_link, table
from cv_platform.errors import BundleNotFoundError, CorruptBundleError
from cv_platform.records import Evaluation, PackedImages, TrainedModel
from cv_platform.storage import BundleMetadata


def evaluation_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/evaluation`."""
    gate = branch.check(
        "promotion_gate",
        "evaluation",
        blocking=True,
        description="The metrics reach the config's minimum, and do not fall behind the production model.",
    )

    @branch.asset(
        value=Evaluation,
        kinds={"scikitlearn", "mlflow"},
        reads=["evaluate", "model.threshold"],
        pool=GPU,
        ignores=["evaluate.mlflow"],
        ins={"trained": "model", "packed": "packed_images"},
        checks=[gate],
    )
    def evaluation(
        context: dg.AssetExecutionContext, trained: TrainedModel, packed: PackedImages
    ) -> dg.MaterializeResult:
        """Metrics on the test split from one ordered pass: per class, confusion matrix, calibration, worst errors.

        Bento and deployment refuse a model version whose latest verdict failed.
        """
        from cv_platform.evaluation.evaluate import evaluate_model

        run = branch.run(context)
        champion = _champion(run, trained.model.model_name)
        with run.mlflow.stage(context, run.settings, run.config, run.config.evaluate.mlflow) as mlflow_run:
            directory = run.settings.home / "evaluation"
            result = evaluate_model(trained, packed, run.config, champion=champion, directory=directory, run=mlflow_run)
        return run.result(
            result,
            metadata={
                "version": result.model.version,
                "passed": result.passed,
                **result.metrics,
                "per_class": table(result.per_class),
                "predictions": file_link(result.predictions_path),
                "mlflow_run_id": result.mlflow_run_id or "",
                "mlflow_url": dg.MetadataValue.url(mlflow_run.url(run.settings.mlflow_pages)),
                **{name: file_link(path) for name, path in result.plots.items()},
            },
            checks=[
                dg.AssetCheckResult(
                    check_name=gate.name,
                    passed=result.passed,
                    description="; ".join(result.reasons) or "All limits hold.",
                )
            ],
        )

    return evaluation


def _champion(run: AssetRun, model_name: str) -> BundleMetadata | None:
    """Returns the version in production.

    A bundle that cannot be read must not stand in the way of the model that would replace it.
    """
    try:
        return run.installation.storage().production(run.config.deploy.service, model_name)
    except (BundleNotFoundError, CorruptBundleError) as err:
        run.context.log.warning(f"The version in production cannot be compared with: {err}")
        return None
