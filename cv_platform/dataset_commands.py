"""`cv-platform dataset …`: the commands around a dataset's versions that need no graph."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cv_platform.datasets.versions import repository_of
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import write_file
from cv_platform.settings import Settings

AddCommand = Callable[[str, object, str], argparse.ArgumentParser]


def add_commands(command: AddCommand) -> None:
    """Adds the commands; `command` makes one of its name, function and description."""
    dataset = command("dataset", _dataset, "list the versions of a dataset, or tell two apart")
    dataset.add_argument("action", choices=["versions", "diff"])
    dataset.add_argument("name", help="dataset.ds_name in the config")
    dataset.add_argument("tags", nargs="*", help="of diff: the two versions")
    dataset.add_argument("--root", type=Path, help="folder of dataset repositories (default: $CV_HOME/datasets)")
    dataset.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of diff: write differences.csv and contact_sheet.png there"
    )


def _dataset(options: argparse.Namespace) -> int:
    home = Settings.from_environment().home
    repository = repository_of(options.name, root=options.root or home / "datasets")
    return _versions(repository) if options.action == "versions" else _diff(repository, options, home)


def _versions(repository: Path) -> int:
    from cv_platform.datasets.repository import summarise_versions

    for version in summarise_versions(repository):
        size = f"{version.files:>9,} files  {version.bytes / 1e6:>10,.1f} MB" if version.bytes and version.files else ""
        print(f"{version.tag:<20}  {version.dvc_md5}  {size}  {version.made}  {version.message}")
    return 0


def _diff(repository: Path, options: argparse.Namespace, home: Path) -> int:
    from cv_platform.datasets.differences import compare_versions

    if len(options.tags) != 2:
        raise InvalidDatasetError(
            f"Expected two versions to tell apart. Received: {' '.join(options.tags) or 'none'}. "
            f"Run: cv-platform dataset versions {options.name}"
        )
    difference = compare_versions(repository, *options.tags, home=home)
    print(difference.summary())
    print_table(difference.by_class())
    if options.output:
        write_file(options.output / "differences.csv", difference.write_csv())
        write_file(options.output / "contact_sheet.png", difference.draw())
        print(f"Written: {options.output / 'differences.csv'}, {options.output / 'contact_sheet.png'}")
    return 0


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Prints rows with the keys of the first as columns; texts to the left, numbers to the right."""
    if not rows:
        return
    names = list(rows[0])
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in names}
    print("  " + "  ".join(_cell(name, widths[name], rows[0][name]) for name in names))
    for row in rows:
        print("  " + "  ".join(_cell(row[name], widths[name], row[name]) for name in names))


def _cell(shown: object, width: int, value: object) -> str:
    return f"{shown!s:<{width}}" if isinstance(value, str) else f"{shown!s:>{width}}"
