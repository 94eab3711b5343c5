"""The asset `evaluation`: what the model reaches on the test split, and whether it may be promoted."""

from typing import Any

import dagster as dg

from cv_platform.defs.branch import GPU, Branch, checked
from cv_platform.defs.metadata import file_link, table
from cv_platform.defs.versions import Reads
from cv_platform.records import DatasetVersion, Embeddings, Evaluation, PackedImages, TrainedModel


def evaluation_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/evaluation`."""
    gate = branch.check(
        "promotion_gate",
        "evaluation",
        blocking=True,
        description="The metrics reach the config's minimum, and on the same test images the model does not fall "
        "behind the one in production.",
    )

    @branch.asset(
        value=Evaluation,
        kinds={"scikitlearn", "mlflow"},
        reads=Reads(["evaluate", "model.threshold", "deploy.service"], ignores=["evaluate.mlflow"]),
        pool=GPU,
        ins={"trained": "model", "packed": "packed_images", "version": "dataset", "embeddings": "embeddings"},
        checks=[gate],
    )
    def evaluation(
        context: dg.AssetExecutionContext,
        trained: TrainedModel,
        packed: PackedImages,
        version: DatasetVersion,
        embeddings: Embeddings,
    ) -> dg.MaterializeResult:
        """Metrics on the test split from one ordered pass: per class, confusion matrix, calibration, worst errors.

        Bento and deployment refuse a model version whose latest verdict failed.
        """
        from cv_platform.datasets.packing import open_split
        from cv_platform.deployment.champion import ask_champion
        from cv_platform.evaluation.evaluate import evaluate_model
        from cv_platform.evaluation.neighbours import Neighbours

        run = branch.run(context)
        home, storage, service = run.settings.home, run.installation.storage(), run.config.deploy.service
        test = open_split(packed, "test", beside=trained)
        champion = ask_champion(
            trained.model, packed.task, test, version, service=service, storage=storage, home=home, engine=run.engine
        )
        neighbours = Neighbours(open_split(packed, "train"), embeddings, version.manifest)
        with run.mlflow.stage(context, run.settings, run.config, run.config.evaluate.mlflow) as mlflow_run:
            result = evaluate_model(
                trained,
                packed,
                run.config,
                champion=champion,
                directory=home / "evaluation",
                run=mlflow_run,
                manifest=version.manifest_path,
                neighbours=neighbours,
                engine=run.engine,
            )
        url = dg.MetadataValue.url(mlflow_run.url(run.settings.mlflow_pages))
        checks = checked(gate, result.passed, "; ".join(result.reasons) or "All limits hold.")
        return run.result(result, {**_metadata(result), "mlflow_url": url}, checks)

    return evaluation


def _metadata(result: Evaluation) -> dict[str, Any]:
    return {
        "version": result.model.version,
        "passed": result.passed,
        **result.metrics,
        "intervals": table(
            [{"metric": name, "low": low, "high": high} for name, (low, high) in result.intervals.items()]
        ),
        "per_class": table(
            [{key: cell for key, cell in row.items() if key != "intervals"} for row in result.per_class]
        ),
        "slices": table([part.model_dump() for part in result.slices[:20]]),
        "robustness": table([row.model_dump() for row in result.robustness]),
        "predictions": file_link(result.predictions_path),
        "mlflow_run_id": result.mlflow_run_id or "",
        **{name: file_link(path) for name, path in result.plots.items()},
    }
