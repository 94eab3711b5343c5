"""Writes what may be configured and typed from the code that reads it, so that documents cannot say anything else.

`docs/reference/configuration.md` and `.env.example` come from the fields of `ExperimentConfig` and `Settings`,
`docs/reference/commands.md` from the parser of `cv-platform`; `make reference` writes them, `make check` compares.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from cv_platform.config import json_schema
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
