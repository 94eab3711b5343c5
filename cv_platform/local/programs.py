"""The programs of the local stack: command, port, health and stop signal of each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from cv_platform.local.environment import REPOSITORY
from cv_platform.settings import Settings


@dataclass(frozen=True)
class Program:
    """One supervised process."""

    name: str
    command: tuple[str, ...]
    port: int | None
    health_path: str | None
    """Path that answers 200 when the program works; None: no HTTP."""
    stop_signal: str = "TERM"
    stop_seconds: int = 20
    priority: int = 100
    title: str = ""
    has_lasting_children: bool = False
    """Its children may outlive its death: Dagster's runs. Those of others keep its port, and are ended."""


def programs(settings: Settings) -> list[Program]:
    """Returns the programs of the stack, in the order in which they start."""
    python = sys.executable
    host = "127.0.0.1"
    stack = [
        Program(
            "mlflow",
            (
                *(python, "-m", "cv_platform.local.mlflow_server", "server"),
                *("--backend-store-uri", settings.mlflow_tracking_uri),
                *("--artifacts-destination", str(settings.home / "mlflow" / "artifacts"), "--workers", "1"),
                *("--host", host, "--port", str(settings.mlflow_port)),
            ),
            settings.mlflow_port,
            "/health",
            priority=20,
            title="MLflow: runs, metrics, models",
        ),
        Program(
            "evidently",
            (
                *(str(Path(python).with_name("evidently")), "ui", "--workspace", str(settings.home / "evidently")),
                *("--host", host, "--port", str(settings.evidently_port)),
            ),
            settings.evidently_port,
            "/api/version",
            priority=20,
            title="Evidently: drift over time",
        ),
        Program(
            "dagster",
            (
                *(python, "-m", "dagster_webserver", "-w", str(REPOSITORY / "workspace.yaml")),
                *("--host", host, "--port", str(settings.dagster_port)),
            ),
            settings.dagster_port,
            "/server_info",
            stop_signal="INT",
            priority=30,
            title="Dagster: the graph, runs, schedules",
            has_lasting_children=True,
        ),
        Program(
            "dagster-daemon",
            (python, "-m", "dagster._daemon", "run", "-w", str(REPOSITORY / "workspace.yaml")),
            None,
            None,
            stop_signal="INT",
            priority=30,
            has_lasting_children=True,
        ),
        Program(
            "service",
            service_command(settings.service_port),
            settings.service_port,
            "/livez",
            stop_seconds=30,
            priority=40,
            title="Service: web page, /predict, /docs",
        ),
    ]
    if settings.database_url is None:
        database = (python, "-m", "cv_platform.cli", "database", "run")
        stack.insert(0, Program("postgres", database, None, None, stop_signal="INT", stop_seconds=60, priority=10))
    if settings.evidently_url is not None:
        stack = [program for program in stack if program.name != "evidently"]
    if not settings.mlflow_tracking_uri.startswith("sqlite:"):
        stack = [program for program in stack if program.name != "mlflow"]
    return stack


def service_command(port: int) -> tuple[str, ...]:
    """Returns the command that serves the production model from this repository."""
    return (
        *(sys.executable, "-m", "bentoml", "serve", "bentos.image_classifier.service:ImageClassifier"),
        *("--working-dir", str(REPOSITORY), "--host", "127.0.0.1", "--port", str(port)),
    )
