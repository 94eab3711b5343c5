"""The assets `bento` (an immutable bundle and a built Bento), `challenger_replay` (the new model on what production was
asked last) and `deployment` (the production pointer, moved).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import dagster as dg

from cv_platform.audit import AuditEntry, Note
from cv_platform.defs.automation import RUN
from cv_platform.defs.branch import AssetRun, Branch, checked
from cv_platform.defs.metadata import file_link, table
from cv_platform.defs.versions import Reads
from cv_platform.deployment.bento import SOURCES
from cv_platform.errors import VerdictError
from cv_platform.probation import Probation
from cv_platform.records import (
    Deployment,
    DriftDetectors,
    Evaluation,
    ModelBundle,
    ModelIdentity,
    PackedImages,
    ReferenceData,
    Replay,
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
            code=SOURCES,
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


def challenger_replay_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/challenger_replay`."""
    holds = branch.check(
        "replay_holds",
        "challenger_replay",
        blocking=True,
        description="On the uploads that production was asked about last, the new model answers within the limits of "
        "deploy.replay, and is not less often right than the one in production.",
    )

    @branch.asset(
        value=Replay,
        is_retried=True,
        kinds={"onnx", "postgres"},
        reads=[
            "deploy.service",
            "deploy.replay",
            "evaluate.alpha",
            "evaluate.max_regression",
            "evaluate.max_recall_regression",
        ],
        ins={"bundle": "bento"},
        checks=[holds],
    )
    def challenger_replay(context: dg.AssetExecutionContext, bundle: ModelBundle) -> dg.MaterializeResult:
        """The new model beside the one in production, on the uploads that were logged last.

        How many answers stay, which change, how sure and how costly they are, how much is unknown; and on labelled
        uploads that neither was trained on, which of the two is right. Deployment refuses a model that does not pass.
        """
        from cv_platform.deployment.champion import champion_of
        from cv_platform.deployment.replay import replay_challenger

        run = branch.run(context)
        model, storage, home = bundle.model, run.installation.storage(), run.settings.home
        champion = champion_of(model, service=run.config.deploy.service, storage=storage)
        directory = home / "replays" / model.model_name / model.version
        if champion is None:
            reasons = ("no other version of this model is in production to compare with",)
            replay = Replay(model=model, champion=None, directory=directory, reasons=reasons)
        else:
            places = {"storage": storage, "home": home, "directory": directory}
            with run.installation.engine() as engine:
                replay = replay_challenger(model, champion, run.config, engine=engine, compute=run.engine, **places)
        override = run.installation.audit().override(model.model_name, model.version)
        overruled = "" if replay.passed or override is None else f"Overruled by {override.by}: {override.because}. "
        passed, reasons = replay.passed or override is not None, overruled + "; ".join(replay.reasons)
        return run.result(replay, _replay_metadata(replay), checked(holds, passed, reasons))

    return challenger_replay


def _replay_metadata(replay: Replay) -> dict[str, Any]:
    compared, without = replay.comparison, {"model", "champion", "directory", "changed", "comparison", "made_from"}
    figures = replay.model_dump(exclude=without)
    if compared is not None:
        figures |= {"accuracy": compared.accuracy, "champion_accuracy": compared.champion_accuracy}
    return {
        "version": replay.model.version,
        "champion": replay.champion.version if replay.champion else "",
        **{name: list(value) if isinstance(value, tuple) else value for name, value in figures.items()},
        "changed": table([one.model_dump() for one in replay.changed]),
        **({"page": file_link(replay.page_path)} if replay.page_path.is_file() else {}),
    }


def deployment_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/deployment`."""

    @branch.asset(
        value=Deployment,
        is_retried=True,
        pool=f"pointer_{branch.config.deploy.service}",
        kinds={"bentoml"},
        reads=["deploy.service"],
        ins={"bundle": "bento", "evaluation": "evaluation", "replay": "challenger_replay"},
    )
    def deployment(
        context: dg.AssetExecutionContext, bundle: ModelBundle, evaluation: Evaluation, replay: Replay
    ) -> dg.MaterializeResult:
        """The production pointer, moved after a load test, and every running worker confirmed on the new version.

        A worker that cannot take the version moves the pointer back. With no service running, the next start serves it.
        `deploy.canary` and `deploy.shadow` try it out on live traffic first: the service itself ends that, and this
        asset waits for it.
        """
        from cv_platform.deployment.rollout import deploy
        from cv_platform.errors import ChallengerReturnedError
        from cv_platform.evaluation.report import require_promotion

        run = branch.run(context)
        override = run.installation.audit().override(bundle.model.model_name, bundle.model.version)
        require_promotion(evaluation, bundle.model, override)
        require_replay(replay, bundle.model, override)
        by_run = Note(f"{RUN}{context.run_id}", "it has passed its promotion gate and its replay")
        storage = run.installation.storage()
        try:
            result = deploy(
                bundle.model,
                run.config.deploy,
                experiment=run.config.name,
                storage=storage,
                cache=run.settings.home / "cache",
                note=Note(override.by, override.because) if override else by_run,
            )
        except ChallengerReturnedError as err:
            numbers = _probation_metadata(Probation.model_validate(err.numbers))
            raise dg.Failure(str(err), metadata=numbers, allow_retries=False) from err
        _move_alias(run, result.model)
        return run.result(result, _deployment_metadata(result, storage.read_pointer(result.service)))

    return deployment


def _move_alias(run: AssetRun, model: ModelIdentity) -> None:
    from cv_platform.errors import TrackingError
    from cv_platform.tracking import CHAMPION, set_alias

    try:
        set_alias(run.settings.mlflow_tracking_uri, model.model_name, CHAMPION, model.version)
    except TrackingError as err:  # The service serves the version already; MLflow only shows it.
        run.context.log.warning(f"MLflow's alias {CHAMPION} was not moved: {err}")


def _deployment_metadata(result: Deployment, pointer: ProductionPointer | None) -> dict[str, Any]:
    probation = pointer.probation if pointer else None
    return {
        **(_probation_metadata(probation) if probation else {}),
        "version": result.model.version,
        "previous_version": result.previous_version or "",
        "confirmed_workers": list(result.confirmed_workers),
        "pointer_history": pointer_history(pointer),
        **result.model_dump(include={"service", "seconds", "message"}),
    }


def _probation_metadata(probation: Probation) -> dict[str, Any]:
    shown = probation.model_dump(mode="json")
    return {"probation": shown, "champion_and_challenger": table(probation.figures)}


def pointer_history(pointer: ProductionPointer | None) -> dg.TableMetadataValue:
    """Shows who moved a service to which version, when and why, the latest first."""
    return table([move.model_dump(mode="json") for move in pointer.history] if pointer else [])


def require_replay(replay: Replay, model: ModelIdentity, override: AuditEntry | None) -> None:
    """Refuses to go on without a replay of this very model version that passed, or an override; in later runs too.

    Raises:
        VerdictError: the latest replay is of another version, or it did not pass.
    """
    require_same_model(replay, model)
    if not replay.passed and override is None:
        raise VerdictError(
            f"Expected a model that holds on logged requests. Received: {model}: {'; '.join(replay.reasons)}. Look at "
            f"{replay.page_path}, then change the limits in `deploy.replay`, or overrule them: "
            f'cv-platform promote {model.version} --because "…".'
        )


def require_same_model(record: DriftDetectors | ReferenceData | Replay, model: ModelIdentity) -> None:
    """Refuses detectors, reference data or a replay of another model version.

    Raises:
        VerdictError: they belong to another version.
    """
    if record.model != model:
        raise VerdictError(
            f"Expected {type(record).__name__} of {model}. Received: of {record.model}. "
            "Materialise what is upstream of this asset again."
        )
