"""What a user may configure of an experiment, in YAML; the installation itself is `settings`.

The only place where a default of it is written down. Models are frozen and refuse unknown keys. The section names
(`model`, `dataset`, `train`, `evaluate`, `deploy`) and the fields that the users of the original stack know are kept;
`validate`, `monitor` and `alerts` are new.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast
from unicodedata import normalize

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PositiveFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from cv_platform.errors import ConfigError

ExperimentName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
"""Names become Dagster group and op names, which take neither `-` nor `.`."""
ModelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
"""Names become folders and URL parts: a name, never a path."""


class _OddInteger(int):
    """A whole number whose text in YAML was another one: `010` is 8, and `1:30` is 90."""

    text: str


def _written(value: object) -> object:
    """Takes a number for the text that it was written as; what could have been written otherwise is left to fail."""
    return str(value) if type(value) is int else value


def _one_form(name: str) -> str:
    return normalize("NFC", name)


_AS_WRITTEN = BeforeValidator(_written)
Text = Annotated[str, _AS_WRITTEN]
ClassName = Annotated[
    str, Field(min_length=1, max_length=100, pattern=r"^[^/\\\x00-\x1f]+$"), _AS_WRITTEN, AfterValidator(_one_form)
]
"""In NFC: macOS gives accents as characters of their own, keyboards do not."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
ClassifierType = Literal["multi-class", "multi-label"]
Severity = Annotated[
    Literal["error", "warn", "off"],
    Field(description="of the check: a violation blocks training, is shown, or is not looked for"),
]


def is_class_name(name: str) -> bool:
    """Tells whether `model.classes` takes a name."""
    try:
        TypeAdapter(ClassName).validate_python(name)
    except ValidationError:
        return False
    return True


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), serialize_by_alias=True)


class InputSize(Section):
    """Height and width of the images that the model sees, in pixels."""

    h: int = Field(ge=8, le=1024, description="height in pixels")
    w: int = Field(ge=8, le=1024, description="width in pixels")


class DriftDetectionConfig(Section):
    """What is fitted beside the model so that drift can be detected later."""

    uae_encoding_dims: int = Field(
        default=32, ge=2, le=512, description="width of the untrained autoencoder's (UAE) embedding"
    )
    uae_seed: int = Field(default=7, ge=0, description="seed of the encoder's weights")
    reference_data_n_sample: int | None = Field(
        default=None,
        ge=50,
        description="largest number of reference rows, seeded; none keeps the whole reference split",
    )


def _architectures() -> list[str]:
    """Lists what `training/architectures/` has, a module each; a Bento, which trains nothing, has none."""
    return sorted(path.stem for path in (Path(__file__).parent / "training" / "architectures").glob("[!_]*.py"))


def _known_architecture(name: str) -> str:
    known = _architectures()
    if known and name not in known:
        raise ValueError(f"Expected one of {', '.join(known)}. Received: {name}")
    return name


class ModelConfig(Section):
    """The network: its name, its input and output, its architecture."""

    model_name: ModelName = Field(description="name in the registry, in storage and in every log row")
    classes: tuple[ClassName, ...] = Field(min_length=2, description="class names in the order of the outputs")
    classifier_type: ClassifierType = Field(
        default="multi-class", description="one class for each image, or any number of them"
    )
    input_size: InputSize = Field(description="of the images that the model sees")
    architecture: Annotated[str, AfterValidator(_known_architecture)] = Field(
        default="small_cnn",
        description="small_cnn is the original's network; resnet9s is better for its cost; resnet50 for photos",
        json_schema_extra=lambda schema: schema.update(enum=list[JsonValue](_architectures())),
    )
    dropout: float = Field(default=0.0, ge=0.0, le=0.9, description="share of the features that a step leaves out")
    weights: str | None = Field(
        default=None, description="local .keras, .weights.h5 or .h5 file to start from; nothing is ever downloaded"
    )
    weights_channel_order: Literal["auto", "rgb", "bgr"] = Field(
        default="auto",
        description="what the first convolution of resnet50 weights reads; auto: by the file, where it tells (a .keras "
        "of this platform: rgb; the file that keras.applications publishes: bgr), else training refuses and asks",
    )
    threshold: float = Field(
        default=0.5, gt=0.0, lt=1.0, description="multi-label: probability from which a class is predicted"
    )
    drift_detection: DriftDetectionConfig = Field(
        default=DriftDetectionConfig(), description="what is fitted to detect drift later"
    )

    @field_validator("classes")
    @classmethod
    def _unique(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        repeated = sorted({name for name in classes if classes.count(name) > 1})
        if repeated:
            raise ValueError(f"Expected each class once. Received twice: {', '.join(repeated)}")
        return classes

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""
        return self.input_size.h, self.input_size.w


class DatasetConfig(Section):
    """Which version of which DVC repository, and how missing splits are taken from `train`."""

    ds_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"), _AS_WRITTEN] = Field(
        description="the repository's name, as given to `cv-platform import-dataset --name`"
    )
    dvc_tag: Annotated[
        str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]*$"), _AS_WRITTEN
    ] = Field(description="the version, as given to `cv-platform import-dataset --tag`")
    ds_root: str | None = Field(
        default=None, description="folder of dataset repositories; by default $CV_HOME/datasets"
    )
    source: Literal["digits"] | None = Field(
        default=None, description="makes this repository on first use; none: import it first"
    )
    valid_fraction: float = Field(
        default=0.15, gt=0.0, lt=0.5, description="share of train that becomes a missing valid split"
    )
    reference_fraction: float = Field(
        default=0.2,
        gt=0.0,
        lt=0.5,
        description="share of train that becomes a missing reference; with fewer than 40 images "
        "the drift verdict's false-alarm rate is not measured",
    )
    test_fraction: float = Field(
        default=0.15, gt=0.0, lt=0.5, description="share of train, or of all images, that becomes a missing test split"
    )
    split_seed: int = Field(default=0, ge=0, description="of the splits that are made")
    max_image_pixels: int = Field(
        default=250_000_000,
        ge=64,
        le=2**30,
        description="height × width from which an image counts as unreadable; above 40 million, images are decoded to "
        "fewer pixels, one at a time, which takes up to 2 GB",
    )


class EncoderConfig(Section):
    """The pretrained network whose vectors say what images show: validation compares images by it."""

    name: Literal["lite0"] = Field(default="lite0", description="EfficientNet-Lite0, trained on ImageNet-1k")
    input_px: int = Field(
        default=128, ge=32, le=512, description="sides of the square that images are resized to; costs its square"
    )
    file: Path | None = Field(
        default=None, description="an ONNX file of your own instead: (N, 3, H, W) float32 to (N, features)"
    )
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$", description="of `file`, which needs one")
    mean: tuple[float, float, float] = Field(
        default=(0.485, 0.456, 0.406), description="subtracted from RGB of 0 to 1, for `file`"
    )
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(
        default=(0.229, 0.224, 0.225), description="that is divided by afterwards, for `file`"
    )

    @model_validator(mode="after")
    def _require_sha256(self) -> Self:
        if (self.file is None) != (self.sha256 is None):
            raise ValueError("expected `file` and `sha256` together, received one of them; run: sha256sum FILE")
        return self


class ValidateConfig(Section):
    """Limits of the dataset's checks, and what a violation does: error blocks training, warn shows, off: not run."""

    max_unreadable_fraction: Fraction = Field(
        default=0.01, description="images that do not decode (they are quarantined)"
    )
    unreadable_images: Severity = "error"
    max_damaged_fraction: Fraction = Field(
        default=0.0, description="images whose decoder goes on after damage, or which lack the mark of their end"
    )
    damaged_images: Severity = "warn"
    max_constant_fraction: Fraction = Field(default=0.0, description="images that are of one colour throughout")
    constant_images: Severity = "warn"
    max_narrow_range_fraction: Fraction = Field(
        default=0.0,
        description="images of 16-bit samples that use less than a quarter of their range: 12-bit data, say",
    )
    narrow_range: Severity = "warn"
    min_images_per_class: int = Field(default=1, ge=1, description="per class and split")
    class_coverage: Severity = "error"
    max_leakage_fraction: Fraction = Field(default=0.0, description="test images (by sha256) that are in train too")
    train_test_leakage: Severity = "error"
    max_conflicting_fraction: Fraction = Field(default=0.0, description="identical images with different labels")
    conflicting_labels: Severity = "error"
    max_duplicate_fraction: Fraction = Field(default=0.05, description="images that are in the dataset more than once")
    duplicates: Severity = "warn"
    max_label_drift: Fraction = Field(default=0.2, description="Cramér's V between the labels of train and test")
    label_drift: Severity = "warn"
    max_property_drift: Fraction = Field(
        default=0.3, description="Kolmogorov–Smirnov distance between train and test, per property"
    )
    property_drift: Severity = "warn"
    max_label_issue_fraction: Fraction = Field(
        default=0.02, description="labels that the other images contradict, by what the encoder sees in them"
    )
    label_issues: Severity = "warn"
    deepchecks_suites: Severity = Field(
        default="warn", description="Deepchecks' data_integrity and train_test_validation suites"
    )


class MlflowConfig(Section):
    """Where the runs of a stage go in MLflow."""

    exp_name: Text | None = Field(
        default=None, min_length=1, description="MLflow experiment; by default the experiment's name"
    )
    exp_desc: str = Field(default="", description="description of the runs")
    exp_tags: dict[Text, Text] = Field(default_factory=dict, description="tags of the runs")


class AugmentConfig(Section):
    """Random changes of training images (imgaug); zero switches one off. Applied to `sometimes` of the images."""

    sometimes: Fraction = Field(default=0.8, description="share of images that are augmented at all")
    flip_horizontal: Fraction = Field(default=0.0, description="probability")
    flip_vertical: Fraction = Field(default=0.0, description="probability")
    rotate_degrees: float = Field(default=0.0, ge=0.0, le=180.0, description="between −x and +x")
    shear_degrees: float = Field(default=0.0, ge=0.0, le=45.0, description="between −x and +x")
    scale_fraction: float = Field(default=0.0, ge=0.0, lt=1.0, description="zoom between 1−x and 1+x")
    translate_fraction: float = Field(default=0.0, ge=0.0, lt=1.0, description="shift, as a share of the side")
    brightness_fraction: float = Field(default=0.0, ge=0.0, lt=1.0, description="multiply by 1−x to 1+x")
    contrast_fraction: float = Field(default=0.0, ge=0.0, lt=1.0, description="linear contrast by 1−x to 1+x")
    noise_std: float = Field(
        default=0.0, ge=0.0, le=128.0, description="largest standard deviation of Gaussian noise, grey levels"
    )
    blur_sigma_px: float = Field(default=0.0, ge=0.0, le=10.0, description="largest sigma of a Gaussian blur")


class TrainConfig(Section):
    """The recipe of one training."""

    epochs: int = Field(default=10, ge=1, le=10_000, description="passes over the train split")
    batch_size: int = Field(default=64, ge=1, le=8192, description="images of one step")
    init_lr: float = Field(default=1e-3, gt=0.0, le=10.0, description="peak learning rate")
    optimizer: Literal["adam", "sgd"] = Field(default="adam", description="sgd uses Nesterov momentum 0.9")
    schedule: Literal["constant", "cosine", "one_cycle"] = Field(
        default="cosine", description="of the learning rate over the steps"
    )
    warmup_fraction: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="one_cycle: share of the steps that warm up"
    )
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5, description="share of a label given to the others")
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0, description="L2 penalty on kernels")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="epochs without a better validation loss"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32", description="auto takes bfloat16 where the CPU has it; weights stay float32"
    )
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="of weights, order and augmentation")
    temperature_scaling: bool = Field(
        default=True, description="divide the logits by a temperature fitted on the valid split, for honest confidences"
    )
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random changes of the training images")
    mlflow: MlflowConfig = Field(default=MlflowConfig(), description="where the training's runs go")


class EvaluateConfig(Section):
    """What a model must reach before it may be exported and deployed."""

    min_accuracy: Fraction = Field(
        default=0.0, description="multi-class: accuracy; multi-label: mean of per-class accuracies"
    )
    min_macro_f1: Fraction = Field(default=0.0, description="mean of the classes' F1")
    max_regression: Fraction = Field(
        default=1.0, description="accuracy that may be lost against the production model; 1: any"
    )
    worst_errors: int = Field(default=16, ge=0, le=100, description="images shown with the most confident mistakes")
    mlflow: MlflowConfig = Field(default=MlflowConfig(), description="where the evaluation's runs go")


class DeployConfig(Section):
    """Which service the model goes to, and how long its workers have to take it up."""

    service: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")] = Field(
        default="image_classifier", description="serves one experiment's model; another's deployment is refused"
    )
    takes_over: ExperimentName | None = Field(
        default=None, description="experiment whose place on the service this one may take"
    )
    runtime: Literal["auto", "onnx", "tensorflow"] = Field(
        default="auto",
        description="what runs the exported model; auto: ONNX Runtime where the model converts and answers alike",
    )
    golden_images: int = Field(
        default=8, ge=1, le=64, description="test images of all classes, kept in the bundle for its self-test"
    )
    confirm_timeout_seconds: float = Field(
        default=60.0,
        gt=0.0,
        le=3600.0,
        description="until every running worker has taken the model up; else it goes back",
    )


class MonitorConfig(Section):
    """The window of requests that the drift report judges, and how."""

    alpha: float = Field(
        default=0.05,
        gt=0.0,
        lt=0.5,
        description="family-wise false-alarm rate of one report; what is measured on the reference split, if it has at "
        "least 40 images, is held against it",
    )
    min_samples: int = Field(default=100, ge=20, description="fewer requests give the verdict 'insufficient data'")
    max_samples: int = Field(default=5000, ge=100, description="the latest rows of the window that are read")
    min_feedback: int = Field(
        default=30, ge=10, description="production_metrics: fewer predictions with feedback are not judged"
    )
    window_days: float = Field(
        default=7.0,
        gt=0.0,
        le=366.0,
        description="the window where nothing else says it: the last days until the run was asked for. The schedule's "
        "windows begin where the one before ended, the first so many days before",
    )
    window_start_utc: str | None = Field(
        default=None, description="ISO 8601 with zone: start (inclusive) instead of the default"
    )
    window_end_utc: str | None = Field(default=None, description="ISO 8601 with zone: end (exclusive) instead of now")
    window_by: Literal["answered", "logged"] = Field(
        default="answered",
        description="the time that puts a request into the window; logged, which the schedule sets: when it reached "
        "the database, so that one that came late is in the next window",
    )
    permutations: int = Field(default=499, ge=99, le=9999, description="of each kernel test")
    max_reference_rows: int = Field(
        default=2000, ge=100, description="seeded subsample of the reference in kernel tests"
    )
    schedule_cron: str = Field(default="0 6 * * 1", description="when the report runs (UTC)")
    new_rows_trigger: int = Field(default=1000, ge=1, description="new requests that make the sensor run a report")
    seed: int = Field(default=0, ge=0, description="of subsamples and permutations")

    @field_validator("window_start_utc", "window_end_utc")
    @classmethod
    def _aware(cls, value: str | None) -> str | None:
        if value is not None:
            from datetime import datetime

            if datetime.fromisoformat(value).tzinfo is None:
                raise ValueError(f"Expected a time with its zone, such as 2026-01-31T06:00:00+00:00. Received: {value}")
        return value


class AlertsConfig(Section):
    """What is worth a message. The addresses (apprise URLs) hold secrets and come from `CV_ALERT_URLS`."""

    on_drift: bool = Field(default=True, description="a report whose verdict is drift")
    on_run_failure: bool = Field(default=True, description="a Dagster run that failed")


class ExperimentConfig(Section):
    """One experiment: one file in `configs/`, one branch of the asset graph."""

    name: ExperimentName = Field(description="of the experiment: its group in Dagster, its folder of records")
    description: str = Field(default="", description="shown in Dagster")
    owners: tuple[str, ...] = Field(default=("team:computer-vision",), description="e-mail addresses, or team:NAME")
    model: ModelConfig = Field(description="the network")
    dataset: DatasetConfig = Field(description="the images")
    encoder: EncoderConfig = Field(default=EncoderConfig(), description="what images are compared by")
    # Called `validate` in YAML, dumps and schema; pydantic keeps that attribute for a deprecated method of its own.
    validation: ValidateConfig = Field(
        default=ValidateConfig(), alias="validate", description="limits of the dataset's checks"
    )
    train: TrainConfig = Field(default=TrainConfig(), description="the recipe")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="the gate")
    deploy: DeployConfig = Field(default=DeployConfig(), description="the service")
    monitor: MonitorConfig = Field(default=MonitorConfig(), description="the drift report")
    alerts: AlertsConfig = Field(default=AlertsConfig(), description="what is worth a message")

    def fingerprint(self, *fields: str, without: Iterable[str] = ()) -> str:
        """Returns 12 hex digits over `fields`, named as in YAML: code versions carry it.

        Args:
            *fields: sections, or single fields: `monitor.alpha`; all sections, when none is given.
            without: fields below them that are left out.

        Raises:
            KeyError: there is no such field.
        """
        dump = self.model_dump(mode="json")
        for field in without:
            *sections, last = field.split(".")
            del functools.reduce(lambda section, name: section[name], sections, dump)[last]
        chosen = {
            field: functools.reduce(lambda section, name: section[name], field.split("."), dump)
            for field in fields or dump
        }
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


def config_files(configs: Path) -> list[Path]:
    """Lists the YAML files of `configs` (a folder, not its subfolders; or one file), sorted; hidden ones are left out.

    A name that begins with a dot is an editor's or macOS's (`._digits.yaml` on a USB stick), and no experiment.

    Raises:
        ConfigError: there is no such file or folder, or it cannot be read.
    """
    if configs.is_file():
        return [configs]
    if configs.is_dir():
        try:
            files = sorted(path for path in configs.iterdir() if path.suffix in {".yaml", ".yml"} and path.is_file())
            return [path for path in files if not path.name.startswith(".")]
        except OSError as err:
            raise ConfigError(f"Expected a folder that can be read. Received: {err}. Correct its rights.") from err
    raise ConfigError(
        f"Expected a YAML file or a folder of them. Received: {configs}, which does not exist. Set CV_CONFIGS."
    )


class _Loader(yaml.SafeLoader):
    """Marks whole numbers that were written in a way of which YAML keeps nothing."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if str(number) == node.value:
            return number
        odd = _OddInteger(number)
        odd.text = node.value
        return odd


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load_experiment(path: Path) -> ExperimentConfig:
    """Reads one experiment.

    Raises:
        ConfigError: the file is not readable YAML, or fields are wrong; every mistake is listed with its place.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as err:
        raise ConfigError(f"{path}: expected a YAML file. {_what_is_there(path)}") from err
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as err:  # ValueError: also a date of month 13.
        raise ConfigError(
            f"{path}: expected a readable YAML file. Received: {err}. Correct the file, or who may read it."
        ) from err
    if not isinstance(content, dict):
        received = "an empty file" if content is None else f"a {type(content).__name__}"
        raise ConfigError(
            f"{path}: expected sections (model, dataset, …). Received: {received}. Start from a copy of "
            "configs/examples/animals10.yaml; configs/schema.json describes every field."
        )
    return parse_experiment(cast(dict[str, Any], content), origin=str(path))


def _what_is_there(path: Path) -> str:
    """Says what is at `path` in place of a file, and which files are near."""
    folder = path if path.is_dir() else path.absolute().parent
    received = "a folder" if path.is_dir() else "nothing there"
    if not folder.is_dir():
        return f"Received: {received}, nor is there a folder {folder}. Correct the path."
    near = ", ".join(file.name for file in config_files(folder)) or "none; configs/examples has some to copy"
    return f"Received: {received}. Name one of the YAML files in {folder}: {near}."


def load_experiments(files: Iterable[Path]) -> tuple[dict[Path, ExperimentConfig], dict[Path, str]]:
    """Returns the experiments by file, and by file what is wrong with those that give none.

    Where several files claim the same name, model or service, as a copied YAML does, none of them gives one: nobody
    knows which is meant.
    """
    found: dict[Path, ExperimentConfig] = {}
    broken: dict[Path, str] = {}
    for path in files:
        try:
            found[path] = load_experiment(path)
        except ConfigError as err:
            broken[path] = str(err)
    conflicts: dict[Path, list[str]] = defaultdict(list)
    for claim, remedy in (
        ("name", "Rename all but one."),
        ("model.model_name", "Storage, registry and log tell models apart by it: rename all but one."),
        (
            "deploy.service",
            "A service is one experiment's: give all but one another (deploy.service), or let one take the other's "
            "place (deploy.takes_over: NAME).",
        ),
    ):
        for value, same in _claimed(found, claim).items():
            if len(same) > 1 and not (claim == "deploy.service" and _is_settled([found[path] for path in same])):
                files_named = " and ".join(str(path) for path in same)
                error = f"{files_named}: expected one experiment with {claim}: {value}. Received: {len(same)}. {remedy}"
                for path in same:
                    conflicts[path].append(error)
    broken |= {path: "\n".join(errors) for path, errors in conflicts.items()}
    return {path: experiment for path, experiment in found.items() if path not in broken}, broken


def load_beside_others(path: Path) -> ExperimentConfig:
    """Reads one experiment, and refuses it where another file of its folder claims its name, model or service.

    Raises:
        ConfigError: see `load_experiment`; or such a claim, and the message names both files.
    """
    experiment = load_experiment(path)
    _, broken = load_experiments(sorted({path, *config_files(path.parent)}))
    if path in broken:
        raise ConfigError(broken[path])
    return experiment


def _claimed(experiments: Mapping[Path, ExperimentConfig], claim: str) -> dict[str, list[Path]]:
    """Returns by each value of a field, named by its place in the YAML, the files that have it."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path, experiment in experiments.items():
        files[functools.reduce(getattr, claim.split("."), cast(Any, experiment))].append(path)
    return files


def _is_settled(experiments: Sequence[ExperimentConfig]) -> bool:
    """Whether of each two experiments exactly one takes the other's place."""
    return all(
        (one.deploy.takes_over == other.name) != (other.deploy.takes_over == one.name)
        for one, other in itertools.combinations(experiments, 2)
    )


def parse_experiment(content: Mapping[str, Any], *, origin: str) -> ExperimentConfig:
    """Validates an experiment; errors name `origin`, each field's path, what was expected and what was received.

    Raises:
        ConfigError: fields are wrong; all of them are listed.
    """
    try:
        return ExperimentConfig.model_validate(content)
    except ValidationError as err:
        raise ConfigError(
            f"{origin}: {err.error_count()} mistake(s):\n" + "\n".join(_explain(e) for e in err.errors())
        ) from err


def _explain(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "extra_forbidden":
        section: Any = ExperimentConfig
        for part in error["loc"][:-1]:
            section = next(
                (f.annotation for name, f in section.model_fields.items() if (f.alias or name) == part), None
            )
            if not hasattr(section, "model_fields"):
                break
        fields = getattr(section, "model_fields", {})
        known = ", ".join(f.alias or name for name, f in fields.items()) or "see configs/schema.json"
        return f"  {place}: unknown key. Expected one of: {known}."
    if error["type"] == "missing":
        return f"  {place}: missing. Add it; configs/schema.json describes it."
    received = error["input"]
    if error["type"] == "string_type" and (kind := _kind(received)):
        return (
            f"  {place}: expected text. Received: {getattr(received, 'text', received)}, which YAML takes for {kind}. "
            'Put it in quotes, as it is meant: "1.10", "yes", "2024-01-31".'
        )
    return f"  {place}: {error['msg']}. Received: {str(received)[:200]!r}"


def _kind(value: object) -> str | None:
    """Says what YAML made of text without quotes; None of what is no scalar."""
    kinds: tuple[tuple[type, str], ...] = (
        (_OddInteger, "another number"),
        (bool, "a truth value, as yes, no, on and off"),
        (float, "a decimal number"),
        (date, "a date"),
        (type(None), "nothing"),
    )
    return next((kind for of, kind in kinds if isinstance(value, of)), None)


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of an experiment; `configs/schema.json` is this, and a test holds it."""
    schema = ExperimentConfig.model_json_schema()
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    schema["title"] = "cv_platform experiment"
    return schema
