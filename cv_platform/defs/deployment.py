"""The assets `bento` (an immutable bundle and a built Bento) and `deployment` (the production pointer, moved)."""

import dagster as dg

from cv_platform.datasets.packing import PackedImages
from cv_platform.defs.branch import Branch
from cv_platform.deployment.bundle import ModelBundle
from cv_platform.deployment.rollout import Deployment
from cv_platform.drift.detectors import DriftDetectors
from cv_platform.drift.reference import ReferenceData
from cv_platform.errors import VerdictError
from cv_platform.evaluation.report import Evaluation
from cv_platform.training.trainer import TrainedModel


def bento_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/bento`."""

    @branch.asset(
        value=ModelBundle,
        kinds={"bentoml"},
        sections=["deploy", "model"],
        ins={
            "trained": "model",
            "evaluation": "evaluation",
            "detectors": "drift_detectors",
            "reference": "reference_data",
            "packed": "packed_images",
        },
    )
    def bento(
        context: dg.AssetExecutionContext,
        trained: TrainedModel,
        evaluation: Evaluation,
        detectors: DriftDetectors,
        reference: ReferenceData,
        packed: PackedImages,
    ) -> dg.MaterializeResult:
        """An immutable bundle in central storage and a Bento built from it.

        The bundle answers probabilities, drift features and the Grad-CAM map in a single call, and carries golden
        images with their outputs for its self-test.
        """
        from cv_platform.datasets.packing import open_split, require_same_pack
        from cv_platform.deployment.bundle import publish_model
        from cv_platform.deployment.golden import golden_rows
        from cv_platform.evaluation.report import require_promotion

        run = branch.run(context)
        require_promotion(evaluation, version=trained.version)
        require_same_pack(trained.pack, packed)
        test = open_split(packed, "test")
        golden = test.images[golden_rows(test.targets, run.config.deploy.golden_images)]
        for record in (detectors, reference):
            require_same_version(record, trained.version)
        bundle = publish_model(
            model_name=trained.model_name,
            version=trained.version,
            keras_path=trained.keras_path,
            uae_path=detectors.uae_path,
            golden_images=golden,
            class_names=trained.class_names,
            classifier_type=trained.classifier_type,
            threshold=run.config.model.threshold,
            temperature=trained.temperature,
            runtime=run.config.deploy.runtime,
            preprocessing_hash=trained.preprocessing_hash,
            encoder_hash=detectors.encoder_hash,
            dataset_name=trained.ds_name,
            dvc_tag=trained.dvc_tag,
            dvc_md5=trained.dvc_md5,
            git_commit=trained.git_commit,
            mlflow_run_id=trained.mlflow_run_id,
            metrics=evaluation.metrics,
            effective_config=trained.effective_config,
            storage=run.installation.storage(),
            bentoml_home=run.settings.home / "bentoml",
            cache=run.settings.home / "cache",
            spare_bytes=run.settings.spare_disk_bytes,
        )
        return dg.MaterializeResult(
            value=bundle,
            metadata={
                "version": bundle.version,
                "bento_tag": bundle.bento_tag,
                "bytes": bundle.bytes,
                "published": bundle.url,
                "runtime": bundle.runtime,
                "runtime_reason": bundle.runtime_reason,
                **{f"parity_{name}": value for name, value in bundle.parity.items()},
            },
        )

    return bento


def deployment_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/deployment`."""

    @branch.asset(
        value=Deployment, kinds={"bentoml"}, sections=["deploy"], ins={"bundle": "bento", "evaluation": "evaluation"}
    )
    def deployment(
        context: dg.AssetExecutionContext, bundle: ModelBundle, evaluation: Evaluation
    ) -> dg.MaterializeResult:
        """The production pointer, moved after a load test, and every running worker confirmed on the new version.

        A worker that cannot take the version moves the pointer back. With no service running, the next start serves it.
        """
        from cv_platform.deployment.rollout import deploy
        from cv_platform.errors import TrackingError
        from cv_platform.evaluation.report import require_promotion
        from cv_platform.tracking import CHAMPION, set_alias

        run = branch.run(context)
        require_promotion(evaluation, version=bundle.version)
        result = deploy(
            bundle,
            run.config.deploy,
            experiment=run.config.name,
            storage=run.installation.storage(),
            cache=run.settings.home / "cache",
        )
        try:
            set_alias(run.settings.mlflow_tracking_uri, bundle.model_name, CHAMPION, bundle.version)
        except TrackingError as err:  # The service serves the version already; MLflow only shows it.
            context.log.warning(f"MLflow's alias {CHAMPION} was not moved: {err}")
        return dg.MaterializeResult(
            value=result,
            metadata={
                "service": result.service,
                "version": result.version,
                "previous_version": result.previous_version or "",
                "confirmed_workers": list(result.confirmed_workers),
                "seconds": result.seconds,
                "message": result.message,
            },
        )

    return deployment


def require_same_version(record: DriftDetectors | ReferenceData, version: str) -> None:
    """Refuses detectors or reference data of another model version.

    Raises:
        VerdictError: they belong to another version.
    """
    if record.version != version:
        raise VerdictError(
            f"Expected {type(record).__name__} of model version {version}. Received: of {record.version}. "
            "Materialise what is upstream of this asset again."
        )
