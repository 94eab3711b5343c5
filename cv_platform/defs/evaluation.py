"""The asset `evaluation`: what the model reaches on the test split, and whether it may be promoted."""

import dagster as dg

from cv_platform.datasets.packing import PackedImages
from cv_platform.defs.branch import Branch, Run
from cv_platform.defs.metadata import file_link, picture, table
from cv_platform.errors import BundleNotFoundError, CorruptBundleError
from cv_platform.evaluation.report import Evaluation
from cv_platform.training.trainer import TrainedModel


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
        sections=["evaluate", "model"],
        ins={"trained": "model", "packed": "packed_images"},
        checks=[gate],
    )
    def evaluation(
        context: dg.AssetExecutionContext, trained: TrainedModel, packed: PackedImages
    ) -> dg.MaterializeResult:
        """Metrics on the test split from one ordered pass: per class, confusion matrix, calibration, worst errors.

        Bento and deployment refuse a model version whose latest verdict failed.
        """
        from cv_platform.datasets.packing import require_same_pack
        from cv_platform.evaluation.evaluate import evaluate_model

        run = branch.run(context)
        require_same_pack(trained.pack, packed)
        champion_accuracy = _champion_accuracy(run, trained.model_name, packed.dvc_md5)
        with run.mlflow.stage(context, run.settings, run.config, run.config.evaluate.mlflow) as mlflow_run:
            result = evaluate_model(
                keras_path=trained.keras_path,
                model_name=trained.model_name,
                version=trained.version,
                class_names=trained.class_names,
                classifier_type=trained.classifier_type,
                threshold=run.config.model.threshold,
                packed=packed,
                config=run.config.evaluate,
                champion_accuracy=champion_accuracy,
                temperature=trained.temperature,
                directory=run.settings.home / "evaluation",
                run=mlflow_run,
            )
        return dg.MaterializeResult(
            value=result,
            metadata={
                "version": result.version,
                "passed": result.passed,
                **result.metrics,
                "per_class": table(result.per_class),
                "predictions": file_link(result.predictions_path),
                "mlflow_run_id": result.mlflow_run_id or "",
                "mlflow_url": dg.MetadataValue.url(mlflow_run.url(run.settings.mlflow_pages)),
                **{name: picture(path, name) for name, path in result.plots.items()},
            },
            check_results=[
                dg.AssetCheckResult(
                    check_name=gate.name,
                    passed=result.passed,
                    description="; ".join(result.reasons) or "All limits hold.",
                )
            ],
        )

    return evaluation


def _champion_accuracy(run: Run, model_name: str, dvc_md5: str) -> float | None:
    """Returns the accuracy of the version in production, if it was measured on this very dataset version.

    A bundle that cannot be read must not stand in the way of the model that would replace it.
    """
    try:
        production = run.installation.storage().production(run.config.deploy.service, model_name)
    except (BundleNotFoundError, CorruptBundleError) as err:
        run.context.log.warning(f"The version in production cannot be compared with: {err}")
        return None
    if production is None:
        return None
    if production.dvc_md5 != dvc_md5:
        run.context.log.warning(
            f"{production.version} in production was evaluated on dataset {production.dvc_tag} ({production.dvc_md5}); "
            f"this is {dvc_md5}. Accuracies of different test splits are not compared."
        )
        return None
    return production.metrics.get("accuracy")
