"""The sections `deploy`, `monitor`, `labels`, `loop` and `alerts`: where a model serves, how it is watched, what comes
back.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from cv_platform.config.cron import Cron
from cv_platform.config.fields import ExperimentName, Fraction, Section

ExportFormat = Literal["onnx", "onnx_int8", "litert", "litert_int8"]
"""A file that answers probabilities elsewhere; int8: weights and activations of its convolutions in 8 bits."""


class ReplayConfig(Section):
    """What a new model has to show on the uploads that the one in production was asked about last."""

    max_requests: int = Field(default=1000, ge=1, le=100_000, description="uploads, the latest ones, each once")
    min_agreement: Fraction = Field(
        default=0.5,
        description="share of answers that have to stay as they are, unless labels show that the new ones are better",
    )
    max_unknown_increase: Fraction = Field(
        default=0.1, description="by how much the share may grow that is unknown to the model"
    )
    max_cost_ratio: float | None = Field(
        default=None, gt=0.0, description="CPU time of an answer, as a multiple of that in production; none: any"
    )


class CanaryConfig(Section):
    """How a challenger is tried out on live traffic before it takes the champion's place, and what sends it back."""

    fraction: float = Field(
        default=0.0,
        ge=0.0,
        le=0.5,
        description="share of the requests that it answers, drawn by a hash of the prediction's id; 0: none",
    )
    minutes: float = Field(
        default=30.0, gt=0.0, le=100_000.0, description="of a running service, after which it is promoted"
    )
    min_requests: int = Field(default=100, ge=1, description="that it must have answered by then")
    give_up_minutes: float = Field(
        default=1440.0, gt=0.0, le=100_000.0, description="of a running service: with fewer by then it is sent back"
    )
    max_slowdown: float = Field(default=2.0, ge=1.0, description="of its seconds, beside the champion's")
    max_unknown_ratio: float = Field(
        default=2.0, ge=1.0, description="of its share of unknown images, beside the champion's"
    )
    alpha: float = Field(
        default=0.01,
        gt=0.0,
        lt=0.5,
        description="chance, at most, to send back one that fails no more often than the champion and is within both "
        "limits, however often it is looked at",
    )

    @model_validator(mode="after")
    def _in_time(self) -> Self:
        if self.give_up_minutes < self.minutes:
            raise ValueError(
                f"deploy.canary: expected give_up_minutes of at least minutes; received {self.give_up_minutes:g}, and "
                f"{self.minutes:g} minutes"
            )
        return self


class DeployConfig(Section):
    """Which service the model goes to, and how long its workers have to take it up."""

    service: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")] = Field(
        default="image_classifier", description="serves one experiment's model; another's deployment is refused"
    )
    takes_over: ExperimentName | None = Field(
        default=None, description="experiment whose place on the service this one may take"
    )
    runtime: Literal["auto", "onnx", "onnx_int8", "tensorflow"] = Field(
        default="auto",
        description="what runs the exported model; auto: ONNX Runtime where the model converts and answers alike; "
        "onnx_int8: with convolutions in 8 bits, refused where it loses more than max_export_loss",
    )
    exports: tuple[ExportFormat, ...] = Field(
        default=(), description="files for other devices, measured beside the model on the test split"
    )
    max_export_loss: Fraction = Field(
        default=0.01, description="share of right test images that an export, or onnx_int8, may lose; more is refused"
    )
    data_licence: str = Field(default="", description="licence of the images, for the model card in the bundle")
    golden_images: int = Field(
        default=8, ge=1, le=64, description="test images of all classes, kept in the bundle for its self-test"
    )
    confirm_timeout_seconds: float = Field(
        default=60.0,
        gt=0.0,
        le=3600.0,
        description="until every running worker has taken the model up; else it goes back",
    )
    replay: ReplayConfig = Field(default=ReplayConfig(), description="the new model on logged requests")
    canary: CanaryConfig = Field(
        default=CanaryConfig(), description="a part of the live traffic first, instead of all of it at once"
    )
    shadow: bool = Field(
        default=False,
        description="ask the new model beside the champion first, in the service's spare time, for canary.minutes",
    )

    @property
    def probation(self) -> CanaryConfig | None:
        """How a challenger is tried out; None: not at all."""
        return self.canary if self.canary.fraction or self.shadow else None


DetectorName = Literal[
    "bbsd_ks",
    "bbsd_mean",
    "properties_ks",
    "properties_mean",
    "features_mmd",
    "uae_mmd",
    "classifier",
    "encoder_mmd",
    "encoder_classifier",
]


class MonitorConfig(Section):
    """The window of requests that the drift report judges, and how."""

    alpha: float = Field(
        default=0.05,
        gt=0.0,
        lt=0.5,
        description="largest family-wise false-alarm rate of one report; what is measured on windows of the test "
        "split, if that and the reference split have at least 40 images, is held against it",
    )
    require_calibration: bool = Field(
        default=True,
        description="a rate on windows of the test split that chance does not explain at this alpha stops the run, "
        "before the model is deployed; false: it is a warning",
    )
    false_alarms_per_year: float = Field(
        default=1.0,
        gt=0.0,
        le=1000.0,
        description="reports that may say drift by mistake in a year, on average, however many reports there are: each "
        "is judged at a part of it, alpha at most",
    )
    min_samples: int = Field(default=100, ge=20, description="fewer requests give the verdict 'insufficient data'")
    max_samples: int = Field(
        default=5000, ge=100, description="largest number of rows that are judged; of more, a seeded uniform sample"
    )
    repeats: Literal["once", "all"] = Field(
        default="once", description="an upload that is sent again and again in a window is judged once, or each time"
    )
    min_feedback: int = Field(
        default=30, ge=10, description="production_metrics: fewer predictions with feedback are not judged"
    )
    window_days: float = Field(
        default=7.0,
        gt=0.0,
        le=366.0,
        description="the window where nothing else says it: the last days until the run was asked for. The windows of "
        "the schedule and the sensor begin where their last one ended, the first so many days before; "
        "production_metrics looks back so many days at least, as people say what is wrong later",
    )
    window_start_utc: str | None = Field(
        default=None, description="ISO 8601 with zone: start (inclusive) instead of the default"
    )
    window_end_utc: str | None = Field(default=None, description="ISO 8601 with zone: end (exclusive) instead of now")
    window_by: Literal["answered", "logged"] = Field(
        default="answered",
        description="the time that puts a request into the window; logged, which the schedule and the sensor set: when "
        "it reached the database, so that one that came late is in the next window",
    )
    permutations: int = Field(
        default=499, ge=99, le=9999, description="of all tests together, at least: a small level takes more"
    )
    max_reference_rows: int = Field(
        default=5000, ge=100, description="seeded subsample of the reference that the tests take"
    )
    detectors: tuple[DetectorName, ...] = Field(
        default=("bbsd_ks", "bbsd_mean", "properties_ks", "properties_mean", "features_mmd", "uae_mmd"),
        min_length=1,
        description="tests that make the verdict together; each more costs the others a little, and those of the "
        "encoder also compute vectors of the window's stored images when the report is made",
    )
    max_encoded: int = Field(
        default=500, ge=20, description="images of a window that the encoder looks at, a seeded sample, for its tests"
    )
    schedule_cron: str = Field(
        default="0 6 * * 1", description="when the report runs (UTC): five fields of cron, or @daily and the like"
    )
    new_rows_trigger: int = Field(
        default=1000, ge=1, description="new requests that make the sensor run a report on them; min_samples at least"
    )
    seed: int = Field(default=0, ge=0, description="of subsamples and permutations")

    @property
    def needs_encoder(self) -> bool:
        """Whether a detector looks at the vectors of the pretrained encoder."""
        return any(name.startswith("encoder_") for name in self.detectors)

    @property
    def period(self) -> timedelta:
        """The longest time from one scheduled report to the next one."""
        return Cron.parse(self.schedule_cron).longest_gap()

    @field_validator("schedule_cron")
    @classmethod
    def _runs(cls, value: str) -> str:
        Cron.parse(value)
        return value

    @field_validator("window_start_utc", "window_end_utc")
    @classmethod
    def _aware(cls, value: str | None) -> str | None:
        if value is not None and datetime.fromisoformat(value).tzinfo is None:
            raise ValueError(f"Expected a time with its zone, such as 2026-01-31T06:00:00+00:00. Received: {value}")
        return value


_REASONS = ("random", "unknown", "drift", "novel", "disagreeing", "unlabelled")


class LabelsConfig(Section):
    """How what people say of the service's answers becomes a version of the dataset: `cv-platform dataset grow`."""

    max_wrong_fraction: float = Field(
        default=0.1,
        ge=0.0,
        lt=1.0,
        description="labels of one source that may be wrong, as the other images see it; with significantly more, they "
        "become no version unless somebody trusts that source",
    )
    keep_expired: bool = Field(
        default=False,
        description="images stay in later versions when the log gives up their upload by its age "
        "(CV_IMAGE_RETENTION_DAYS); those of deleted predictions leave in any case",
    )
    queue_size: int = Field(default=200, ge=0, le=10_000, description="images that labeling_queue adds at a time")
    max_candidates: int = Field(
        default=2000, ge=1, description="requests that it looks at; of more since its last run, a seeded sample"
    )
    random_share: Fraction = Field(
        default=0.1,
        description="of the queue: drawn from all requests, with the same chance, by which production_metrics "
        "estimates the accuracy on all of them",
    )
    unknown_share: Fraction = Field(
        default=0.1, description="of the queue: those that show nothing the model has learned"
    )
    drift_share: Fraction = Field(default=0.1, description="of the queue: those that drive the latest drift report")
    novel_share: Fraction = Field(
        default=0.05, description="of the queue: those least like any image of the dataset, as the encoder sees it"
    )
    disagreeing_share: Fraction = Field(
        default=0.05,
        description="of the queue: those that a challenger answers otherwise than the champion, as a shadow on live "
        "traffic or in the latest replay; those first of which it is surest",
    )
    unlabelled_share: Fraction = Field(
        default=0.0,
        description="of the queue: images of score.source, a folder or archive that nobody has labelled, of those that "
        "the model is least sure of",
    )

    @model_validator(mode="after")
    def _within_the_queue(self) -> Self:
        shares = {f"{reason}_share": getattr(self, f"{reason}_share") for reason in _REASONS}
        total = sum(shares.values())
        if total > 1.0 + 1e-9:
            raise ValueError(
                f"expected shares of at most 1 together (the rest is uncertain); received {total:g}: "
                + ", ".join(f"{name} {share:g}" for name, share in shares.items())
            )
        return self

    def quotas(self) -> dict[str, int]:
        """Returns how many images of the queue have which reason, in the order in which they are chosen."""
        named = {reason: getattr(self, f"{reason}_share") for reason in _REASONS}
        counts = {reason: int(share * self.queue_size + 1e-9) for reason, share in named.items()}
        return {**counts, "uncertain": self.queue_size - sum(counts.values())}


class ScoreConfig(Section):
    """Images that the model in production answers in one go: the asset `batch_scores`."""

    source: str | None = Field(
        default=None,
        min_length=1,
        description="a folder, a tar or zip, or a URL such as s3://bucket/prefix; without it there is no such asset",
    )
    heat_maps: bool = Field(default=False, description="each row has its heat-map over the image, a JPEG of 256 px")


class LoopConfig(Section):
    """What follows drift, or enough new labels, by itself: a new data version, training, gate, replay, deployment."""

    enabled: bool = Field(default=False, description="whether it acts; what it would do is shown in any case")
    cool_down_hours: float = Field(default=24.0, ge=0.0, description="between two of its trainings, at least")
    max_runs_per_week: int = Field(default=2, ge=1, le=100, description="its trainings in any seven days")
    min_new_labels: int = Field(
        default=200, ge=1, description="uploads labelled since the last version, which begin it without drift"
    )
    min_new_labels_in_drift: int = Field(
        default=50, ge=1, description="those that a new version is worth while drift lasts"
    )
    trust: tuple[str, ...] = Field(default=(), description="sources whose labels count though they contradict images")
    without: tuple[str, ...] = Field(default=(), description="sources whose labels do not count")


class AlertsConfig(Section):
    """What is worth a message. The addresses (apprise URLs) hold secrets and come from `CV_ALERT_URLS`."""

    on_drift: bool = Field(default=True, description="drift that begins, changes or is over")
    with_images: bool = Field(
        default=True,
        description="messages about drift carry small pictures of the images that drive it; what was sent, no deletion "
        "reaches",
    )
    on_refused_labels: bool = Field(default=True, description="labels that the loop refuses: it has stopped")
    on_run_failure: bool = Field(default=True, description="a Dagster run that failed")
