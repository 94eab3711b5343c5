"""Reads experiments from YAML, and says of every mistake where it is and what was expected."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from cv_platform.config.experiment import ExperimentConfig
from cv_platform.errors import ConfigError


class _OddInteger(int):
    """A whole number whose text in YAML was another one: `010` is 8, and `1:30` is 90."""

    text: str


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
            "configs/examples/photos.yaml; configs/schema.json describes every field."
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
    if error["type"] == "value_error" and "received" in error["msg"].lower():
        return f"  {place}: {error['msg'].removeprefix('Value error, ')}"
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
