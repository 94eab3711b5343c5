"""The section `model`: the network."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from cv_platform.config.fields import ClassifierType, ClassName, ModelName, Section


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
    return sorted(path.stem for path in (Path(__file__).parents[1] / "training" / "architectures").glob("[!_]*.py"))


KERAS_APPLICATIONS = (
    *("DenseNet121", "DenseNet169", "DenseNet201", *(f"EfficientNetB{n}" for n in range(8))),
    *("EfficientNetV2B0", "EfficientNetV2B1", "EfficientNetV2B2", "EfficientNetV2B3", "EfficientNetV2S"),
    *("EfficientNetV2M", "EfficientNetV2L", "InceptionResNetV2", "InceptionV3", "MobileNet", "MobileNetV2"),
    *("MobileNetV3Large", "MobileNetV3Small", "NASNetLarge", "NASNetMobile", "ResNet101", "ResNet101V2"),
    *("ResNet152", "ResNet152V2", "ResNet50", "ResNet50V2", "VGG16", "VGG19", "Xception"),
)
"""Names of `keras.applications`: those whose layers are all Keras's registered ones."""
_USERS_FUNCTION = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"


def _known_architecture(name: str) -> str:
    known = _architectures()
    if known and name not in known and name not in KERAS_APPLICATIONS and not re.match(_USERS_FUNCTION, name):
        near = difflib.get_close_matches(name, KERAS_APPLICATIONS, n=2)
        raise ValueError(
            f"Expected one of {', '.join(known)}, a name of keras.applications"
            f"{' (' + ' or '.join(near) + '?)' if near else ''}, or module:function. Received: {name}"
        )
    return name


PRETRAINED_ARCHITECTURES = ("efficientnet_lite0",)
"""Those that come with weights."""


class ModelConfig(Section):
    """The network: its name, its input and output, its architecture."""

    model_name: ModelName = Field(description="name in the registry, in storage and in every log row")
    classes: tuple[ClassName, ...] = Field(min_length=2, description="class names in the order of the outputs")
    classifier_type: ClassifierType = Field(
        default="multi-class", description="one class for each image, or any number of them"
    )
    input_size: InputSize = Field(description="of the images that the model sees")
    resize: Literal["stretch", "crop", "pad"] = Field(
        default="stretch",
        description="what becomes of an image of other proportions than input_size, in training and service alike: "
        "stretch changes them, crop keeps the middle, pad adds grey at two sides",
    )
    sample_bits: int | None = Field(
        default=None,
        ge=9,
        le=16,
        description="bits that the samples of 16-bit files (PNG, TIFF) really use, such as 12, in training and service "
        "alike: their range becomes 0 to 255, and larger values 255; by default 16",
    )
    architecture: Annotated[str, AfterValidator(_known_architecture)] = Field(
        default="small_cnn",
        description="efficientnet_lite0 has learned from ImageNet's photographs, and is best for photographs; of those "
        "that have learned nothing, small_cnn is the original's network, and resnet9s is better for its cost; "
        "also a name of keras.applications, or module:function of your own, which takes the image and this section and "
        "returns the last feature map",
        json_schema_extra=lambda schema: schema.update(
            anyOf=[{"enum": [*_architectures(), *KERAS_APPLICATIONS]}, {"pattern": _USERS_FUNCTION}]
        ),
    )
    dropout: float = Field(default=0.0, ge=0.0, le=0.9, description="share of the features that a step leaves out")
    weights: str | None = Field(
        default=None,
        description="local .keras, .weights.h5 or .h5 file to start from, or MODEL_NAME/VERSION of a model that was "
        "trained here; nothing is ever downloaded; by default random, and for efficientnet_lite0 those that its "
        "package holds",
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

    @field_validator("sample_bits")
    @classmethod
    def _none_of_16(cls, bits: int | None) -> int | None:
        """Has one name for the pixels that there are by default."""
        return None if bits == 16 else bits

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""
        return self.input_size.h, self.input_size.w
