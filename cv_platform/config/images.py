"""The sections `dataset`, `encoder` and `validate`: the images, and what they must be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from cv_platform.config.fields import AS_WRITTEN, Fraction, Policy, Section, Severity


class QuarantineConfig(Section):
    """What becomes of images of a kind: quarantine takes them out of every split, fail blocks training, too.

    An image of several kinds counts by the first that is not kept. What is quarantined is named with its reason by the
    check `quarantined_images`, in a table and on a page of the validation report.
    """

    zero_size: Literal["quarantine", "fail"] = Field(default="quarantine", description="files of 0 bytes")
    absurd_size: Literal["quarantine", "fail"] = Field(
        default="quarantine",
        description="more pixels than dataset.max_image_pixels, a side below `min_side_px`, or one side more than "
        "`max_aspect` times the other",
    )
    unreadable: Literal["quarantine", "fail"] = Field(
        default="quarantine", description="no image of a supported format, or one that does not decode to its end"
    )
    unknown_class: Literal["quarantine", "fail"] = Field(
        default="fail",
        description="a label that model.classes does not name; fail: the dataset is refused at once, as the mistake is "
        "most often in the config",
    )
    damaged: Policy = Field(default="keep", description="decoded, though its decoder complained of damage")
    animated: Policy = Field(default="keep", description="more pictures than one, of which the first counts")
    constant: Policy = Field(default="keep", description="of one colour throughout")
    bit_depth: Policy = Field(
        default="keep",
        description="16-bit samples that use a quarter of their range or less, of which few are seen, or that exceed "
        "model.sample_bits",
    )
    wrong_suffix: Policy = Field(default="keep", description="a suffix of another format than the file's")
    duplicate: Policy = Field(
        default="keep",
        description="the same bytes as another image; quarantine leaves one, of test before valid, reference and "
        "train, and none where their labels differ",
    )
    min_side_px: int = Field(default=2, ge=1, le=1024, description="the shortest side that is not absurd")
    max_aspect: float = Field(default=100.0, ge=1.0, le=65_535.0, description="the longest shape that is not absurd")


class DatasetConfig(Section):
    """Which version of which DVC repository, and how missing splits are taken from `train`."""

    ds_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"), AS_WRITTEN] = Field(
        description="the repository's name, as given to `cv-platform import-dataset --name`"
    )
    dvc_tag: Annotated[
        str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]*$"), AS_WRITTEN
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
    packed_uint8_bytes: int = Field(
        default=200_000_000_000,
        ge=0,
        description="bytes (images × height × width × 3) up to which the training split is packed as it is decoded; a "
        "larger one is packed as JPEG of quality 90, a fifth of that; valid, test and reference never are",
    )
    quarantine: QuarantineConfig = Field(default=QuarantineConfig(), description="what becomes of images of a bad kind")


class EncoderConfig(Section):
    """The pretrained network whose vectors say what images show: validation compares images by it."""

    name: Literal["lite0", "lite2"] = Field(
        default="lite0",
        description="EfficientNet-Lite0, trained on ImageNet-1k; lite2 (extra `lite2`): larger, at twice the cost",
    )
    input_px: int = Field(
        default=128, ge=32, le=512, description="sides of the square that images are resized to; costs its square"
    )
    file: Path | None = Field(
        default=None,
        description="a file of your own instead: ONNX, (N, 3, H, W) float32 to (N, features), or .keras, (N, H, W, 3)",
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
    max_quarantined_fraction: Fraction = Field(
        default=0.1,
        description="images that dataset.quarantine keeps out of the splits, those that do not decode included",
    )
    quarantined_images: Severity = "error"
    max_damaged_fraction: Fraction = Field(
        default=0.0, description="images whose decoder goes on after damage, or which lack the mark of their end"
    )
    damaged_images: Severity = "warn"
    max_constant_fraction: Fraction = Field(default=0.0, description="images that are of one colour throughout")
    constant_images: Severity = "warn"
    max_narrow_range_fraction: Fraction = Field(
        default=0.0,
        description="images of 16-bit samples that use a quarter of their range or less: 12-bit data, say",
    )
    narrow_range: Severity = "warn"
    max_clipped_fraction: Fraction = Field(
        default=0.0, description="images with samples above the range of model.sample_bits, which become white"
    )
    clipped_samples: Severity = "warn"
    max_other_bit_depth_fraction: Fraction = Field(
        default=0.0, description="images of 16-bit samples where most have 8 bits, or the other way round"
    )
    bit_depth: Severity = "warn"
    min_images_per_class: int = Field(default=1, ge=1, description="per class and split")
    class_coverage: Severity = "error"
    max_class_ratio: float = Field(
        default=30.0, ge=1.0, description="images of train of the largest class, for each of the smallest one"
    )
    class_imbalance: Severity = "warn"
    max_leakage_fraction: Fraction = Field(default=0.0, description="test images (by sha256) that are in train too")
    train_test_leakage: Severity = "error"
    max_divided_group_fraction: Fraction = Field(
        default=0.0, description="images whose group (a patient, a video: see the import) is in another split, too"
    )
    divided_groups: Severity = "error"
    max_conflicting_fraction: Fraction = Field(
        default=0.0, description="identical images, or near-copies, with different labels"
    )
    conflicting_labels: Severity = "error"
    conflicting_near_copies: Severity = "warn"
    max_near_copy_fraction: Fraction = Field(
        default=0.005, description="images of the second split that show what one of the first shows"
    )
    near_copies_train_test: Severity = "warn"
    near_copies_train_valid: Severity = "warn"
    near_copies_train_reference: Severity = "warn"
    near_copies_valid_test: Severity = "warn"
    near_copies_valid_reference: Severity = "warn"
    near_copies_test_reference: Severity = "warn"
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
    max_outlier_fraction: Fraction = Field(
        default=0.002, description="images far from every class, by what the encoder sees in them: other things, scans"
    )
    outliers: Severity = "warn"
    deepchecks_suites: Severity = Field(
        default="warn", description="each check of Deepchecks' suites data_integrity and train_test_validation"
    )
