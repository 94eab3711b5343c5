"""`cv-platform dataset …`: the commands around a dataset's versions that need no graph."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cv_platform.config import load_experiment
from cv_platform.errors import InvalidDatasetError
from cv_platform.files import write_file
from cv_platform.settings import Settings

if TYPE_CHECKING:
    from cv_platform.datasets.repository import StoredVersion

AddCommand = Callable[[str, object, str], argparse.ArgumentParser]


def add_commands(command: AddCommand) -> None:
    """Adds the commands; `command` makes one of its name, function and description."""
    dataset = command("dataset", _dataset, "list, tell apart or push a dataset's versions, or grow one by its labels")
    dataset.add_argument("action", choices=["versions", "diff", "push", "grow"])
    dataset.add_argument("name", help="dataset.ds_name in the config; of grow: the config, such as configs/digits.yaml")
    dataset.add_argument("tags", nargs="*", help="of diff: the two versions; of push: those to send (default: all)")
    dataset.add_argument("--root", type=Path, help="folder of dataset repositories (default: $CV_HOME/datasets)")
    dataset.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of diff: write differences.csv and contact_sheet.png there"
    )
    dataset.add_argument(
        "--sample-bits",
        type=int,
        choices=range(9, 17),
        metavar="BITS",
        help="of diff: the config's model.sample_bits, 9 to 16, by which contact_sheet.png is drawn",
    )
    dataset.add_argument(
        "--tag", help="of grow: the new version's (default: the old one's, with a suffix that follows from it)"
    )
    dataset.add_argument("--dry-run", action="store_true", help="of grow: say what would be, and store nothing")
    dataset.add_argument(
        "--trust", action="append", default=[], metavar="SOURCE", help="of grow: take labels that contradict the images"
    )
    dataset.add_argument(
        "--without", action="append", default=[], metavar="SOURCE", help="of grow: leave the labels of somebody out"
    )
    validate = command("validate", _validate, "judge an experiment's dataset without Dagster, and write the report")
    validate.add_argument("config", type=Path, help="a YAML file, such as configs/digits.yaml")
    similar = command("find-similar", _find_similar, "list the images of a dataset that look most like a file")
    similar.add_argument("image", type=Path, help="the file")
    similar.add_argument("config", type=Path, help="the experiment whose dataset is searched")
    similar.add_argument("--count", type=int, default=10, help="how many (default: 10)")
    embedding_map = command("map", _map, "write a page with a map of a dataset: what looks alike lies close together")
    embedding_map.add_argument("config", type=Path, help="the experiment whose dataset is shown")
    embedding_map.add_argument("--output", type=Path, default=Path("map.html"), help="the page (default: map.html)")
    relabel = command("relabel", _relabel, "make a new dataset version of reviewed labels")
    relabel.add_argument("config", type=Path, help="the experiment whose dataset was reviewed")
    relabel.add_argument("--from", dest="review", type=Path, required=True, help="reviewed.csv of label_issues.html")
    relabel.add_argument(
        "--tag", help="of the new version (default: the old one's, with a suffix that follows from it)"
    )


def _validate(options: argparse.Namespace) -> int:
    from cv_platform.datasets.embeddings import embed_dataset
    from cv_platform.datasets.versions import checkout_version
    from cv_platform.validation.validate import validate_dataset

    experiment, settings = load_experiment(options.config), Settings.from_environment()
    home = settings.home
    version = checkout_version(experiment.dataset, experiment.model, home=home)
    verdict = validate_dataset(
        version,
        experiment.validation,
        class_names=experiment.model.classes,
        classifier_type=experiment.model.classifier_type,
        home=home,
        embeddings=embed_dataset(version, experiment.encoder, home=home, spare_bytes=settings.spare_disk_bytes),
    )
    for outcome in verdict.outcomes:
        state = "passed" if outcome.passed else "FAILED" if outcome.severity == "error" else "warning"
        print(f"{state:<8} {outcome.name}: {outcome.finding()}")
    for page in sorted(verdict.directory.glob("*.html")):
        print(page)
    return 0 if verdict.passed else 1


def _find_similar(options: argparse.Namespace) -> int:
    from cv_platform.datasets.similar import find_similar
    from cv_platform.datasets.versions import checkout_version

    experiment, home = load_experiment(options.config), Settings.from_environment().home
    version = checkout_version(experiment.dataset, experiment.model, home=home)
    found = find_similar(options.image, version, experiment.encoder, home=home, count=max(1, options.count))
    print_table(
        [
            {"similarity": f"{one.similarity:.3f}", "label": one.label, "split": one.split, "path": one.path}
            for one in found
        ]
    )
    print(f"in {version.directory}")
    return 0


def _map(options: argparse.Namespace) -> int:
    from cv_platform.datasets.embeddings import embed_dataset
    from cv_platform.datasets.versions import checkout_version
    from cv_platform.validation.embedding_map import write_embedding_map

    experiment, home = load_experiment(options.config), Settings.from_environment().home
    version = checkout_version(experiment.dataset, experiment.model, home=home)
    embeddings = embed_dataset(version, experiment.encoder, home=home)
    print(f"{options.output}: {write_embedding_map(version, embeddings, options.output)} images")
    return 0


def _relabel(options: argparse.Namespace) -> int:
    from cv_platform.datasets.relabelling import read_review, relabel
    from cv_platform.datasets.versions import open_repository

    experiment, home = load_experiment(options.config), Settings.from_environment().home
    try:
        review = options.review.read_bytes()
    except OSError as err:
        raise InvalidDatasetError(f"Expected a review at {options.review}. Received: {err}. Correct the path.") from err
    model, dataset = experiment.model, experiment.dataset
    decisions = read_review(review, model.classes, model.classifier_type)
    repository = open_repository(dataset, home=home)
    made = relabel(repository, dataset.dvc_tag, review, decisions, home=home, new_tag=options.tag)
    for line in made.summary:
        print(line)
    if made.version == made.base:
        print(f"{dataset.ds_name} {dataset.dvc_tag} has these labels already: there is no new version.")
    else:
        print_new_version(made.version, dataset.ds_name)
    return 0


def _dataset(options: argparse.Namespace) -> int:
    from cv_platform.datasets.versions import repository_of

    if options.action == "grow":
        return _grow(options)
    home = Settings.from_environment().home
    repository = repository_of(options.name, root=options.root or home / "datasets")
    match options.action:
        case "versions":
            return _versions(repository)
        case "push":
            return _push(repository, options.tags)
    return _diff(repository, options, home)


def _grow(options: argparse.Namespace) -> int:
    from cv_platform.database.connection import database_url, make_engine
    from cv_platform.database.migrate import check_schema
    from cv_platform.monitoring.growth import GrowthRules, grow_dataset

    experiment, settings = load_experiment(Path(options.name)), Settings.from_environment()
    dataset = experiment.dataset
    rules = GrowthRules(options.tag, tuple(options.trust), tuple(options.without), options.dry_run)
    with database_url(settings) as url:
        check_schema(url)
        engine = make_engine(url)
        try:
            made = grow_dataset(experiment, engine, rules, home=settings.home, spare_bytes=settings.spare_disk_bytes)
        finally:
            engine.dispose()
    for line in made.summary:
        print(line)
    if made.version is None:
        print("Nothing was stored.")
    elif made.version == made.base:
        print(f"{dataset.ds_name} {dataset.dvc_tag} has these labels already: there is no new version.")
    else:
        print_new_version(made.version, dataset.ds_name)
    return 0


def print_new_version(version: StoredVersion, ds_name: str) -> None:
    """Prints what there is now, and what to write into the config."""
    print(f"{ds_name} {version.tag}: DVC md5 {version.dvc_md5}")
    print(f"In the config:\ndataset:\n  dvc_tag: {json.dumps(version.tag)}")


def _versions(repository: Path) -> int:
    from cv_platform.datasets.repository import summarise_versions

    for version in summarise_versions(repository):
        size = f"{version.files:>9,} files  {version.bytes / 1e6:>10,.1f} MB" if version.bytes and version.files else ""
        print(f"{version.tag:<20}  {version.dvc_md5}  {size}  {version.made}  {version.message}")
    return 0


def _push(repository: Path, tags: Sequence[str]) -> int:
    from cv_platform.datasets.dvc_store import push_images
    from cv_platform.datasets.repository import list_versions, read_version

    versions = [read_version(repository, tag) for tag in tags] or list(list_versions(repository).values())
    sent = push_images(versions, repository=repository)
    print(f"{sent} files were sent to DVC's remote; it has the images of {', '.join(one.tag for one in versions)}.")
    print("git carries the versions themselves: git push --tags")
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
        write_file(options.output / "contact_sheet.png", difference.draw(options.sample_bits))
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
