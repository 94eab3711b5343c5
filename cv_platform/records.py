"""What the assets of an experiment hand to each other, in the order of the graph; and what they are made of.

A record says what exists now and where, and holds no data itself. In memory its paths are absolute; written down they
are relative to `CV_HOME` (see `HomePath`), so that a home can be moved and a step can run elsewhere. `record_store`
writes and reads them. No record repeats what an earlier one says: `ModelIdentity`, `Provenance` and `Task` are handed
down as they are. What belongs to central storage (bundle metadata, pointers) is in `storage`.

Pydantic: https://docs.pydantic.dev/latest/concepts/models/
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    ValidationInfo,
)
from typing_extensions import override

from cv_platform.config import ClassifierType, Threshold
from cv_platform.files import file_sha256

# Paths


def _read_path(path: Path, info: ValidationInfo) -> Path:
    if info.mode == "python":
        if not path.is_absolute():
            raise ValueError(f"Expected an absolute path. Received: {path}.")
        return path
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"Expected a path relative to CV_HOME. Received: {path}.")
    return _home(info) / path


def _write_path(path: Path, info: SerializationInfo) -> str:
    return path.relative_to(_home(info)).as_posix()


def _read_url(url: str, info: ValidationInfo) -> str:
    if not url or info.mode == "python" or "://" in url:
        return url
    return _read_path(Path(url), info).as_uri()


def _write_url(url: str, info: SerializationInfo) -> str:
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    return _write_path(path, info) if parts.scheme == "file" and path.is_relative_to(_home(info)) else url


def _home(info: ValidationInfo | SerializationInfo) -> Path:
    try:
        return Path((info.context or {})["home"])
    except KeyError as err:
        raise ValueError("Expected the context {'home': CV_HOME}, which the record's paths are relative to.") from err


HomePath = Annotated[Path, AfterValidator(_read_path), PlainSerializer(_write_path, return_type=str, when_used="json")]
"""A path below `CV_HOME`: absolute in memory, relative in JSON, which nobody reads or writes without the home."""
HomeUrl = Annotated[str, AfterValidator(_read_url), PlainSerializer(_write_url, return_type=str, when_used="json")]
"""An address in central storage; of a file below `CV_HOME` it is kept as a `HomePath` is, any other as it is."""


# What records are made of


class Value(BaseModel):
    """Base of records and of their parts: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Record(Value):
    """Base of what an asset hands on.

    Attributes:
        made_from: versions of the records that it was made from, by asset, all the way up; filled in when it is kept.
        CIRCUMSTANCES: fields that say where, when or by which run; the same content may have others.
    """

    CIRCUMSTANCES: ClassVar[frozenset[str]] = frozenset()

    made_from: dict[str, str] = {}

    def content_version(self) -> str:
        """Returns what the record's content is known by: the same where the same was made again."""
        content = self.model_dump_json(exclude={"directory", "made_from", *self.CIRCUMSTANCES})
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def local_json(self) -> str:
        """Returns the record as JSON for a file in its own folder, which need not say where that is."""
        return self.model_dump_json(indent=1, exclude={"directory", "made_from", "report_url"})


class Illustrated(Record):
    """A record whose folder has plots, PNG files by name."""

    directory: HomePath
    plot_names: tuple[str, ...] = ()

    @property
    def plots(self) -> dict[str, Path]:
        """PNG files by name."""
        return {name: self.directory / f"{name}.png" for name in self.plot_names}


class ModelIdentity(Value):
    """Which trained model: registry, central storage and the request log know it by these two."""

    model_name: str
    version: str

    def __str__(self) -> str:
        return f"{self.model_name} {self.version}"


class Provenance(Value):
    """Which data a model was made from.

    Attributes:
        ds_name: name of the dataset, which is a DVC repository.
        dvc_tag: its tag.
        dvc_md5: the data version: DVC's md5 of the images, or of images and annotations.csv where git tracks one.
    """

    ds_name: str
    dvc_tag: str
    dvc_md5: str

    def __str__(self) -> str:
        return f"{self.ds_name} {self.dvc_tag}"


class Task(Value):
    """What a model sees and what it answers.

    Attributes:
        image_size: (height, width) in pixels.
        preprocessing_hash: `images.preprocessing_hash` of the pixels.
        class_names: in the order of targets and outputs.
        classifier_type: decides the targets' form.
    """

    image_size: tuple[int, int]
    preprocessing_hash: str
    class_names: tuple[str, ...]
    classifier_type: ClassifierType


# dataset


class DatasetVersion(Record):
    """A checked-out dataset version.

    Attributes:
        git_commit: the commit of the tag.
        directory: root of the read-only checkout; the manifest's paths are relative to it.
        manifest: file name of the manifest for one config; it stands for the splits, which follow from the config too.
        class_names: the configured classes, in the order of the model's outputs.
        sample_bits: `model.sample_bits`, by which its images are looked at, too.
    """

    provenance: Provenance
    git_commit: str
    directory: HomePath
    manifest: str
    class_names: tuple[str, ...]
    sample_bits: int | None = None

    @override
    def content_version(self) -> str:
        """Names the images and, by the manifest, their splits."""
        return f"{self.provenance.dvc_md5}-{Path(self.manifest).stem}"

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is."""
        return self.directory / self.manifest


# embeddings


class Embeddings(Record):
    """What the images of a dataset version show, as vectors of a pretrained encoder.

    Attributes:
        manifest: see DatasetVersion.
        encoder: its key; another key, other vectors.
        features: length of a vector.
        images: rows of the file; images that do not decode have none.
        FILE: Parquet in the folder, with path, sha256 and vector (float16), in the manifest's order.
    """

    FILE: ClassVar[str] = "vectors.parquet"

    provenance: Provenance
    manifest: str
    encoder: str
    features: int
    images: int
    directory: HomePath

    @override
    def content_version(self) -> str:
        """Names the images, their splits and the encoder."""
        return self.directory.name

    @property
    def path(self) -> Path:
        """The file."""
        return self.directory / self.FILE


# validation_report


class CheckOutcome(Value):
    """What one check found."""

    name: str = Field(description="one of validation.verdict.CHECK_NAMES")
    passed: bool
    severity: Literal["error", "warn"] = Field(description="a failed error blocks training, a failed warn only shows")
    summary: str = Field(
        description="the finding with its numbers; starts with 'Not judged' where there was nothing to judge"
    )
    value: float | None = Field(default=None, description="what was measured; none where nothing was")
    limit: float | None = Field(default=None, description="the limit from the config that `value` was held against")
    offenders: tuple[str, ...] = Field(
        default=(), description="images, classes or conditions at fault, worst first, at most 100"
    )

    def finding(self) -> str:
        """Returns the summary, and of a check that did not pass the limit that it was held against."""
        if self.passed or self.limit is None:
            return self.summary
        return f"{self.summary} The limit in `validate` is {self.limit:g}."


class ValidationVerdict(Record):
    """What validation found in one dataset version."""

    dvc_md5: str
    manifest: str = Field(description="see DatasetVersion")
    passed: bool = Field(description="no check of severity error failed")
    outcomes: tuple[CheckOutcome, ...] = Field(description="in the order of CHECK_NAMES; without those that are off")
    quarantined: tuple[str, ...] = Field(description="paths of images that nothing downstream may use")
    directory: HomePath = Field(description="of report.html and Deepchecks' pages")

    @property
    def report_path(self) -> Path:
        """The page."""
        return self.directory / "report.html"

    @property
    def failed(self) -> tuple[CheckOutcome, ...]:
        """The outcomes that did not pass, of either severity."""
        return tuple(outcome for outcome in self.outcomes if not outcome.passed)


# packed_images


class PackedImages(Record):
    """The decoded images of a dataset version.

    Attributes:
        task: the form of pixels and targets.
        directory: folder of the pack; its name stands for data version, preprocessing, splits and quarantine in one.
        counts: images per split: train, valid, test, reference.
        images_per_second: speed at which it was made.
        pack_scale: sides of the training images, by those of the task: see `train.pack_scale`.
    """

    provenance: Provenance
    task: Task
    directory: HomePath
    counts: dict[str, int]
    bytes: int
    images_per_second: float
    pack_scale: float = 1.0

    @override
    def content_version(self) -> str:
        """Names the pack."""
        return self.directory.name


# model


class TrainedModel(Record):
    """A trained model: where it is and where it came from."""

    model: ModelIdentity
    provenance: Provenance
    task: Task
    pack: str = Field(description="name of the packed images' folder, see PackedImages")
    directory: HomePath
    best_epoch: int = Field(description="from 1: the epoch whose weights are kept")
    temperature: float = Field(
        default=1.0, description="by which the logits were divided, in the weights: see calibration"
    )
    history: dict[str, list[float]] = Field(description="metric by name, a value per epoch")
    seconds: float
    images_per_second: float
    mlflow_run_id: str | None = None
    git_commit: str | None = Field(default=None, description="of the code and configs")
    effective_config: dict[str, Any]
    weights_sha256: str = Field(default="", description="of the trained weights; empty in records of earlier releases")

    @override
    def content_version(self) -> str:
        """Names the weights."""
        return self.weights_sha256[:16]

    @property
    def keras_path(self) -> Path:
        """The network."""
        return self.directory / f"{self.model.model_name}.keras"

    @property
    def exports_directory(self) -> Path:
        """Where files for other devices are, see `Export`."""
        return self.directory / "exports"

    @property
    def int8_path(self) -> Path:
        """The combined graph in 8 bits, where one is served."""
        return self.directory / f"{self.model.model_name}_int8.onnx"

    @property
    def epochs_run(self) -> int:
        """How many epochs there were."""
        return len(self.history["loss"])


# evaluation


class ClassLoss(Value):
    """A class whose recall has fallen; p by McNemar's exact test, one-sided, of this class alone."""

    name: str
    recall: float
    champion_recall: float
    images: int
    p_value: float


class Comparison(Value):
    """A model beside the version in production, on the same test images; see `evaluation.gate.compare`."""

    version: str = Field(description="of the model in production")
    images: int = Field(description="compared: the test split without what that version was trained on")
    only_challenger_right: int
    only_champion_right: int
    accuracy: float = Field(description="share of right images, with labels as sets")
    champion_accuracy: float
    low: float = Field(description="of the interval of the difference, new minus old")
    high: float
    p_value: float = Field(description="McNemar's exact test, one-sided: that the champion is better by chance")
    detectable_loss: float = Field(description="that so many images would show four times out of five")
    outcome: Literal["not worse", "undecided", "worse"]
    passed: bool
    lost_classes: tuple[ClassLoss, ...] = ()


class Slice(Value):
    """A part of the test split, and whether the model does worse on it than on the rest."""

    column: str = Field(description="a property of the pixels, or a column of the manifest")
    value: str = Field(description="one of its values, or a quarter of its range")
    images: int
    accuracy: float
    low: float
    high: float
    p_value: float = Field(description="that it is no worse than the rest; corrected for all parts that were judged")
    is_worse: bool


class Robustness(Value):
    """The accuracy on images that were made worse in one way."""

    corruption: str
    strength: str
    images: int
    accuracy: float
    low: float
    high: float


class Evaluation(Illustrated):
    """How a model does on the test split, and whether it may be promoted."""

    CIRCUMSTANCES = frozenset({"model", "mlflow_run_id", "cpu_ms"})

    model: ModelIdentity
    passed: bool = Field(description="the promotion gate's verdict")
    reasons: tuple[str, ...] = Field(description="what failed; when nothing did, what was satisfied")
    threshold: Threshold = Field(
        description="multi-label: probability from which a class is predicted, in serving too; of all, or of each"
    )
    metrics: dict[str, float] = Field(
        description="see compute_metrics; and `images`, `temperature`, `ece_uncalibrated`"
    )
    per_class: list[dict[str, Any]] = Field(
        description="per class: class, precision, recall, f1, auc, support, intervals; where labels are unknown, known"
    )
    confusion: list[list[int]] = Field(description="see metrics.confusion_matrix")
    comparison: Comparison | None = Field(default=None, description="with the version in production")
    intervals: dict[str, tuple[float, float]] = Field(default={}, description="of metrics, by name; 95 %")
    slices: tuple[Slice, ...] = Field(default=(), description="every part that was judged, the worst first")
    robustness: tuple[Robustness, ...] = Field(default=(), description="of a sample; the first as the images are")
    cpu_ms: float | None = Field(default=None, description="CPU time of one image by the Keras network")
    parameters: int | None = Field(default=None, description="numbers that the network is made of")
    keras_bytes: int | None = Field(default=None, description="size of the Keras file")
    mlflow_run_id: str | None

    @property
    def size(self) -> str:
        """Parameters and size of the file, in words."""
        if self.parameters is None or self.keras_bytes is None:
            return "not measured"
        return f"{self.parameters:,} parameters, a Keras file of {self.keras_bytes / 1e6:.1f} MB"

    @property
    def latency(self) -> str:
        """What one image costs, in words."""
        if self.cpu_ms is None:
            return "not measured"
        return f"{self.cpu_ms:.2f} ms of CPU time by the Keras network, on the machine that evaluated it"

    @property
    def predictions_path(self) -> Path:
        """Parquet: path, sha256, label, unknown_labels if any, predicted_class, correct, confidence, probabilities."""
        return self.directory / "predictions.parquet"

    @property
    def report_path(self) -> Path:
        """The page."""
        return self.directory / "report.html"


# drift_detectors


class DetectionRate(Value):
    """How often the drift verdict fires on windows of the test split, see `drift.power`.

    Attributes:
        shift, strength: what was done to the images; "none": nothing, so that every alarm is false.
        images: size of a window.
        windows: judged.
        independent: so many of them have no image in common.
        rate: share of them that were drift; `low` and `high` its 95 % interval, as if all were independent.
    """

    shift: str
    strength: str
    images: int
    windows: int
    independent: int
    rate: float
    low: float
    high: float


class DriftDetectors(Record):
    """The detectors of one model version.

    Attributes:
        uae_dims, feature_dims: widths of the two embeddings.
        detection: false alarms and power; empty with too few images, and in records of earlier versions.
        false_alarms: of records of earlier versions.
    """

    CIRCUMSTANCES = frozenset({"model"})

    model: ModelIdentity
    directory: HomePath
    encoder_hash: str
    uae_dims: int
    feature_dims: int
    detection: tuple[DetectionRate, ...] = ()
    false_alarms: dict[str, float | None] = Field(default={}, exclude=True)

    @property
    def uae_path(self) -> Path:
        """The encoder."""
        return self.directory / f"{self.model.model_name}_uae.keras"

    @property
    def plot_path(self) -> Path:
        """`detection` as a picture, an SVG; records of earlier versions have none."""
        return self.directory / "detection.svg"


# reference_data


class ReferenceData(Record):
    """The reference data of one model version: a local parquet file, its copy in central storage, its rows."""

    model: ModelIdentity
    directory: HomePath
    url: HomeUrl
    rows: int
    int8_sha256: str = Field(default="", description="of the graph in 8 bits that answered; empty: Keras did")

    @override
    def content_version(self) -> str:
        """Names the file's content, to which the model's version belongs."""
        return file_sha256(self.path)[:16]

    @property
    def path(self) -> Path:
        """The parquet file."""
        return self.directory / f"{self.model.model_name}_ref_data.parquet"


# bento


class Export(Value):
    """A file of a model for other devices, beside the model itself; numbers are absent where it could not be made."""

    format: str = Field(description="of config.ExportFormat, or the graph in 8 bits that is served")
    file: str = Field(default="", description="in TrainedModel.exports_directory; empty where it was refused")
    images: int = Field(default=0, description="of the test split, that it was measured on")
    accuracy: float | None = Field(default=None, description="share of right images, with labels as sets")
    model_accuracy: float | None = None
    loss_error: float | None = Field(default=None, description="standard error of model_accuracy - accuracy, paired")
    largest_difference: float | None = Field(default=None, description="of any probability")
    agreement: float | None = Field(default=None, description="share of images with the same decision")
    cpu_ms: float | None = Field(default=None, description="CPU time of one image, one thread")
    model_cpu_ms: float | None = Field(default=None, description="of the Keras model")
    megabytes: float | None = None
    refused: str = Field(default="", description="why it is not kept")


UnknownKind = Literal["known", "corrupted", "far"]


class UnknownRate(Value):
    """The share of images of one kind that the served model calls unknown, with Wilson's interval (95 %)."""

    kind: UnknownKind
    what: str
    images: int
    rate: float
    low: float
    high: float


class ModelBundle(Record):
    """A published bundle and the Bento built around it.

    Attributes:
        bento_tag: serve it with `bentoml serve`.
        url: the bundle's folder in central storage.
        parity: see `export.ExportedModel`.
        exports: in the order of the config; its times differ from run to run.
    """

    CIRCUMSTANCES = frozenset({"url", "exports"})

    model: ModelIdentity
    bento_tag: str
    bytes: int
    url: HomeUrl
    runtime: Literal["tensorflow", "onnx"] = "tensorflow"
    runtime_reason: str = ""
    parity: dict[str, float] = {}
    exports: tuple[Export, ...] = ()
    unknown: tuple[UnknownRate, ...] = Field(default=(), description="empty where there is no rule, or no test split")


# challenger_replay


class ChangedAnswer(Value):
    """An upload that a new model answers otherwise than the one in production.

    Attributes:
        prediction_id, image_sha256: the latest request that sent it, and the upload.
        old, new: the classes, several joined by |; their confidences are the largest probabilities.
        stated: what somebody said that it shows; None: nobody did.
    """

    prediction_id: str
    image_sha256: str
    old: str
    old_confidence: float
    new: str
    new_confidence: float
    stated: str | None = None


class Replay(Record):
    """A new model beside the one in production, on what that was asked last; see `deployment.replay`.

    Attributes:
        model: the challenger.
        champion: the version in production; None where no other version of the model is.
        passed, reasons: what failed; when nothing did, what was satisfied.
        replayed: uploads that both have answered.
        agreed: of them, those with the same answer.
        changed: the others, 24 at most, the surest new answers first.
        not_kept: requests that were looked at, whose upload the log does not keep (any more).
        unreadable: predictions whose upload is gone or does not decode.
        labelled: of those replayed, how many somebody has labelled.
        comparison: on those of them that neither was trained on; None without any.
        confidence, unknown_rate, cpu_ms: of the challenger, and of the champion: the mean largest probability, the
            share of unknown images (None without a rule), the CPU time of an answer in batches of 32.
    """

    model: ModelIdentity
    champion: ModelIdentity | None
    directory: HomePath
    passed: bool = True
    reasons: tuple[str, ...] = ()
    replayed: int = 0
    agreed: int = 0
    changed: tuple[ChangedAnswer, ...] = ()
    not_kept: int = 0
    unreadable: tuple[str, ...] = ()
    labelled: int = 0
    comparison: Comparison | None = None
    confidence: float | None = None
    champion_confidence: float | None = None
    unknown_rate: float | None = None
    champion_unknown_rate: float | None = None
    cpu_ms: float | None = None
    champion_cpu_ms: float | None = None

    @override
    def content_version(self) -> str:
        """Names the model and the verdict: other requests, with the same one, make nothing stale."""
        return f"{self.model.version}-{'passed' if self.passed else 'refused'}"

    @property
    def page_path(self) -> Path:
        """The page with the changed answers; there is none where nothing was replayed."""
        return self.directory / "replay.html"

    @property
    def cost_ratio(self) -> float | None:
        """CPU time of an answer, as a multiple of the champion's."""
        return self.cpu_ms / self.champion_cpu_ms if self.cpu_ms and self.champion_cpu_ms else None


# deployment


class Deployment(Record):
    """A move of the production pointer that held.

    Attributes:
        previous_version: what it served before.
        confirmed_workers: ids of the workers that run the version and live; empty when no service was running.
        seconds: from the load test to the last confirmation.
    """

    CIRCUMSTANCES = frozenset({"previous_version", "confirmed_workers", "seconds", "message"})

    service: str
    model: ModelIdentity
    previous_version: str | None
    confirmed_workers: tuple[str, ...]
    seconds: float
    message: str


# drift_report


class LargestDistance(Value):
    """The dimension with the largest KS distance (0–1), and its uncorrected p-value."""

    dimension: str
    ks_distance: float
    p_value: float


class PropertyShift(Value):
    """How one pixel statistic moved.

    Attributes:
        name: one of `properties.PROPERTY_NAMES`.
        reference_mean, current_mean: in the property's own unit.
        shift_sds: (current mean − reference mean) / reference standard deviation; None where the reference is constant
            and the current mean differs, which no number of standard deviations describes.
        shift_interval: of `shift_sds`, 95 %, by the means' standard errors; None without it, and in earlier reports.
        spread_ratio: current / reference standard deviation; None where only the reference is constant.
        ks_distance: 0–1.
    """

    name: str
    reference_mean: float
    current_mean: float
    shift_sds: float | None
    shift_interval: tuple[float, float] | None = None
    spread_ratio: float | None
    ks_distance: float


class EffectSizes(Value):
    """How large the difference is.

    Attributes:
        bbsd: the class whose probability has the largest KS distance.
        properties: the pixel statistic with the largest KS distance.
        mmd: per MMD detector, √max(0, MMD²): 0 for equal distributions, at most √2.
        mmd_standardised: per MMD detector, standard deviations of the permutation null; grows with the rows.
        property_shifts: one per property, in the order of `properties.PROPERTY_NAMES`.
    """

    bbsd: LargestDistance
    properties: LargestDistance
    mmd: dict[str, float]
    mmd_standardised: dict[str, float]
    property_shifts: tuple[PropertyShift, ...]


class ClassMovement(Value):
    """How one class moved.

    Attributes:
        ks_distance, ks_p_value: of the class's probability, reference against current.
        reference_share, current_share: share of the images for which the class is predicted, 0–1.
        current_share_interval: Wilson's of 95 %; None in earlier reports.
        share_p_value: Fisher's exact test of the two shares.
        adjusted_p_value: the smaller of the two, after Holm's correction over both tests of all classes.
        has_moved: `adjusted_p_value` is at most alpha.
    """

    class_name: str
    ks_distance: float
    ks_p_value: float
    reference_share: float
    current_share: float
    current_share_interval: tuple[float, float] | None = None
    share_p_value: float
    adjusted_p_value: float
    has_moved: bool


class AccuracyEstimate(Value):
    """Accuracy of the current images, estimated without labels; multi-label: mean accuracy of the single decisions.

    Attributes:
        average_confidence: mean confidence of the current decisions.
        difference_of_confidences: reference accuracy moved by the difference of mean confidences (DoC).
        thresholded_confidence: share of current decisions above the confidence that as many reference decisions exceed
            as are right (ATC).
        reference_accuracy: measured, on the labelled reference.
        is_reliable: false while drift fires; then show the numbers greyed, or not at all.
        intervals: by the names of the three estimates, 95 %, of images drawn anew on both sides; empty in earlier
            reports.
    """

    average_confidence: float
    difference_of_confidences: float
    thresholded_confidence: float
    reference_accuracy: float
    is_reliable: bool
    intervals: dict[str, tuple[float, float]] = {}


class ClassMix(Value):
    """A class's share of the images, 0–1.

    Attributes:
        reference_share: of the reference's images, by their labels.
        share: of the current images, estimated as if each class looked as before; `low` and `high` its 95 % interval.
    """

    class_name: str
    reference_share: float
    share: float
    low: float
    high: float


DriftCause = Literal["class mix", "images", "unknown images", "not told apart"]


class DriftCauses(Value):
    """What explains drift, see `drift.causes`.

    Attributes:
        cause: "class mix": the classes look as before, and some are more frequent; "images": the classes look
            otherwise; "unknown images": images like none of the reference came among the others; "not told apart": the
            reference has too few images of the classes that came.
        class_mix: of every class; holds where the cause is the mix, or images that were left out of it.
        unknown_share: share of the current images that are like none of the reference; of its own, 1 to 2 % are.
    """

    cause: DriftCause
    class_mix: tuple[ClassMix, ...]
    unknown_share: float

    @property
    def moved(self) -> tuple[ClassMix, ...]:
        """The classes whose share has changed by more than the estimate's interval, the largest change first."""
        changed = [one for one in self.class_mix if not one.low <= one.reference_share <= one.high]
        return tuple(sorted(changed, key=lambda one: -abs(one.share - one.reference_share)))


ReportVerdict = Literal["drift", "no drift", "insufficient data"]


SliceColumn = Literal["client", "tag", "network"]
"""Of the request log: the API key of a request, the tag that the client gave it, or the client's network."""


class MovedSlice(Value):
    """The requests of one API key, tag or network beside the reference, see `drift.slices`."""

    column: SliceColumn
    value: str
    rows: int = Field(description="of the window's judged rows")
    test: str = Field(description="the clearer one, in words")
    ks_distance: float = Field(description="of that test, 0 to 1")
    adjusted_p_value: float = Field(description="corrected for both tests and for all slices that were looked at")
    has_moved: bool


class DriftReport(Record):
    """The verdict on one window of requests of one model version, and what explains it.

    Attributes:
        report_id: UUID of experiment, model, version and window: a report of the same window has the same id.
        window_start_utc, window_end_utc: half-open bounds.
        window_by: by which of its times a request belongs to the window, see `config.MonitorConfig`.
        requests: answered requests in the window.
        late_rows: of them, those that were answered before it, and reached the log in it.
        other_requests: requests in the window beside them, which other versions of the model answered.
        rows: of `requests`, those that were judged.
        encoded_rows: of those, the ones whose image the pretrained encoder looked at, where a detector needs it.
        unusable_rows: read but left out, because an embedding is not finite or of another width.
        repeated_rows: of the requests, those whose upload had been sent in the window before.
        is_sampled: `monitor.max_samples` were drawn from more, each with the same chance.
        reference_rows: rows of the reference.
        reference: the report whose window was taken as the new normal (`drift accept`); empty: the reference split.
        verdict: "drift" when an adjusted p-value is at most `alpha`; "insufficient data" below `monitor.min_samples`.
        alpha: level of this report's test, see `monitoring.alarm_rate`.
        false_alarms_per_year: what all reports together keep to; None in reports of earlier versions, judged each at
            `monitor.alpha`.
        p_values, adjusted_p_values, statistics, intervals: per detector, see `drift.verdict`; empty without a verdict,
            the last in earlier reports too.
        drifted_detectors: those that fired, clearest first.
        causes: what explains drift; None without it, and for several labels an image.
        classes: every class, the most significant movement first.
        slices: the requests by API key, tag and network, as far as there are enough, the clearest movement first.
        top_images: images that drive the difference, strongest first: prediction_id, created_on, predicted_class,
            score, image_sha256; nearest: image_sha256 and label of the images of the reference that are most like it.
        accuracy_estimate: without labels; not reliable while drift fires.
        feedback_rows: judged requests whose true class somebody stated.
        feedback_accuracy: of those; multi-label: mean accuracy of the single decisions.
        feedback_interval: of that, Wilson's of 95 %; None without feedback, and in earlier reports.
        order_p_value: of the order of the predicted classes, see `drift.order`. None without any request.
        stream: of records of earlier versions.
        report_url: of the HTML page in central storage.
        evidently_run_id: run in the experiment's Evidently project.
        problems: what could not be done or shown, in sentences.
    """

    CIRCUMSTANCES = frozenset({"report_url", "evidently_run_id"})

    report_id: str
    experiment: str
    model: ModelIdentity
    window_start_utc: datetime
    window_end_utc: datetime
    window_by: Literal["answered", "logged"] = "answered"
    requests: int
    late_rows: int = 0
    other_requests: int = 0
    rows: int
    encoded_rows: int = 0
    unusable_rows: int
    repeated_rows: int = 0
    # Reports of earlier versions have the latest rows, and another name for it.
    is_sampled: bool = Field(validation_alias=AliasChoices("is_sampled", "is_truncated"))
    reference_rows: int
    reference: str = ""
    verdict: ReportVerdict = "insufficient data"
    alpha: float
    false_alarms_per_year: float | None = None
    min_samples: int
    p_values: dict[str, float] = {}
    adjusted_p_values: dict[str, float] = {}
    statistics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    drifted_detectors: tuple[str, ...] = ()
    effects: EffectSizes | None = None
    causes: DriftCauses | None = None
    classes: tuple[ClassMovement, ...] = ()
    slices: tuple[MovedSlice, ...] = ()
    top_images: list[dict[str, Any]] = []
    accuracy_estimate: AccuracyEstimate | None = None
    feedback_rows: int = 0
    feedback_accuracy: float | None = None
    feedback_interval: tuple[float, float] | None = None
    order_p_value: float | None = None
    stream: dict[str, Any] | None = Field(default=None, exclude=True)
    report_url: HomeUrl = ""
    evidently_run_id: str | None = None
    problems: tuple[str, ...] = ()

    @property
    def feedback_contradicts(self) -> bool:
        """Whether the accuracy by feedback is clearly none of those that are estimated without labels."""
        estimated = self.accuracy_estimate.intervals.values() if self.accuracy_estimate else ()
        if self.feedback_interval is None or not estimated:
            return False
        low, high = self.feedback_interval
        return all(most < low or least > high for least, most in estimated)

    @property
    def worst_slice(self) -> MovedSlice | None:
        """The slice whose movement is clearest, if one has moved."""
        return next((one for one in self.slices if one.has_moved), None)

    @property
    def moved_classes(self) -> tuple[ClassMovement, ...]:
        """The classes that moved, the most significant first."""
        return tuple(movement for movement in self.classes if movement.has_moved)


# production_metrics

FeedbackVerdict = Literal[
    "worse than on the test split", "as on the test split", "insufficient feedback", "not comparable"
]


class SliceAccuracy(Value):
    """What people said of the predictions of one API key, tag or network, beside the others of the version."""

    column: SliceColumn
    value: str
    with_feedback: int
    right_share: float
    rest_share: float = Field(description="of all others with feedback")
    adjusted_p_value: float = Field(description="that it is no worse than the rest; corrected for all that were judged")
    is_worse: bool


class VersionMetrics(Value):
    """One model version's predictions of the window, and what was said about them.

    Attributes:
        model_version, classifier_type: which version, and what it answers.
        predictions: of the version in the window.
        with_feedback: of them, those whose true class somebody stated.
        coverage: the share of them.
        none_of_these: of those with feedback, the ones whose image shows none of the model's classes. A multi-class
            prediction of such an image is wrong, and has no place in `confusion`.
        accuracy: as in an evaluation: the share of right predictions; multi-label: the mean over the labels of their
            accuracies. None without feedback.
        right_share: the share of predictions that are right as a whole: accuracy, or for multi-label exact match.
        interval: Wilson's interval of `right_share`, at level 1 − alpha.
        test_right_share: of the test split; None where the version's bundle does not say it.
        test_images: how many images that was measured on.
        p_value: one-sided Fisher's exact test of both shares, that of production being the lower one.
        verdict: see `ProductionMetrics.alpha` and `min_feedback`.
        class_names: in the order of `confusion`.
        per_class: class, feedback (predictions whose true class it is), predicted (predictions of it, with feedback),
            precision, recall, f1; multi-label: accuracy too.
        confusion: as in an evaluation: multi-class row the true class, column the predicted one; multi-label a row per
            class: true negatives, false positives, false negatives, true positives.
        sources: how many of the statements that count came from where.
        random_labels: predictions that `labeling_queue` drew at random and a labeller has labelled.
        estimated_share: of all predictions of the window that are right, as estimated from those by their inverse
            chances; None without any.
        estimated_interval: of that, at level 1 − alpha.
        slices: by API key, tag and network, as far as there is enough feedback, the clearest loss first.
    """

    model_version: str
    classifier_type: ClassifierType
    predictions: int
    with_feedback: int
    coverage: float
    none_of_these: int = 0
    accuracy: float | None = None
    right_share: float | None = None
    interval: tuple[float, float] | None = None
    test_right_share: float | None = None
    test_images: int | None = None
    p_value: float | None = None
    verdict: FeedbackVerdict = "insufficient feedback"
    class_names: tuple[str, ...] = ()
    per_class: list[dict[str, Any]] = []
    confusion: list[list[int]] = []
    sources: dict[str, int] = {}
    random_labels: int = 0
    estimated_share: float | None = None
    estimated_interval: tuple[float, float] | None = None
    slices: tuple[SliceAccuracy, ...] = ()

    @property
    def worst_slice(self) -> SliceAccuracy | None:
        """The slice that is most clearly worse than the rest, if one is."""
        return next((one for one in self.slices if one.is_worse), None)


class ProductionMetrics(Illustrated):
    """How a model does in production, as far as feedback tells.

    Attributes:
        experiment, model_name: whose predictions.
        window_start_utc, window_end_utc: half-open bounds on the predictions' time.
        late_rows: predictions that were made before the window, and reached the log in it.
        predictions, with_feedback: over all versions.
        alpha: a version is called worse when its p-value times the number of judged versions is at most this.
        min_feedback: a version with less feedback is not judged.
        versions: the newest first.
        problems: what could not be counted or compared, in sentences.
    """

    experiment: str
    model_name: str
    window_start_utc: datetime
    window_end_utc: datetime
    late_rows: int = 0
    predictions: int
    with_feedback: int
    alpha: float
    min_feedback: int
    versions: tuple[VersionMetrics, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def record_path(self) -> Path:
        """This record as JSON."""
        return self.directory / "production_metrics.json"

    @property
    def worse_versions(self) -> tuple[VersionMetrics, ...]:
        """The versions that are significantly worse than on their test split."""
        return tuple(version for version in self.versions if version.verdict == "worse than on the test split")


# labeling_queue


class LabelingQueue(Record):
    """What people were asked to label at a time; the items are in the table `labeling_items`.

    Attributes:
        experiment: whose.
        window_start_utc, window_end_utc: half-open bounds of the requests that could be chosen.
        requests: of the window, those whose upload is kept.
        candidates: of them, those that were looked at.
        counts: images added by reason.
        waiting: of the whole queue, those that nobody has labelled, and whose upload is kept.
        problems: reasons that could not be judged, in sentences.
    """

    experiment: str
    window_start_utc: datetime
    window_end_utc: datetime
    requests: int = 0
    candidates: int = 0
    counts: dict[str, int] = {}
    waiting: int = 0
    problems: tuple[str, ...] = ()


# batch_scores


class BatchScores(Record):
    """What a model has said of the images of a place; the rows are in `directory`.

    Attributes:
        model: who has answered.
        source: where the images are.
        sha256: of the file of rows.
        directory: its folder.
    """

    FILE: ClassVar[str] = "scores.parquet"

    model: ModelIdentity
    source: str
    sha256: str
    directory: HomePath

    @classmethod
    def of_file(cls, model: ModelIdentity, source: str, directory: Path) -> Self:
        """Returns the record of rows that lie in `directory`."""
        return cls(model=model, source=source, sha256=file_sha256(directory / cls.FILE), directory=directory)


# batch_drift_report


class BatchDriftReport(DriftReport):
    """The verdict on images that were scored in one go; its window is the moment in which it was made.

    Attributes:
        source: where the images are; `prediction_id` of a top image is its path there.
        unanswered: images without an answer, which have no part in the verdict; `requests` are those with one.
        directory: its folder, which has the report as a page.
    """

    CIRCUMSTANCES = DriftReport.CIRCUMSTANCES | {"window_start_utc", "window_end_utc"}
    FILE: ClassVar[str] = "drift.html"

    source: str
    unanswered: int
    directory: HomePath


# labelled_version


class LabelledVersion(Record):
    """What the labels in the log have made of the dataset, see `monitoring.growth`.

    Attributes:
        base: the tag that it began with.
        tag: the version with the labels; where they were refused, or nothing was stored, the one before.
        dvc_md5: its data version.
        statements: the log's last statement (`feedback.id`) that the version has looked at; 0: none.
        looked_at: the last one that was there at this attempt, refused or not.
        made_utc: when.
        refused: why the labels made no version, in words; empty where they did.
        suspects: whose labels contradict the images.
        trust, without: the rules of the attempt.
        summary: what changed and what was left out.
    """

    CIRCUMSTANCES = frozenset({"base", "statements", "looked_at", "made_utc", "summary"})

    base: str
    tag: str
    dvc_md5: str
    statements: int = 0
    looked_at: int = 0
    made_utc: datetime
    refused: str = ""
    suspects: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    summary: tuple[str, ...] = ()


RECORDS: Mapping[str, type[Record]] = {
    "dataset": DatasetVersion,
    "embeddings": Embeddings,
    "validation_report": ValidationVerdict,
    "packed_images": PackedImages,
    "model": TrainedModel,
    "evaluation": Evaluation,
    "drift_detectors": DriftDetectors,
    "reference_data": ReferenceData,
    "bento": ModelBundle,
    "challenger_replay": Replay,
    "deployment": Deployment,
    "drift_report": DriftReport,
    "production_metrics": ProductionMetrics,
    "labeling_queue": LabelingQueue,
    "batch_scores": BatchScores,
    "batch_drift_report": BatchDriftReport,
    "labelled_version": LabelledVersion,
}
"""By the name of the asset that hands it on, in the order of the graph."""
