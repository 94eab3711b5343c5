"""The asset `model`: a Keras model trained on a dataset version whose validation passed."""

from pathlib import Path
from typing import Any

import dagster as dg

from cv_platform.defs.branch import GPU, Branch
from cv_platform.defs.metadata import file_link, table
from cv_platform.defs.runs.ray_job import ray_job
from cv_platform.defs.versions import Reads
from cv_platform.records import PackedImages, TrainedModel, ValidationVerdict

REPOSITORY = Path(__file__).resolve().parents[2]


def model_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/model`."""

    @branch.asset(
        value=TrainedModel,
        kinds={"keras", "tensorflow", "mlflow"},
        reads=Reads(
            ["train", "model"],
            ignores=["train.mlflow", "train.job_gpus", "model.threshold", "model.drift_detection"],
            code=["cv_platform/training/architectures"],
            functions=["model.architecture"],
        ),
        pool=GPU,
        ins={"packed": "packed_images", "verdict": "validation_report"},
    )
    def model(
        context: dg.AssetExecutionContext, packed: PackedImages, verdict: ValidationVerdict
    ) -> dg.MaterializeResult:
        """A trained Keras model with its effective config and provenance, and its MLflow run.

        Its confidences are calibrated: a temperature, fitted on the valid split, is in the weights of the last layer.
        Refuses a dataset version whose latest verdict failed. Where a training with the same effective config, data and
        code was killed, it goes on after its last whole epoch.
        """
        from cv_platform.tracking import head_commit
        from cv_platform.training.trainer import train_model
        from cv_platform.validation.verdict import require_verdict

        run = branch.run(context)
        require_verdict(verdict, dvc_md5=packed.provenance.dvc_md5, must_pass=True)
        with run.mlflow.stage(context, run.settings, run.config, run.config.train.mlflow) as mlflow_run:
            mlflow_run.log_artifact(verdict.report_path, "validation")
            trained = train_model(
                packed,
                run.config,
                directory=run.settings.home / "models",
                run=mlflow_run,
                git_commit=head_commit(REPOSITORY, otherwise=run.settings.revision),
                spare_bytes=run.settings.spare_disk_bytes,
                engine=run.engine,
                launch=ray_job(context, run.settings, run.config.train.job_gpus),
            )
        url = dg.MetadataValue.url(mlflow_run.url(run.settings.mlflow_pages))
        return run.result(trained, {**_metadata(trained), "mlflow_url": url})

    return model


def _metadata(trained: TrainedModel) -> dict[str, Any]:
    from cv_platform.training.trainer import AUGMENTED_IMAGES

    return {
        "version": trained.model.version,
        "keras": file_link(trained.keras_path),
        "mlflow_run_id": trained.mlflow_run_id or "",
        "epochs": trained.epochs_run,
        **trained.model_dump(include={"temperature", "seconds", "images_per_second"}),
        "last_epoch": table([{"metric": name, "value": each[-1]} for name, each in trained.history.items()]),
        "learning_curves": file_link(trained.directory / "learning_curves.png"),
        "augmented_images": file_link(trained.directory / AUGMENTED_IMAGES),
    }
