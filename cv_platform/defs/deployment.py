"""The assets `bento` (an immutable bundle and a built Bento) and `deployment` (the production pointer, moved)."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import dagster as dg

from cv_platform.audit import Note
from cv_platform.defs.automation import RUN
from cv_platform.defs.branch import Branch
from cv_platform.defs.metadata import file_link, table
from cv_platform.defs.versions import Reads
from cv_platform.errors import VerdictError
from cv_platform.records import (
    Deployment,
    DriftDetectors,
    Evaluation,
    ModelBundle,
    ModelIdentity,
    PackedImages,
    ReferenceData,
    TrainedModel,
)
from cv_platform.storage import ProductionPointer


def bento_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/bento`."""

    @branch.asset(
        value=ModelBundle,
        is_retried=True,
        kinds={"bentoml"},
        reads=Reads(
            [
                "deploy.runtime",
                "deploy.exports",
                "deploy.max_export_loss",
                "deploy.golden_images",
                "deploy.data_licence",
            ],
            code=["cv_platform.serving", "bentos"],
        ),
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
        images with their outputs for its self-test. Files for other devices (`deploy.exports`) lie beside the model.
        """
        from cv_platform.datasets.packing import open_split
        from cv_platform.deployment.bundle import Place, Splits, publish_model
        from cv_platform.deployment.exports import measure_int8, write_exports
        from cv_platform.deployment.golden import golden_rows
        from cv_platform.deployment.int8 import INT8
        from cv_platform.evaluation.report import require_promotion

        run = branch.run(context)
        deploy, home = run.config.deploy, run.settings.home
        override = run.installation.audit().override(trained.model.model_name, trained.model.version)
        require_promotion(evaluation, trained.model, override)
        for record in (detectors, reference):
            require_same_model(record, trained.model)
        test = open_split(packed, "test", beside=trained)
        golden = test.images[golden_rows(test.targets, deploy.golden_images)]
        place = Place(
            run.installation.storage(), home / "bentoml", home / "cache", spare_bytes=run.settings.spare_disk_bytes
        )
        splits = Splits(open_split(packed, "train"), open_split(packed, "valid"), test)
        exports = write_exports(trained, deploy, test=test, train=splits.train, threshold=evaluation.threshold)
        if deploy.runtime == INT8:
            exports += (measure_int8(trained, reference, deploy, test=test, threshold=evaluation.threshold),)
        bundle = publish_model(
            trained, detectors, evaluation, golden, deploy=deploy, place=place, splits=splits, exports=exports
        )
        return run.result(bundle, _bento_metadata(bundle, trained.exports_directory, deploy.exports))

    return bento


def _bento_metadata(bundle: ModelBundle, exports: Path, wanted: Collection[str]) -> dict[str, Any]:
    links = {
        f"export_{export.format}": file_link(exports / export.file)
        for export in bundle.exports
        if export.file and export.format in wanted
    }
    return {
        "version": bundle.model.version,
        "published": bundle.url,
        **bundle.model_dump(include={"bento_tag", "bytes", "runtime", "runtime_reason"}),
        **{f"parity_{name}": value for name, value in bundle.parity.items()},
        "unknown": table([rate.model_dump() for rate in bundle.unknown]),
        "exports": table([export.model_dump() for export in bundle.exports]),
        **links,
    }


def deployment_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/deployment`."""

    @branch.asset(
        value=Deployment,
        is_retried=True,
        pool=f"pointer_{branch.config.deploy.service}",
        kinds={"bentoml"},
        reads=["deploy.service"],
        ins={"bundle": "bento", "evaluation": "evaluation"},
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
        override = run.installation.audit().override(bundle.model.model_name, bundle.model.version)
        require_promotion(evaluation, bundle.model, override)
        by_run = Note(f"{RUN}{context.run_id}", "it has passed its promotion gate")
        storage = run.installation.storage()
        result = deploy(
            bundle.model,
            run.config.deploy,
            experiment=run.config.name,
            storage=storage,
            cache=run.settings.home / "cache",
            note=Note(override.by, override.because) if override else by_run,
        )
        try:
            set_alias(run.settings.mlflow_tracking_uri, bundle.model.model_name, CHAMPION, bundle.model.version)
        except TrackingError as err:  # The service serves the version already; MLflow only shows it.
            context.log.warning(f"MLflow's alias {CHAMPION} was not moved: {err}")
        return run.result(
            result,
            metadata={
                "version": result.model.version,
                "previous_version": result.previous_version or "",
                "confirmed_workers": list(result.confirmed_workers),
                "pointer_history": pointer_history(storage.read_pointer(result.service)),
                **result.model_dump(include={"service", "seconds", "message"}),
            },
        )

    return deployment


def pointer_history(pointer: ProductionPointer | None) -> dg.TableMetadataValue:
    """Shows who moved a service to which version, when and why, the latest first."""
    return table([move.model_dump(mode="json") for move in pointer.history] if pointer else [])


def require_same_model(record: DriftDetectors | ReferenceData, model: ModelIdentity) -> None:
    """Refuses detectors or reference data of another model version.

    Raises:
        VerdictError: they belong to another version.
    """
    if record.model != model:
        raise VerdictError(
            f"Expected {type(record).__name__} of {model}. Received: of {record.model}. "
            "Materialise what is upstream of this asset again."
        )
