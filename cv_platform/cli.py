"""`cv-platform …`: the commands around the graph. Drives Dagster by its own CLI and imports none of it."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cv_platform.config import json_schema, load_experiment
from cv_platform.errors import CvPlatformError
from cv_platform.settings import Settings, silence_telemetry


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; errors of the platform are shown without a traceback."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("cv_platform").setLevel(logging.INFO)
    silence_telemetry()
    try:
        return options.command(options)
    except CvPlatformError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cv-platform", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        return sub

    command("demo", _demo, "run the digits experiment from data to a drift report on shifted images, and end")
    run = command("run", _run, "materialise one experiment: one config, one command")
    run.add_argument("config", type=Path, help="a YAML file, such as configs/digits.yaml")
    command("up", _up, "start Dagster, MLflow, Evidently, PostgreSQL and the service, and stay")
    command("down", _down, "stop what `up` started")
    command("status", _status, "show the processes of `up`")
    command("migrate", _migrate, "bring the request log's schema up to date")
    schema = command("schema", _schema, "print the JSON schema of configs/*.yaml")
    schema.add_argument("--write", type=Path, help="write it to this file instead")
    validate = command("validate-config", _validate_config, "check configs without running anything")
    validate.add_argument("configs", type=Path, nargs="+")
    dataset = command("import-dataset", _import_dataset, "put a folder or archive of images under DVC, with a tag")
    dataset.add_argument(
        "source", type=Path, help="folder, .zip or .tar(.gz): class folders, split/class folders, or a CSV"
    )
    dataset.add_argument("--name", required=True, help="dataset.ds_name in the config")
    dataset.add_argument("--tag", required=True, help="dataset.dvc_tag in the config, such as v1.0.0")
    dataset.add_argument("--annotations", type=Path, help="CSV with path, split and label or one column per class")
    dataset.add_argument("--root", type=Path, help="folder of dataset repositories (default: $CV_HOME/datasets)")
    database = command("database", _database, "run the embedded PostgreSQL in the foreground, or print its URL")
    database.add_argument("action", choices=["run", "url"])
    return parser


def _demo(_: argparse.Namespace) -> int:
    from cv_platform.demo import run_demo

    return run_demo(Settings.from_environment(), say=lambda line: print(line, flush=True))


def _run(options: argparse.Namespace) -> int:
    from cv_platform.stack.environment import platform_environment, prepare_home
    from cv_platform.stack.graph import materialize

    experiment = load_experiment(options.config)
    settings = Settings.from_environment().model_copy(update={"configs": options.config.absolute()})
    prepare_home(settings)
    log = settings.home / "logs" / f"run-{experiment.name}.log"
    print(f"{experiment.name}: log in {log}", flush=True)
    materialize(
        f"key:{experiment.name}/*",
        platform_environment(settings),
        log=log,
        say=lambda line: print(line, flush=True),
    )
    records = settings.home / "records" / experiment.name
    evaluation = json.loads((records / "evaluation.json").read_text(encoding="utf-8"))
    print(f"  evaluation: {'; '.join(evaluation['reasons'])}")
    print(f"  deployment: {json.loads((records / 'deployment.json').read_text(encoding='utf-8'))['message']}")
    return 0


def _up(_: argparse.Namespace) -> int:
    from cv_platform.stack.supervisor import start_stack

    settings = Settings.from_environment()
    print("Starting; the first time takes up to two minutes.", flush=True)
    for program in start_stack(settings):
        if program.port is not None:
            print(f"  http://127.0.0.1:{program.port:<6} {program.title}")
    print(f"Logs: {settings.home / 'logs'}. `make status` shows the processes, `make down` stops them.")
    return 0


def _down(_: argparse.Namespace) -> int:
    from cv_platform.stack.supervisor import stop_stack

    print("Stopped." if stop_stack(Settings.from_environment()) else "Nothing was running.")
    return 0


def _status(_: argparse.Namespace) -> int:
    from cv_platform.stack.supervisor import control, is_running

    settings = Settings.from_environment()
    if not is_running(settings):
        print("Not running. `make up` starts it.")
        return 3
    print(control(settings, "status"))
    return 0


def _migrate(_: argparse.Namespace) -> int:
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    with database_url(Settings.from_environment()) as url:
        migrate(url)
    print("The request log's schema is up to date.")
    return 0


def _schema(options: argparse.Namespace) -> int:
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def _validate_config(options: argparse.Namespace) -> int:
    failures = 0
    for path in options.configs:
        try:
            experiment = load_experiment(path)
        except CvPlatformError as err:
            failures += 1
            print(f"error: {err}", file=sys.stderr)
        else:
            print(f"{path}: experiment {experiment.name}, {len(experiment.model.classes)} classes")
    return 1 if failures else 0


def _import_dataset(options: argparse.Namespace) -> int:
    from cv_platform.datasets.importing import import_dataset

    root = options.root or Settings.from_environment().home / "datasets"
    imported = import_dataset(
        options.source, ds_name=options.name, tag=options.tag, ds_root=root, annotations=options.annotations
    )
    print(f"{imported.ds_name} {imported.tag}: DVC md5 {imported.dvc_md5}, in {imported.directory}")
    print(f"classes: {json.dumps(list(imported.class_names), ensure_ascii=False)}")
    print(f"images: {json.dumps(imported.counts, ensure_ascii=False)}")
    print(
        f"In the config: dataset: {{ds_name: {imported.ds_name}, dvc_tag: {imported.tag}}}, and model.classes as above."
    )
    return 0


def _database(options: argparse.Namespace) -> int:
    from cv_platform.database.embedded import existing_url, run_in_foreground

    settings = Settings.from_environment()
    if options.action == "run":
        return run_in_foreground(settings.home, settings.postgres_port)
    url = existing_url(settings.home)
    if url is None:
        print("The embedded PostgreSQL does not run. `make up` starts it.", file=sys.stderr)
        return 3
    print(url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
