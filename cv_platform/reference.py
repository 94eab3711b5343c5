"""Writes what may be configured and typed from the code that reads it, so that documents cannot say anything else.

`docs/reference/configuration.md` and `.env.example` come from the fields of `ExperimentConfig` and `Settings`,
`docs/reference/commands.md` from the parser of `cv-platform`, the table of `docs/reference/augmentation.md` from the
augmenters that may be named; `make reference` writes them, `make check` compares.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from cv_platform.config import json_schema
from cv_platform.config.augmentation import AUGMENTERS
from cv_platform.settings import Settings

_WRITTEN = "<!-- Written by `make reference` from {source}: change it there. -->"
_KINDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false", "array": "list"}


def configuration_page() -> str:
    """Returns the page of every field of an experiment and every variable of an installation, as Markdown."""
    schema = json_schema()
    lines = [
        _WRITTEN.format(source="`cv_platform/config/` and `cv_platform/settings.py`"),
        "# Configuration",
        "",
        "An experiment is a YAML file in `configs/`; an installation is configured by variables of the environment.",
        "Editors complete the YAML by `configs/schema.json`; `cv-platform validate-config configs` lists every mistake",
        "with its place. A section that is left out has its defaults.",
        "",
        "## The experiment",
        "",
        *_table("field", _rows(schema["properties"], schema, "", into=False)),
    ]
    for name, field in schema["properties"].items():
        if "$ref" in field:
            section = _resolved(field, schema)
            rows = _rows(section["properties"], schema, "", into=True)
            lines += ["", f"### `{name}`", "", _joined(section["description"]), "", *_table("field", rows)]
    lines += [
        "",
        "## The installation",
        "",
        "Every variable is optional; one that is set to nothing counts as not set. `.env.example` has all of them, to",
        "copy. The stack in containers reads `docker/.env` instead, see [the stack](../how-to/stack.md).",
        "",
        *_table("variable", _rows(_variables(), {}, "", into=False)),
    ]
    return "\n".join(lines) + "\n"


def environment_example() -> str:
    """Returns `.env.example`: a comment for each variable, and the variable itself, commented out."""
    lines = [
        "# Copy to .env and `set -a; source .env` before the commands; nothing is needed for a local installation.",
        "# Written by `make reference` from cv_platform/settings.py: change it there.",
    ]
    for name, field in _variables().items():
        value = (field.get("examples") or [field.get("default")])[0]
        lines += ["", *textwrap.wrap(field["description"], 118, initial_indent="# ", subsequent_indent="# ")]
        lines.append(f"#{name}={'' if value in (None, []) else value}")
    return "\n".join(lines) + "\n"


def commands_page(parser: argparse.ArgumentParser) -> str:
    """Returns the page of every command of `parser` and its arguments, as Markdown."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    lines = [
        _WRITTEN.format(source="`cv_platform/cli.py`"),
        "# Commands",
        "",
        "`.venv/bin/cv-platform …`, after `make setup`.",
    ]
    for name, command in commands.choices.items():
        lines += ["", f"## `{name}`", "", _sentence(command.description or "")]
        rows = [
            (
                f"`{', '.join(action.option_strings) or action.dest}`",
                _sentence(action.help or "", choices=action.choices),
            )
            for action in command._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        if rows:
            lines += ["", "| argument | |", "|---|---|", *(f"| {first} | {second} |" for first, second in rows)]
    return "\n".join(lines) + "\n"


def augmentation_page() -> str:
    """Returns the page of what `train.augment.operations` may name, as Markdown."""
    lines = [
        _WRITTEN.format(source="`cv_platform/config/augmentation.py` and `cv_platform/reference.py`"),
        "# Augmentation",
        "",
        _AUGMENTATION,
        "| augmenter | parameters | `engine: fused` |",
        "|---|---|---|",
    ]
    for name, kind in AUGMENTERS.items():
        named = "; ".join(f"`{key}`: {parameter.expected()}" for key, parameter in kind.parameters.items())
        lines.append(f"| `{name}` | {named or '–'} | {'yes' if kind.is_fused else '–'} |")
    return "\n".join(lines) + "\n"


_AUGMENTATION = """`train.augment` says how training images are changed at random, anew in each epoch. It has three
parts, which follow each other: the single fields (`flip_horizontal` to `blur_sigma_px`, for a share `sometimes` of the
images); `operations`, which are imgaug's by
[their names](https://imgaug.readthedocs.io/en/latest/source/overview_of_augmenters.html); and `auto: light`, `medium`
or `strong`, which draws one, two or three of twelve changes for each image, after RandAugment. The asset `model` shows
what comes out: `augmented_images.png` in its metadata.

```yaml
train:
  augment:
    engine: fused
    operations:
      - Fliplr: 0.5
      - Sometimes:
          p: 0.8
          then_list:
            - Affine: {rotate: [-20, 20], scale: {x: [0.8, 1.2], y: [0.8, 1.2]}, mode: edge}
            - OneOf:
                - GaussianBlur: {sigma: [0, 1.5]}
                - AdditiveGaussianNoise: {scale: [0, 12], per_channel: true}
      - SomeOf:
          n: [0, 2]
          random_order: true
          children: [{Multiply: [0.8, 1.2]}, Grayscale, {Posterize: {choice: [4, 6]}}]
```

A value is a number; `[a, b]`, drawn from a to b for each image (imgaug's tuple); or `{choice: [a, b, c]}`, one of them
(imgaug's list). The first parameter may be given without its name; what is not given is imgaug's default. In the place
of an operation, `original` is what the original stack trained with; it mirrors every image that it touches. Only what
the table names can be named.

`engine: imgaug` is imgaug itself. `engine: fused` is OpenCV: several times faster, and the same meaning (tests compare
the two), but all adjacent geometry is one interpolation: nothing is blurred twice, and what one operation pushes out of
the frame and the next one back is still there. The grey level of its borders is drawn for a batch, not for an image,
and crops are interpolated linearly.

Batches are made by several threads. Only `train.seed`, the epoch and the batch's place in it decide what is drawn: the
same training has the same images, however many threads there are, also after it was killed and has gone on.
"""


def _variables() -> dict[str, Any]:
    return Settings.model_json_schema()["properties"]


def _table(first: str, rows: Iterator[tuple[str, str, str, str]]) -> list[str]:
    return [f"| {first} | value | default | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def _rows(
    properties: Mapping[str, Any], schema: Mapping[str, Any], prefix: str, *, into: bool
) -> Iterator[tuple[str, str, str, str]]:
    """Yields name, kind, default and description of each field; with `into`, those of the sections in it."""
    for name, field in properties.items():
        if "$ref" not in field:
            default = _shown(field["default"]) if "default" in field else ""
            yield f"`{prefix}{name}`", _kind(field), default, _sentence(field["description"])
        elif into:
            yield from _rows(_resolved(field, schema)["properties"], schema, f"{prefix}{name}.", into=True)
        else:
            yield f"[`{name}`](#{name})", "section", "", _sentence(field["description"])


def _resolved(field: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    return schema["$defs"][field["$ref"].rpartition("/")[2]]


def _kind(field: Mapping[str, Any]) -> str:
    """Says in words what a field takes."""
    if "anyOf" in field:
        return next(_kind(one) for one in field["anyOf"] if one.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_number(field[name])}" for name, sign in signs.items() if name in field]
    return ", ".join([_KINDS.get(field["type"], "mapping"), *bounds])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else f"{value:g}"


def _shown(value: object) -> str:
    if value in (None, "", [], {}):
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number(value)
    return ", ".join(f"`{one}`" for one in (value if isinstance(value, list) else [value]))


def _sentence(text: str, *, choices: Any = None) -> str:
    text = _joined(text).replace("|", r"\|")
    if choices:
        text = "; ".join(part for part in (text, "one of " + ", ".join(f"`{choice}`" for choice in choices)) if part)
    if text.partition(" ")[0].isalpha():  # No name, which is written as it is.
        text = text[0].upper() + text[1:]
    return text if text.endswith(".") or not text else f"{text}."


def _joined(text: str) -> str:
    return " ".join(text.split())
