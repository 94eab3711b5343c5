"""`cv-platform …`: the commands around the graph. Drives Dagster by its own CLI and imports none of it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from cv_platform.config import config_files, json_schema, load_beside_others, load_experiments
from cv_platform.errors import ConfigError, CvPlatformError
from cv_platform.settings import Settings, overlooked_home, prepare_process

READER_GONE = 128 + 13
"""Exit status as of a program that SIGPIPE ends: `head` and the like have closed the pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status; errors of the platform are shown without a traceback.

    Nor is there one when whoever reads the output has read enough.
    """
    try:
        try:
            status = _run_command(arguments)
        except SystemExit as end:  # Of argparse, for --help.
            status = end
        # Here, where it can be answered: what fails when the interpreter ends is a complaint on stderr.
        print(end="", flush=True)
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if stream and _has_lost_its_reader(stream)]
        if not gone:
            raise
        # What is left in the buffers goes nowhere, instead of failing again at the end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in gone:
            os.dup2(nowhere, stream.fileno())
        return READER_GONE
    if isinstance(status, SystemExit):
        raise status
    return status


def _has_lost_its_reader(stream: TextIO) -> bool:
    pipe = select.poll()
    pipe.register(stream, 0)  # Errors are reported unasked.
    return any(event & select.POLLERR for _, event in pipe.poll(0))


def _run_command(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("cv_platform").setLevel(logging.INFO)
    prepare_process()
    if (other := overlooked_home()) is not None:
        print(f"note: {other} is not used. To use it: export CV_HOME={shlex.quote(str(other))}", file=sys.stderr)
    try:
        return options.command(options)
    except CvPlatformError as err:
        print("\n".join([f"error: {err}", *_notes(err)]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _notes(err: BaseException | None) -> Iterator[str]:
    """Yields the first lines of an error's notes, and of those that it comes from: which shard, on which machine."""
    while err is not None:
        yield from (f"  {note.splitlines()[0].rstrip(':')}" for note in getattr(err, "__notes__", ()))
        err = err.__cause__


def _parser() -> argparse.ArgumentParser:
    from cv_platform.commands import datasets as dataset_commands
    from cv_platform.commands import drift as drift_command
    from cv_platform.commands import import_dataset as import_command
    from cv_platform.commands import labels as label_commands
    from cv_platform.commands import predictions as prediction_commands
    from cv_platform.commands import score as score_command
    from cv_platform.commands import tune as tune_command
    from cv_platform.serving.log.rejected_entries import add_arguments

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
    reference = command("reference", _reference, "print a document that is written from the code")
    reference.add_argument("document", choices=["configuration", "environment", "commands", "augmentation"])
    reference.add_argument("--write", type=Path, help="write it to this file instead")
    validate = command("validate-config", _validate_config, "check configs without running anything")
    validate.add_argument("configs", type=Path, nargs="+", help="YAML files, or folders of them")
    import_command.add_command(command)
    dataset_commands.add_commands(command)
    drift_command.add_commands(command)
    label_commands.add_commands(command)
    prediction_commands.add_commands(command)
    tune_command.add_command(command)
    score_command.add_command(command)
    backup = command("backup", _backup, "write one verified archive of the embedded installation, while it works")
    backup.add_argument("--output", type=Path, default=Path("backups"), help="folder of the archive (default: backups)")
    restore = command("restore", _restore, "make CV_HOME what a backup holds; what was there is kept beside it")
    restore.add_argument("file", type=Path, help="an archive of `backup`")
    gc = command("gc", _gc, "list what is not needed any more, and with --apply delete it")
    gc.add_argument("--apply", action="store_true", help="delete it")
    predict = command("predict", _predict, "classify image files with a running service")
    predict.add_argument("files", type=Path, nargs="+", help="images, or folders of them")
    predict.add_argument("--url", help="the service (default: http://127.0.0.1:$CV_SERVICE_PORT); the key: CV_API_KEYS")
    predict.add_argument("--json", action="store_true", help="print one JSON object per file instead of a table")
    predict.add_argument(
        "--explain", choices=["jpeg", "png", "cam", "none"], default="none", help="shown by --json only (default: none)"
    )
    retention = command("retention", _retention, "delete what the request log has kept long enough, as every night")
    retention.add_argument("--dry-run", action="store_true", help="count it, and delete nothing")
    log = command("log", _log, "show the log entries that the database has refused, and put them back into the queue")
    log.add_argument("action", choices=["rejected"])
    add_arguments(log)
    rollback = command("rollback", _rollback, "make the service serve again what it served before")
    rollback.add_argument("--service", help="which one (default: CV_SERVICE)")
    rollback.add_argument(
        "--because", default="", metavar="WHY", help="kept in the pointer's history and the audit log"
    )
    promote = command("promote", _promote, "put a version into production, also one that its gate has refused")
    promote.add_argument("version", help="such as 20260131T060000Z-1f3c9a2e")
    promote.add_argument("--because", required=True, metavar="WHY", help="kept in the pointer's history and audit log")
    again = command("reproduce", _reproduce, "train a published version again, and compare weights and metrics")
    again.add_argument("version", help="such as 20260131T060000Z-1f3c9a2e")
    again.add_argument(
        "--other-code", action="store_true", help="train by the code and libraries that are here, whatever trained it"
    )
    command("audit", _audit, "show who did what to production, when and why: promotions, rollbacks, deletions")
    database = command("database", _database, "run the embedded PostgreSQL in the foreground, or print its URL")
    database.add_argument("action", choices=["run", "url"])
    return parser


def _installation() -> Settings:
    """Reads the settings, of an installation that names its folder: see `moved_home`."""
    from cv_platform.maintenance.moved_home import settle_home

    settings = Settings.from_environment()
    settle_home(settings)
    return settings


def _demo(_: argparse.Namespace) -> int:
    from cv_platform.demo import run_demo

    return run_demo(Settings.from_environment(), say=lambda line: print(line, flush=True))


def _run(options: argparse.Namespace) -> int:
    from cv_platform.deployment.rollout import require_service
    from cv_platform.local.environment import new_run_log, platform_environment, prepare_home
    from cv_platform.local.graph import materialize
    from cv_platform.storage import CentralStorage

    experiment = load_beside_others(options.config)
    settings = Settings.from_environment().model_copy(update={"configs": options.config.absolute()})
    require_service(experiment.deploy, experiment=experiment.name, storage=CentralStorage(settings.storage_url))
    prepare_home(settings)
    log = new_run_log(settings.home / "logs", experiment.name)
    print(f"{experiment.name}: log in {log}", flush=True)
    materialize(
        f"key:{experiment.name}/*",
        platform_environment(settings),
        log=log,
        say=lambda line: print(line, flush=True),
    )
    for line in _run_summary(settings.home, experiment.name):
        print(f"  {line}")
    return 0


def _run_summary(home: Path, experiment: str) -> list[str]:
    """Returns what a complete run of an experiment came to, by the records of its assets; a line each."""
    from cv_platform.record_store import RecordStore
    from cv_platform.records import Deployment, DriftReport, Evaluation

    records = RecordStore(home, experiment)
    evaluation, deployment = records.latest(Evaluation), records.latest(Deployment)
    lines = [f"evaluation: {'; '.join(evaluation.reasons)}"] if evaluation else []
    lines += [f"deployment: {deployment.message}"] if deployment else []
    if (report := records.latest(DriftReport)) and report.report_url:
        lines.append(f"drift report: {report.verdict} ({report.rows} requests); {report.report_url}")
    return lines


def _up(_: argparse.Namespace) -> int:
    from cv_platform.local.supervisor import start_stack

    settings = Settings.from_environment()
    print("Starting; the first time takes up to two minutes.", flush=True)
    for program in start_stack(settings):
        if program.port is not None:
            print(f"  http://127.0.0.1:{program.port:<6} {program.title}")
    print(f"Logs: {settings.home / 'logs'}. `make status` shows the processes, `make down` stops them.")
    return 0


def _down(_: argparse.Namespace) -> int:
    from cv_platform.local.supervisor import stop_stack

    print("Stopped." if stop_stack(Settings.from_environment()) else "Nothing was running.")
    return 0


def _status(_: argparse.Namespace) -> int:
    from cv_platform.local.supervisor import control, is_running

    settings = Settings.from_environment()
    if not is_running(settings):
        print("Not running. `make up` starts it.")
        return 3
    print(control(settings, "status"))
    return 0


def _migrate(_: argparse.Namespace) -> int:
    from cv_platform.database.connection import database_url
    from cv_platform.database.migrate import migrate

    with database_url(_installation()) as url:
        migrate(url)
    print("The request log's schema is up to date.")
    return 0


def _schema(options: argparse.Namespace) -> int:
    return _written(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", options.write)


def _reference(options: argparse.Namespace) -> int:
    from cv_platform.reference import augmentation_page, commands_page, configuration_page, environment_example

    if options.document == "commands":
        return _written(commands_page(_parser()), options.write)
    pages = {"configuration": configuration_page, "environment": environment_example, "augmentation": augmentation_page}
    return _written(pages[options.document](), options.write)


def _written(text: str, path: Path | None) -> int:
    if path:
        path.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def _validate_config(options: argparse.Namespace) -> int:
    errors: dict[str, None] = {}  # Ordered, and each once: files that contradict each other share theirs.
    for path in options.configs:
        if path.is_dir():
            files = config_files(path)
            experiments, broken = load_experiments(files)
            if not files:
                broken[path] = f"{path}: expected YAML files in this folder. Received: none. Name another, or a file."
        else:
            try:
                experiments, broken = {path: load_beside_others(path)}, {}
            except ConfigError as err:
                experiments, broken = {}, {path: str(err)}
        for file, experiment in experiments.items():
            print(f"{file}: experiment {experiment.name}, {len(experiment.model.classes)} classes")
        errors |= dict.fromkeys(broken.values())
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


def _backup(options: argparse.Namespace) -> int:
    from cv_platform.maintenance.backup import back_up

    backup = back_up(_installation(), options.output)
    rows = backup.contents.database.rows if backup.contents.database else {}
    print(f"{backup.path}: {backup.path.stat().st_size / 1e6:.1f} MB, read again and complete")
    print(f"  files: {', '.join(f'{part} {count}' for part, count in backup.contents.files.items())}")
    print(f"  rows: {', '.join(f'{table} {count}' for table, count in rows.items()) or 'none'}")
    for part in backup.contents.left_out:
        print(f"  not in it, as another server or folder holds it: {part}")
    return 0


def _restore(options: argparse.Namespace) -> int:
    from cv_platform.local.environment import HOME_FORMAT, prepare_home
    from cv_platform.maintenance.restore import restore

    settings = Settings.from_environment()
    restored = restore(options.file, settings.home, home_format=HOME_FORMAT, spare_bytes=settings.spare_disk_bytes)
    prepare_home(settings)
    print(f"{settings.home} is what {options.file} holds, of {restored.manifest.created_utc:%Y-%m-%d %H:%M} UTC.")
    if restored.previous is not None:
        print(f"What was there before: {restored.previous}. Remove it when you no longer need it.")
    for part in restored.contents.left_out:
        print(f"Not restored, as it was not in the backup: {part}")
    return 0


def _gc(options: argparse.Namespace) -> int:
    from cv_platform.local.environment import platform_environment
    from cv_platform.local.graph import unfinished_runs
    from cv_platform.maintenance.garbage import collect, find_garbage

    settings = _installation()
    runs = unfinished_runs(settings.dagster_home, platform_environment(settings))
    garbage = find_garbage(settings, unfinished_runs=runs)
    for item in garbage.items:
        print(f"{item.bytes:>15,}  {item.name}  ({item.reason})")
    for line in garbage.kept:
        print(f"kept: {line}")
    if options.apply:
        deleted = collect(settings, garbage)
        print(f"Deleted {len(deleted)} things, {sum(item.bytes for item in deleted):,} bytes.")
    else:
        total = sum(item.bytes for item in garbage.items)
        print(f"{len(garbage.items)} things, {total:,} bytes. Nothing was deleted; --apply (make gc APPLY=1) does.")
    return 0


def _predict(options: argparse.Namespace) -> int:
    from cv_platform.client import ClientError
    from cv_platform.commands.predict_files import show_predictions
    from cv_platform.errors import ServiceError

    try:
        failures = show_predictions(
            Settings.from_environment(),
            options.files,
            url=options.url,
            as_json=options.json,
            explain=options.explain,
            say=lambda line: print(line, flush=True),
            complain=lambda line: print(line, file=sys.stderr),
        )
    except ClientError as err:
        raise ServiceError(str(err)) from err
    if failures:
        print(f"error: {failures} {'file has' if failures == 1 else 'files have'} no prediction.", file=sys.stderr)
    return 1 if failures else 0


def _retention(options: argparse.Namespace) -> int:
    from datetime import UTC, datetime

    from cv_platform.database.connection import database_url, make_engine
    from cv_platform.database.migrate import check_schema
    from cv_platform.monitoring.log_retention import expire_log

    settings = _installation()
    experiments, broken = load_experiments(config_files(settings.configs))
    for error in dict.fromkeys(broken.values()):
        print(f"error: {error}", file=sys.stderr)
    names = ", ".join(path.name for path in broken)
    if broken and not options.dry_run:
        raise ConfigError(
            "Expected configs that can be loaded, as their monitors say which requests are still needed. "
            f"Received: {names}. Nothing was deleted: correct them, or take them out of {settings.configs}."
        )
    with database_url(settings) as url:
        check_schema(url)
        engine = make_engine(url)
        try:
            result = expire_log(engine, experiments.values(), settings, datetime.now(UTC), is_dry_run=options.dry_run)
        finally:
            engine.dispose()
    print(result.summary())
    if broken:
        print(
            f"error: {names} cannot be loaded, and their monitors may keep more than was counted here. "
            "Until they can, nothing is deleted.",
            file=sys.stderr,
        )
    return 1 if broken else 0


def _log(options: argparse.Namespace) -> int:
    from cv_platform.serving.log.rejected_entries import show_rejected

    show_rejected(Settings.from_environment(), requeue_ids=options.requeue, say=lambda line: print(line, flush=True))
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from cv_platform.audit import Note, this_user
    from cv_platform.deployment.rollout import rollback
    from cv_platform.storage import CentralStorage

    settings = _installation()
    moved = rollback(
        options.service or settings.service_name,
        CentralStorage(settings.storage_url),
        settings.home / "cache",
        note=Note(this_user(), options.because),
    )
    print(moved.message)
    return 0


def _promote(options: argparse.Namespace) -> int:
    from cv_platform.audit import Note, this_user
    from cv_platform.commands.promote import promote_version

    settings = _installation()
    experiments, _ = load_experiments(config_files(settings.configs))
    print(
        promote_version(
            settings,
            options.version,
            list(experiments.values()),
            note=Note(this_user(), options.because),
            say=lambda line: print(line, flush=True),
        )
    )
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from cv_platform.commands.reproduce import reproduce

    found = reproduce(
        _installation(),
        options.version,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        other_code=options.other_code,
    )
    print(found)
    return 0 if found.held else 1


def _audit(_: argparse.Namespace) -> int:
    from cv_platform.audit import AuditLog

    for entry in AuditLog(Settings.from_environment().storage_url).entries():
        why = f": {entry.because}" if entry.because else ""
        failed = f" (failed: {entry.failure})" if entry.failure else ""
        print(f"{entry.at_utc:%Y-%m-%d %H:%M:%S} UTC  {entry.action}  {entry.subject}  by {entry.by}{why}{failed}")
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
