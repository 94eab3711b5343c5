"""`cv-platform labels …`: the labelling queue for other tools, and their labels back."""

from __future__ import annotations

import argparse
import getpass
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cv_platform.config import load_experiment
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import write_file
from cv_platform.settings import Settings

if TYPE_CHECKING:
    from sqlalchemy import Engine

AddCommand = Callable[[str, object, str], argparse.ArgumentParser]


def add_commands(command: AddCommand) -> None:
    """Adds the command; `command` makes one of its name, function and description."""
    labels = command("labels", _labels, "write the labelling queue for another tool, or read its labels")
    labels.add_argument("action", choices=["export", "import"])
    labels.add_argument("config", type=Path, help="a YAML file, such as configs/digits.yaml")
    labels.add_argument("file", type=Path, help="a .json (Label Studio) or a .csv: written, or read")
    labels.add_argument("--labeller", help="of import: whose labels they are where the file does not say it")


def _labels(options: argparse.Namespace) -> int:
    return _export(options) if options.action == "export" else _import(options)


def _export(options: argparse.Namespace) -> int:
    from cv_platform.monitoring.label_exchange import label_studio_config, read_queue, write_csv, write_tasks

    experiment = load_experiment(options.config)
    if options.file.suffix.lower() not in {".json", ".csv"}:
        raise InvalidDatasetError(f"Expected a file that ends with .json or .csv. Received: {options.file.name}.")
    with log_engine() as engine:
        queue = read_queue(engine, experiment.name)
        is_json = options.file.suffix.lower() == ".json"
        write_file(options.file, write_tasks(engine, queue, experiment.model) if is_json else write_csv(queue))
    print(f"{options.file}: {len(queue)} images that nobody has labelled")
    if is_json:
        print(f"The labelling interface of the project:\n{label_studio_config(experiment.model)}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from cv_platform.monitoring.label_exchange import import_labels, read_labels_file

    experiment = load_experiment(options.config)
    labeller = options.labeller or getpass.getuser()
    if re.fullmatch(r"[A-Za-z0-9_.@-]{1,40}", labeller) is None:
        raise InvalidDatasetError(f"Expected a labeller's name of letters and digits. Received: {labeller!r}.")
    try:
        content = options.file.read_bytes()
    except OSError as err:
        raise InvalidDatasetError(f"Expected labels at {options.file}. Received: {err}. Correct the path.") from err
    labels = read_labels_file(content, experiment.model, labeller=labeller)
    with log_engine() as engine:
        done = import_labels(engine, experiment, labels)
    print(f"{done.added} labels added, {done.known} were known.")
    if done.gone:
        shown = ", ".join(map(str, done.gone[:10]))
        print(f"Left out: {len(done.gone)} on predictions that the log does not have (any more), such as {shown}")
    return 0


@contextmanager
def log_engine() -> Iterator[Engine]:
    """Connects to the request log of this installation, whose schema has to be the one of this release."""
    """Yields an engine on the request log's database, which runs meanwhile.

    Raises:
        SchemaMismatchError: it has the tables of another version.
        ServiceError: the embedded PostgreSQL does not start.
    """
    from cv_platform.database.connection import database_url, make_engine
    from cv_platform.database.migrate import check_schema

    with database_url(Settings.from_environment()) as url:
        check_schema(url)
        engine = make_engine(url)
        try:
            yield engine
        finally:
            engine.dispose()
