"""What the sections are made of: their base, and the kinds of text and number that several of them take."""

from __future__ import annotations

from typing import Annotated, Literal
from unicodedata import normalize

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

ExperimentName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,47}$")]
"""Names become Dagster group and op names, which take neither `-` nor `.`."""
ModelName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]
"""Names become folders and URL parts: a name, never a path."""


def _written(value: object) -> object:
    """Takes a number for the text that it was written as; what could have been written otherwise is left to fail."""
    return str(value) if type(value) is int else value


def _one_form(name: str) -> str:
    return normalize("NFC", name)


AS_WRITTEN = BeforeValidator(_written)
Text = Annotated[str, AS_WRITTEN]
ClassName = Annotated[
    str, Field(min_length=1, max_length=100, pattern=r"^[^/\\\x00-\x1f]+$"), AS_WRITTEN, AfterValidator(_one_form)
]
"""In NFC: macOS gives accents as characters of their own, keyboards do not."""
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
ClassifierType = Literal["multi-class", "multi-label"]
Threshold = float | tuple[float, ...]
"""Probability from which a label is predicted: one for all classes, or one for each, in their order."""
Policy = Literal["quarantine", "keep", "fail"]
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
