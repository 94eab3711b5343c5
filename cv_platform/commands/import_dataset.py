"""`cv-platform import-dataset`: images become a dataset version and, where it is asked, an experiment's config."""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cv_platform.config import parse_experiment
from cv_platform.errors import ConfigError
from cv_platform.files import write_file
from cv_platform.settings import Settings

if TYPE_CHECKING:
    from cv_platform.datasets.importing import ImportedDataset

EXAMPLE = Path(__file__).resolve().parents[2] / "configs" / "examples" / "photos.yaml"


def add_command(command: Callable[[str, object, str], argparse.ArgumentParser]) -> None:
    """Adds the command; `command` makes one of its name, function and description."""
    dataset = command("import-dataset", _import_dataset, "put a folder or archive of images under DVC, with a tag")
    dataset.add_argument(
        "source", type=Path, help="folder, .zip, .tar(.gz) or .parquet; docs/reference/import.md has the layouts"
    )
    dataset.add_argument("--name", required=True, help="dataset.ds_name in the config")
    dataset.add_argument("--tag", required=True, help="dataset.dvc_tag in the config, such as v1.0.0")
    dataset.add_argument(
        "--config", type=Path, metavar="FILE", help="write a config for these images, such as configs/animals.yaml"
    )
    dataset.add_argument(
        "--annotations", type=Path, help="a label file elsewhere: CSV, JSON lines, or a labelling tool's export"
    )
    dataset.add_argument("--classes", help="the columns, labels or folders that are classes, joined by commas")
    dataset.add_argument(
        "--group",
        metavar="COLUMN",
        help="what splits never divide, such as a patient (default: the column group, if any)",
    )
    dataset.add_argument(
        "--unknown",
        choices=["negative", "ignore"],
        help="what blank and -1 mean in a class's column: no (the default), or that nobody knows (ignore), so that "
        "loss and metrics leave the label out",
    )
    dataset.add_argument("--use-valid-as-test", action="store_true", help="where there is train and valid, but no test")
    dataset.add_argument("--zip-encoding", metavar="NAME", help="of a zip's file names, such as gbk, cp932 or cp437")
    dataset.add_argument(
        "--max-left-out",
        type=_fraction,
        default=0.1,
        metavar="FRACTION",
        help="of files that are no images (default: 0.1)",
    )
    dataset.add_argument(
        "--link",
        action="store_true",
        help="leave the images of a folder where they are; DVC keeps their sha256, and a change is an error",
    )
    dataset.add_argument(
        "--tar-above",
        type=_count,
        metavar="IMAGES",
        help="a version of more images is stored as tars of 10,000 (default: as said last for the dataset, else 50000)",
    )
    dataset.add_argument("--root", type=Path, help="folder of dataset repositories (default: $CV_HOME/datasets)")


def _fraction(text: str) -> float:
    number = float(text)
    if not 0.0 <= number <= 1.0:  # Also of nan.
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, received {text}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number of images, 0 or more, received {text}")
    return number


def _import_dataset(options: argparse.Namespace) -> int:
    from cv_platform.datasets.importing import ImportRules, import_dataset
    from cv_platform.maintenance.moved_home import settle_home

    settings = Settings.from_environment()
    settle_home(settings)
    if options.config and options.config.exists():
        raise ConfigError(
            f"Expected no file at {options.config}, which is to be written. Received: one. Name another, or leave "
            "--config out and paste what the import prints."
        )
    if options.config:
        new_config({}, options.config)  # Its name is to be known as wrong before the work, not after it.
    default_root = settings.home / "datasets"
    root = options.root or default_root
    is_new = not root.expanduser().exists()
    rules = ImportRules(
        classes=tuple(next(csv.reader([options.classes], skipinitialspace=True))) if options.classes else None,
        group=options.group,
        unknown=options.unknown,
        use_valid_as_test=options.use_valid_as_test,
        zip_encoding=options.zip_encoding,
        max_left_out_fraction=options.max_left_out,
        links=options.link,
        tar_above=options.tar_above,
    )
    imported = import_dataset(
        options.source,
        ds_name=options.name,
        tag=options.tag,
        ds_root=root,
        annotations=options.annotations,
        rules=rules,
    )
    print(f"{imported.ds_name} {imported.tag}: DVC md5 {imported.dvc_md5}, in {imported.directory}")
    for line in imported.summary():
        print(f"  {line}")
    place = imported.directory.parent
    if is_new and place != default_root:
        print(f"{place} was made for it. Without --root, datasets lie in {default_root}.")
    fields = _fields(imported, None if place == default_root else place)
    if options.config:
        write_file(options.config, new_config(fields, options.config))
        print(f"{options.config} was written, after the example for photographs; every field can be changed.")
        print(f"Next: make run CONFIG={options.config}")
        return 0
    print("In the config:")
    for section, values in fields.items():
        print(f"{section}:")
        for name, value in values.items():
            print(f"  {name}: {value}")
    return 0


def _fields(imported: ImportedDataset, root: Path | None) -> dict[str, dict[str, str]]:
    """Returns what a config says of a dataset, by section and field, as YAML."""

    def quoted(value: object) -> str:
        # JSON is YAML in which nothing is taken for a number, a date or a truth value.
        return json.dumps(value, ensure_ascii=False)

    dataset = {"ds_name": quoted(imported.ds_name), "dvc_tag": quoted(imported.tag)}
    if root is not None:
        dataset["ds_root"] = quoted(str(root))
    model = {"classes": quoted(imported.class_names)}
    if imported.is_multi_label:
        model["classifier_type"] = quoted("multi-label")
    return {"dataset": dataset, "model": model}


def new_config(fields: dict[str, dict[str, str]], path: Path) -> str:
    """Returns the example for photographs as an experiment of these images, its comments included.

    Args:
        fields: what takes the place of the example's, by section and field, as YAML.
        path: where it will be; the experiment is named after it.

    Raises:
        ConfigError: the name does not do, or the example is not there.
    """
    try:
        example = EXAMPLE.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"Expected the example {EXAMPLE}. Received: {err}. Run it from a checkout.") from err
    name = path.stem
    schema, body = example.splitlines()[0], example[example.index("\nname: ") + 1 :]
    named = {
        "": {"name": name, "description": json.dumps(f"{name}, by a network that has learned from ImageNet.")},
        "model": {"model_name": f"{name}_classifier"},
        "deploy": {"service": name},
    }
    for section, values in [*named.items(), *fields.items()]:
        for field, value in values.items():
            body = _with(body, section, field, value)
    text = f"{schema}\n{body}"
    parse_experiment(yaml.safe_load(text), origin=str(path))
    return text


def _with(text: str, section: str, field: str, value: str) -> str:
    """Returns YAML with a section's field set (empty: at the top); one that is not there becomes the first."""
    indent = "  " if section else ""
    begin = text.index(f"\n{section}:\n") + len(section) + 3 if section else 0
    end = re.compile(r"^\S", re.MULTILINE).search(text, begin) if section else None
    part = text[begin : end.start() if end else len(text)]
    line = f"{indent}{field}: {value}\n"
    changed, count = re.subn(rf"^{indent}{field}: .*\n", lambda _: line, part, count=1, flags=re.MULTILINE)
    return text[:begin] + (changed if count else line + part) + text[begin + len(part) :]
