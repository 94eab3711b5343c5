"""`cv-platform drift …`: what people decide about drift."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cv_platform.audit import Note, this_user
from cv_platform.settings import Settings

AddCommand = Callable[[str, object, str], argparse.ArgumentParser]


def add_commands(command: AddCommand) -> None:
    """Adds the command; `command` makes one of its name, function and description."""
    drift = command("drift", _drift, "take the window of a drift report as the new normal of its model version")
    drift.add_argument("action", choices=["accept"])
    drift.add_argument("window", help="the report's id, as its page and Dagster show it")
    drift.add_argument("--because", required=True, metavar="WHY", help="kept in the audit log and with the reference")


def _drift(options: argparse.Namespace) -> int:
    from cv_platform.commands.labels import log_engine
    from cv_platform.config import MonitorConfig, config_files, load_experiments
    from cv_platform.monitoring.accept import accept_window, find_report
    from cv_platform.storage import CentralStorage

    settings = Settings.from_environment()
    with log_engine() as engine:
        experiment, model, _ = find_report(engine, options.window)
        found, _ = load_experiments(config_files(settings.configs))
        monitor = next((one.monitor for one in found.values() if one.name == experiment), MonitorConfig())
        accepted = accept_window(
            options.window,
            monitor,
            engine=engine,
            storage=CentralStorage(settings.storage_url),
            cache=settings.home / "cache",
            note=Note(this_user(), options.because),
        )
    print(f"{model}: the next report compares with {accepted.told()}")
    return 0
