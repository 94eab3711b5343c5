"""The assets `drift_detectors` and `reference_data`: what later windows of requests are compared with."""

import dagster as dg

from cv_platform.defs.branch import GPU, Branch, checked
from cv_platform.defs.metadata import file_link, table
from cv_platform.records import DriftDetectors, PackedImages, ReferenceData, TrainedModel


def drift_detectors_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/drift_detectors`."""
    calibrated = branch.check(
        "false_alarm_rate",
        "drift_detectors",
        blocking=True,
        description="The false-alarm rate measured on windows of the test split is compatible with monitor.alpha.",
    )

    @branch.asset(
        value=DriftDetectors,
        pool=GPU,
        kinds={"keras"},
        reads=[
            "model.drift_detection.uae_encoding_dims",
            "model.drift_detection.uae_seed",
            "monitor.alpha",
            "monitor.require_calibration",
            "monitor.seed",
            "monitor.detectors",
            *(["encoder"] if branch.config.monitor.needs_encoder else []),
        ],
        ins={"trained": "model", "packed": "packed_images"},
        checks=[calibrated],
    )
    def drift_detectors(
        context: dg.AssetExecutionContext, trained: TrainedModel, packed: PackedImages
    ) -> dg.MaterializeResult:
        """The seeded encoder (UAE) beside the model's own heads (BBSD: probabilities; penultimate features).

        What the verdict notices is measured on windows of the test split, as they are and made worse.
        """
        from cv_platform.datasets.packing import open_split
        from cv_platform.drift.detectors import build_detectors, false_alarm_summary, is_calibrated
        from cv_platform.drift.power import UNCHANGED

        run = branch.run(context)
        reference = open_split(packed, "reference", beside=trained)
        test = open_split(packed, "test", beside=trained)
        detectors = build_detectors(trained, reference, test, run.config, home=run.settings.home, engine=run.engine)
        alpha = run.config.monitor.alpha
        false = {f"false_alarms_{row.images}": row.rate for row in detectors.detection if row.shift == UNCHANGED}
        metadata = {
            "version": detectors.model.version,
            "encoder": file_link(detectors.uae_path),
            **detectors.model_dump(include={"encoder_hash", "uae_dims", "feature_dims"}),
            **false,  # Numbers of their own are what the page plots over time.
            "detection_by_window_size": file_link(detectors.plot_path),
            "detection": table([row.model_dump() for row in detectors.detection]),
        }
        found = detectors.detection
        # Too few images to measure anything are no reason to stop.
        stops = bool(false) and run.config.monitor.require_calibration
        checks = checked(calibrated, is_calibrated(found, alpha), false_alarm_summary(found, alpha), stops=stops)
        return run.result(detectors, metadata, checks)

    return drift_detectors


def reference_data_asset(branch: Branch) -> dg.AssetsDefinition:
    """Returns the asset `<name>/reference_data`."""

    @branch.asset(
        value=ReferenceData,
        is_retried=True,
        pool=GPU,
        kinds={"parquet"},
        reads=[
            "model.threshold",
            "model.drift_detection.uae_seed",
            "model.drift_detection.reference_data_n_sample",
            "deploy.runtime",
        ],
        ins={"trained": "model", "detectors": "drift_detectors", "packed": "packed_images"},
    )
    def reference_data(
        context: dg.AssetExecutionContext, trained: TrainedModel, detectors: DriftDetectors, packed: PackedImages
    ) -> dg.MaterializeResult:
        """`<model_name>_ref_data.parquet`: a row per image of the reference split, from one ordered pass.

        Neither training, model selection nor calibration has seen these images. Columns: path, sha256, label, model
        and version, predicted class, UAE embedding, probabilities, penultimate features, pixel statistics. Where a
        graph in 8 bits is served, it answers here too.
        """
        from cv_platform.datasets.packing import open_split
        from cv_platform.deployment.int8 import INT8, open_int8, write_int8
        from cv_platform.drift.reference import build_reference_data

        run = branch.run(context)
        held_out = open_split(packed, "reference", beside=trained)
        storage = run.installation.storage()
        answer = None
        if run.config.deploy.runtime == INT8:
            write_int8(trained, detectors, open_split(packed, "train", beside=trained))
            answer = open_int8(trained.int8_path)
        reference = build_reference_data(
            trained, detectors, held_out, run.config.model, storage=storage, answer=answer, engine=run.engine
        )
        return run.result(
            reference,
            metadata={
                "dagster/row_count": reference.rows,
                "version": reference.model.version,
                "parquet": file_link(reference.path),
                "published": reference.url,
            },
        )

    return reference_data
