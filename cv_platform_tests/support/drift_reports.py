"""Records of drift reports, with everything that a page shows."""

from __future__ import annotations

from datetime import UTC, datetime

from cv_platform.properties import PROPERTY_NAMES
from cv_platform.records import (
    AccuracyEstimate,
    ClassMix,
    ClassMovement,
    DriftCauses,
    DriftReport,
    EffectSizes,
    LargestDistance,
    PropertyShift,
)


def make_report(**changes: object) -> DriftReport:
    values: dict[str, object] = {
        "report_id": "0b8a1c9e-0000-5000-8000-000000000000",
        "experiment": "digits",
        "model": {"model_name": "digits_classifier", "version": "20260131T060000Z-1f3c9a2e"},
        "window_start_utc": datetime(2026, 2, 1, tzinfo=UTC),
        "window_end_utc": datetime(2026, 2, 8, tzinfo=UTC),
        "requests": 30,
        "rows": 30,
        "unusable_rows": 0,
        "is_sampled": False,
        "reference_rows": 200,
        "verdict": "insufficient data",
        "alpha": 0.05,
        "min_samples": 100,
    }
    return DriftReport.model_validate({**values, **changes})


def drift_report(**changes: object) -> DriftReport:
    shifts = tuple(
        PropertyShift(
            name=name,
            reference_mean=1.0,
            current_mean=2.0,
            shift_sds=None if name == "saturation" else 1.25,
            shift_interval=None if name == "saturation" else (1.0, 1.5),
            spread_ratio=1.0,
            ks_distance=0.5,
        )
        for name in PROPERTY_NAMES
    )
    values: dict[str, object] = {
        "verdict": "drift",
        "rows": 300,
        "p_values": {"bbsd_ks": 0.001, "uae_mmd": 0.4},
        "adjusted_p_values": {"bbsd_ks": 0.002, "uae_mmd": 0.4},
        "statistics": {"bbsd_ks": 0.3, "uae_mmd": 0.01},
        "intervals": {"bbsd_ks": (0.25, 0.375), "uae_mmd": (0.0025, 0.0225)},
        "drifted_detectors": ("bbsd_ks",),
        "effects": EffectSizes(
            bbsd=LargestDistance(dimension="<script>", ks_distance=0.3, p_value=0.0001),
            properties=LargestDistance(dimension="luma_mean", ks_distance=0.5, p_value=0.1),
            mmd={"uae_mmd": 0.1},
            mmd_standardised={"uae_mmd": 0.2},
            property_shifts=shifts,
        ),
        "causes": DriftCauses(
            cause="class mix",
            class_mix=(
                ClassMix(class_name="<script>", reference_share=0.25, share=0.5, low=0.4, high=0.6),
                ClassMix(class_name="7", reference_share=0.75, share=0.5, low=0.4, high=0.6),
            ),
            unknown_share=0.01,
        ),
        "classes": (
            ClassMovement(
                class_name="<script>",
                ks_distance=0.3,
                ks_p_value=0.0001,
                reference_share=0.25,
                current_share=0.5,
                current_share_interval=(0.438, 0.562),
                share_p_value=0.01,
                adjusted_p_value=0.001,
                has_moved=True,
            ),
        ),
        "top_images": [
            {
                "prediction_id": "id-1",
                "created_on": "2026-02-02",
                "predicted_class": "<script>",
                "score": 2.5,
                "image_sha256": "aa",
            },
            {
                "prediction_id": "id-2",
                "created_on": "2026-02-02",
                "predicted_class": "7",
                "score": 2.0,
                "image_sha256": None,
            },
        ],
        "accuracy_estimate": AccuracyEstimate(
            average_confidence=0.9,
            difference_of_confidences=0.88,
            thresholded_confidence=0.87,
            reference_accuracy=0.99,
            is_reliable=False,
            intervals={"average_confidence": (0.85, 0.95), "thresholded_confidence": (0.8, 0.9)},
        ),
        "feedback_rows": 12,
        "feedback_accuracy": 0.5,
        "feedback_interval": (0.25, 0.75),
        "problems": ("Image <b>bb</b> cannot be shown",),
    }
    return make_report(**{**values, **changes})
