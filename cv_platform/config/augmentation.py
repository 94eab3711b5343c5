"""The section `train.augment`, and what its `operations` may say: imgaug's names and parameters, in YAML.

Here is which augmenters may be named, with which parameters and values: nothing else of imgaug, and no other code, can
be reached from a config. What they do is in `training.augmentation` (imgaug) and `training.fused` (OpenCV).
https://imgaug.readthedocs.io/en/latest/source/overview_of_augmenters.html

A value is a number; `[a, b]`, drawn anew for each image from a to b (imgaug's tuple); or `{choice: [a, b, c]}`, one of
them (imgaug's list). What is not given is imgaug's default.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast

from pydantic import Field, model_validator

from cv_platform.config.fields import Fraction, Section

MAX_OPERATIONS = 200
MAX_DEPTH = 12


@dataclass(frozen=True)
class Operation:
    """One augmenter with what a config says of it.

    Attributes:
        name: imgaug's.
        arguments: by imgaug's names, in its own form: a tuple is a range, a list a choice, a dict goes by axis.
        children: operations below it, by imgaug's names.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    children: Mapping[str, tuple[Operation, ...]] = field(default_factory=dict[str, "tuple[Operation, ...]"])


@dataclass(frozen=True)
class Parameter:
    """What a parameter takes.

    Attributes:
        kind: number and integer may be drawn; `axes` and `whole axes` are such a number, or one for each of x and y;
            the others are as they are written.
        low: the least number.
        high: the greatest.
        words: what else there is to choose from.
    """

    kind: Literal["number", "integer", "axes", "whole axes", "share", "flag", "word", "count", "children"]
    low: float = 0.0
    high: float = 1.0
    words: tuple[str | int, ...] = ()

    def expected(self) -> str:
        """Says in words what it takes."""
        span = f"{self.low:g} to {self.high:g}"
        drawn = f"from {span}, a range [a, b] or {{choice: [a, b, …]}}"
        return {
            "number": f"a number {drawn}",
            "integer": f"a whole number {drawn}",
            "axes": f"a number {drawn}, or {{x: …, y: …}}",
            "whole axes": f"a whole number {drawn}, or {{x: …, y: …}}",
            "share": "a probability from 0 to 1, true or false",
            "flag": "true or false",
            "word": f"one of {', '.join(map(str, self.words))}",
            "count": "a whole number, or a range [a, b]",
            "children": "a list of operations",
        }[self.kind]


@dataclass(frozen=True)
class Kind:
    """An augmenter that may be named.

    Attributes:
        parameters: by imgaug's names; the first one may be given without its name.
        is_fused: whether `engine: fused` has it, too.
        needs: parameters of which at least one must be given.
    """

    parameters: Mapping[str, Parameter]
    is_fused: bool = False
    needs: tuple[str, ...] = ()


def _number(low: float, high: float) -> Parameter:
    return Parameter("number", low, high)


def _integer(low: int, high: int) -> Parameter:
    return Parameter("integer", low, high)


_SHARE, _FLAG, _CHILDREN = Parameter("share"), Parameter("flag"), Parameter("children")
_GREY = _number(0, 255)
_MODE = Parameter("word", words=("constant", "edge", "symmetric", "reflect", "wrap"))
_BORDER = {"order": Parameter("word", words=(0, 1, 3)), "cval": _GREY, "mode": _MODE}
_SPACES = {"to_colorspace": Parameter("word", words=("YCrCb", "HSV", "HLS", "Lab", "Luv", "YUV"))}
_PER_CHANNEL = {"per_channel": _SHARE}


def _turned(name: str, parameter: Parameter) -> Kind:
    return Kind({name: parameter, **_BORDER}, is_fused=True)


_SHIFTED = Kind({"percent": _number(-1, 1), "px": _integer(-4096, 4096), **_BORDER}, True, ("percent", "px"))
_SIDES = {"px": _integer(-4096, 4096), "percent": _number(-0.9, 2)}
_CUT = {"px": _integer(0, 4096), "percent": _number(0, 0.9)}
_FILLED = {"pad_mode": _MODE, "pad_cval": _GREY}
_APART = {"sample_independently": _FLAG}
_ONE_OF_SIDES = ("px", "percent")

AUGMENTERS: Mapping[str, Kind] = {
    "Sequential": Kind({"children": _CHILDREN, "random_order": _FLAG}, True, ("children",)),
    "Sometimes": Kind({"p": _SHARE, "then_list": _CHILDREN, "else_list": _CHILDREN}, True, ("then_list", "else_list")),
    "OneOf": Kind({"children": _CHILDREN}, True, ("children",)),
    "SomeOf": Kind({"n": Parameter("count"), "children": _CHILDREN, "random_order": _FLAG}, True, ("children",)),
    "Identity": Kind({}, is_fused=True),
    # Geometry.
    "Fliplr": Kind({"p": _SHARE}, is_fused=True),
    "Flipud": Kind({"p": _SHARE}, is_fused=True),
    "Affine": Kind(
        {
            "scale": Parameter("axes", 0.001, 20),
            "translate_percent": Parameter("axes", -1, 1),
            "translate_px": Parameter("whole axes", -4096, 4096),
            "rotate": _number(-360, 360),
            "shear": Parameter("axes", -80, 80),
            **_BORDER,
        },
        is_fused=True,
        needs=("scale", "translate_percent", "translate_px", "rotate", "shear"),
    ),
    "Rotate": _turned("rotate", _number(-360, 360)),
    "ShearX": _turned("shear", _number(-80, 80)),
    "ShearY": _turned("shear", _number(-80, 80)),
    "ScaleX": _turned("scale", _number(0.05, 20)),
    "ScaleY": _turned("scale", _number(0.05, 20)),
    "TranslateX": _SHIFTED,
    "TranslateY": _SHIFTED,
    "Crop": Kind({**_CUT, **_APART}, True, _ONE_OF_SIDES),
    "Pad": Kind({**_CUT, **_FILLED, **_APART}, True, _ONE_OF_SIDES),
    "CropAndPad": Kind({**_SIDES, **_FILLED, **_APART}, True, _ONE_OF_SIDES),
    "PerspectiveTransform": Kind({"scale": _number(0, 0.4), "cval": _GREY}),
    "ElasticTransformation": Kind({"alpha": _number(0, 1000), "sigma": _number(0.1, 100)}),
    "Rot90": Kind({"k": _integer(0, 3)}),
    # A new value for each value.
    "Multiply": Kind({"mul": _number(0, 20), **_PER_CHANNEL}, is_fused=True),
    "Add": Kind({"value": _number(-255, 255), **_PER_CHANNEL}, is_fused=True),
    "LinearContrast": Kind({"alpha": _number(0, 20), **_PER_CHANNEL}, is_fused=True),
    "GammaContrast": Kind({"gamma": _number(0.01, 20), **_PER_CHANNEL}, is_fused=True),
    "SigmoidContrast": Kind({"gain": _number(0, 50), "cutoff": _number(0, 1), **_PER_CHANNEL}),
    "LogContrast": Kind({"gain": _number(0, 20), **_PER_CHANNEL}),
    "Invert": Kind({"p": _SHARE, **_PER_CHANNEL}, is_fused=True),
    "Solarize": Kind({"p": _SHARE, "threshold": _number(0, 256)}, is_fused=True),
    "Posterize": Kind({"nb_bits": _integer(1, 8)}, is_fused=True),
    # Colour and contrast of whole images.
    "Grayscale": Kind({"alpha": _number(0, 1)}, is_fused=True),
    "AddToBrightness": Kind({"add": _number(-255, 255), **_SPACES}, is_fused=True),
    "MultiplyBrightness": Kind({"mul": _number(0, 20), **_SPACES}, is_fused=True),
    "AddToHue": Kind({"value": _integer(-255, 255)}, is_fused=True),
    "AddToSaturation": Kind({"value": _integer(-255, 255)}, is_fused=True),
    "MultiplySaturation": Kind({"mul": _number(0, 20)}, is_fused=True),
    "ChannelShuffle": Kind({"p": _SHARE}),
    "HistogramEqualization": Kind({}),
    "AllChannelsHistogramEqualization": Kind({}),
    "CLAHE": Kind({"clip_limit": _number(0.1, 50)}),
    # Noise, and holes.
    "AdditiveGaussianNoise": Kind({"loc": _number(-255, 255), "scale": _number(0, 255), **_PER_CHANNEL}, is_fused=True),
    "AdditiveLaplaceNoise": Kind({"loc": _number(-255, 255), "scale": _number(0, 255), **_PER_CHANNEL}),
    "AdditivePoissonNoise": Kind({"lam": _number(0, 255), **_PER_CHANNEL}),
    "SaltAndPepper": Kind({"p": _number(0, 1), **_PER_CHANNEL}),
    "Dropout": Kind({"p": _number(0, 1), **_PER_CHANNEL}),
    "CoarseDropout": Kind({"p": _number(0, 1), "size_percent": _number(0.01, 1), **_PER_CHANNEL}),
    "Cutout": Kind(
        {"nb_iterations": _integer(0, 20), "size": _number(0, 1), "squared": _FLAG, "cval": _GREY}, is_fused=True
    ),
    # Neighbourhoods.
    "GaussianBlur": Kind({"sigma": _number(0, 20)}, is_fused=True),
    "AverageBlur": Kind({"k": _integer(1, 31)}),
    "MedianBlur": Kind({"k": _integer(1, 31)}),
    "MotionBlur": Kind({"k": _integer(3, 31), "angle": _number(-360, 360), "direction": _number(-1, 1)}),
    "Sharpen": Kind({"alpha": _number(0, 1), "lightness": _number(0, 10)}),
    "Emboss": Kind({"alpha": _number(0, 1), "strength": _number(0, 10)}),
    "EdgeDetect": Kind({"alpha": _number(0, 1)}),
    "JpegCompression": Kind({"compression": _integer(0, 100)}),
}
"""What may be named, by imgaug's names."""

NAMED_SETS: Mapping[str, Sequence[Any]] = {
    "original": [
        {
            "Sometimes": {
                "p": 0.8,
                "then_list": [
                    {
                        "Sequential": {
                            "random_order": True,
                            "children": [
                                {"Sometimes": {"p": 0.5, "then_list": [{"AddToBrightness": [-30, 30]}]}},
                                {"OneOf": [{"Fliplr": 1.0}]},
                                {
                                    "OneOf": [
                                        {"Affine": {"rotate": [-20, 20]}},
                                        {"Affine": {"scale": {"x": [0.8, 1.2], "y": [0.8, 1.2]}}},
                                    ]
                                },
                            ],
                        }
                    }
                ],
            }
        }
    ]
}
"""Sets that may be named in the place of an operation. `original` is what the original stack trained with: it mirrors
every image that it touches, as its `OneOf` has one member."""


def parse_operations(listed: Sequence[Any], place: str = "operations") -> tuple[Operation, ...]:
    """Returns what a list of a YAML says.

    Raises:
        ValueError: it names what it may not, or gives it what it does not take: every mistake, with its place.
    """
    reader = _Reader()
    operations = reader.operations(listed, place, depth=0)
    if reader.mistakes:
        raise ValueError("\n    ".join(["expected operations that imgaug has; received:", *reader.mistakes]))
    return operations


class _Reader:
    """Reads operations, and collects what is wrong with them."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []
        self.count = 0

    def operations(self, listed: Any, place: str, *, depth: int) -> tuple[Operation, ...]:
        items = _as_list(listed)
        if not items:
            return self._wrong(place, "a list with an operation or more", listed) or ()
        if depth > MAX_DEPTH:
            return self._wrong(place, f"at most {MAX_DEPTH} levels of operations", "more") or ()
        read: list[Operation] = []
        for index, item in enumerate(items):
            here = f"{place}[{index}]"
            if isinstance(item, str) and item in NAMED_SETS:
                read += self.operations(NAMED_SETS[item], here, depth=depth + 1)
            elif (operation := self._operation(item, here, depth)) is not None:
                read.append(operation)
        return tuple(read)

    def _wrong(self, place: str, expected: str, received: Any) -> None:
        text = str(received)
        self.mistakes.append(f"{place}: expected {expected}; received {text[:80]}{'…' if len(text) > 80 else ''}")

    def _operation(self, item: Any, place: str, depth: int) -> Operation | None:
        self.count += 1
        if self.count > MAX_OPERATIONS:
            return None if self.count > MAX_OPERATIONS + 1 else self._wrong(place, f"at most {MAX_OPERATIONS}", "more")
        named = _as_dict(item)
        name, content = next(iter(named.items())) if named and len(named) == 1 else (item, None)
        kind = AUGMENTERS.get(name) if isinstance(name, str) else None
        if kind is None:
            near = difflib.get_close_matches(str(name), [*AUGMENTERS, *NAMED_SETS], n=3)
            what = f"an augmenter, as {', '.join(near or ['Fliplr', 'Affine', 'Sometimes'])}"
            return self._wrong(place, f"{what} (docs/reference/augmentation.md lists them)", name)
        return self._filled(str(name), kind, content, f"{place}.{name}", depth)

    def _filled(self, name: str, kind: Kind, content: Any, place: str, depth: int) -> Operation | None:
        first, given = next(iter(kind.parameters), ""), _as_dict(content)
        # A value alone is the first parameter's, as in imgaug's calls.
        is_alone = content is not None and (given is None or set(given) == {"choice"} or set(given) == {"x", "y"})
        if is_alone and not first:
            return self._wrong(place, "no parameters", content)
        given = {first: content} if is_alone else given or {}
        arguments: dict[str, Any] = {}
        children: dict[str, tuple[Operation, ...]] = {}
        for key, value in given.items():
            parameter, here = kind.parameters.get(key), place if is_alone else f"{place}.{key}"
            if parameter is None:
                self._wrong(place, f"parameters {', '.join(kind.parameters) or 'none'}", key)
            elif parameter.kind == "children":
                children[key] = self.operations(value, here, depth=depth + 1)
            else:
                arguments[key] = self._value(parameter, value, here)
        if kind.needs and not any(key in given for key in kind.needs):
            self._wrong(place, f"one of {', '.join(kind.needs)}", ", ".join(map(str, given)) or "nothing")
        for one, other in (("px", "percent"), ("translate_px", "translate_percent")):
            if one in given and other in given:
                self._wrong(place, f"{one} or {other}", "both")
        return Operation(name, arguments, children)

    def _value(self, parameter: Parameter, value: Any, place: str) -> Any:
        """Returns a value in imgaug's form."""
        of_axis = {"axes": "number", "whole axes": "integer"}
        if parameter.kind in of_axis:
            axes, single = _as_dict(value), replace(parameter, kind=of_axis[parameter.kind])
            if axes and not set(axes) - {"x", "y"}:
                return {axis: self._value(single, axes[axis], f"{place}.{axis}") for axis in axes}
            read = _drawn(single, value)
        elif parameter.kind in {"number", "integer"}:
            read = _drawn(parameter, value)
        elif parameter.kind == "count":
            read = _drawn(replace(parameter, kind="integer", high=MAX_OPERATIONS), value)
            read = None if isinstance(read, list) else read
        else:
            is_right = {
                "share": isinstance(value, bool | int | float) and 0 <= value <= 1,
                "flag": isinstance(value, bool),
                "word": type(value) in (str, int) and value in parameter.words,
            }
            read = value if is_right[parameter.kind] else None
        return self._wrong(place, parameter.expected(), value) if read is None else read


def _drawn(parameter: Parameter, value: Any) -> Any:
    """Returns a number, a tuple for a range, or a list for a choice; None for what is none of them."""
    named, ends = _as_dict(value), _as_list(value)
    choices = _as_list(named["choice"]) if named is not None and set(named) == {"choice"} else None
    numbers = choices or ends or [value]
    types = int if parameter.kind == "integer" else int | float
    if not all(isinstance(one, types) and not isinstance(one, bool) for one in numbers):
        return None
    if not all(parameter.low <= one <= parameter.high for one in numbers):
        return None
    if ends is None:
        return choices or value
    return tuple(ends) if len(ends) == 2 and ends[0] <= ends[1] else None


def _as_list(value: Any) -> list[Any] | None:
    return list(cast("Sequence[Any]", value)) if isinstance(value, list | tuple) else None


def _as_dict(value: Any) -> dict[Any, Any] | None:
    return cast("dict[Any, Any]", value) if isinstance(value, dict) else None


def walk(operations: Sequence[Operation]) -> Iterator[Operation]:
    """Yields operations and all below them."""
    for operation in operations:
        yield operation
        for children in operation.children.values():
            yield from walk(children)


def _operation_schema() -> dict[str, Any]:
    """Returns the JSON schema of an operation, for editors: names and parameters; values are judged by the parser."""
    named = {
        name: {"type": ["object", "array", "number", "boolean"], "description": ", ".join(kind.parameters) or "nothing"}
        for name, kind in AUGMENTERS.items()
    }
    one = {"type": "object", "properties": named, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"type": "string", "enum": [*AUGMENTERS, *NAMED_SETS]}, one]}


class AugmentConfig(Section):
    """Random changes of training images: the single fields first, then `operations`, then `auto`."""

    sometimes: Fraction = Field(
        default=0.8, description="share of images that the single fields (flip_horizontal to blur_sigma_px) change"
    )
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
    operations: tuple[Any, ...] = Field(
        default=(),
        description="imgaug's augmenters by name, with their parameters, nested: see reference/augmentation.md; "
        "original: what the original stack trained with",
        json_schema_extra=cast("dict[str, Any]", {"items": _operation_schema()}),
    )
    auto: Literal["none", "light", "medium", "strong"] = Field(
        default="none", description="some of twelve changes for each image, drawn anew, after RandAugment"
    )
    engine: Literal["imgaug", "fused"] = Field(
        default="imgaug",
        description="fused: OpenCV, all of an image's geometry in one interpolation; many times faster, and of the "
        "operations it has the common ones",
    )

    @model_validator(mode="after")
    def _check_operations(self) -> Self:
        operations = parse_operations(self.operations) if self.operations else ()
        slow = sorted({one.name for one in walk(operations) if not AUGMENTERS[one.name].is_fused})
        if slow and self.engine == "fused":
            raise ValueError(
                f"operations: expected what engine: fused has, too; received {', '.join(slow)}. Take engine: imgaug, "
                "or leave them out"
            )
        return self
