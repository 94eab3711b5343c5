"""A run's output as people get it, read from a real run of Dagster's CLI: reasons, and no stack traces."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cv_platform.local.environment import dagster_command, platform_environment, prepare_home, run_logged
from cv_platform.local.graph import LAST_LINES
from cv_platform.local.run_output import RunOutput
from cv_platform.settings import Settings

GRAPH = """
import dagster as dg
from cv_platform.errors import TrainingError

NAMES = ("first", "second", "third")

@dg.asset(
    key_prefix="tiny",
    check_specs=[dg.AssetCheckSpec(name, asset=["tiny", "evaluation"], blocking=name != "third") for name in NAMES],
)
def evaluation():
    return dg.MaterializeResult(check_results=[
        dg.AssetCheckResult(check_name="first", passed=False, description="it's 2 of 3;\\nnot 3"),
        dg.AssetCheckResult(check_name="second", passed=False),
        dg.AssetCheckResult(
            check_name="third", passed=False, severity=dg.AssetCheckSeverity.WARN, description="slow"
        ),
    ])

@dg.asset(key_prefix="tiny")
def refused():
    try:
        {}["x"]
    except KeyError as err:
        raise TrainingError("Expected a file. Received: none.\\nMake one.") from err

@dg.asset(key_prefix="tiny")
def broken():
    raise ValueError("odd")

@dg.asset(key_prefix="tiny")
def whole(): ...

@dg.asset(key_prefix="tiny", deps=[evaluation])
def bento(): ...

defs = dg.Definitions(assets=[evaluation, refused, broken, whole, bento], executor=dg.in_process_executor)
"""


def test_a_failed_run_gives_reasons_and_no_stack_trace(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CV_HOME": str(tmp_path / "home")})
    prepare_home(settings)
    (tmp_path / "graph.py").write_text(GRAPH)
    record = settings.home / "records" / "tiny" / "evaluation.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"report_path": "/reports/tiny.html"}))
    log, said = tmp_path / "log", list[str]()
    output = RunOutput(said.append, settings.home / "records")
    command = dagster_command("asset", "materialize", "--select", "key:tiny/*", "-f", str(tmp_path / "graph.py"))
    status = run_logged(command, log, {**os.environ, **platform_environment(settings), **LAST_LINES}, output.read)
    failure = output.failure(status, log.read_text().splitlines())

    assert status == 1
    assert [line for line in said if "check" in line] == [
        "    tiny/evaluation: the check first did not pass. it's 2 of 3; not 3",
        "    tiny/evaluation: the check second did not pass.",
        "    tiny/evaluation: the check third did not pass. slow",
    ]
    assert [line.split(":")[0] for line in said if "check" not in line] == ["    tiny/whole"]
    assert failure.splitlines() == [
        "  tiny/broken: ValueError: odd",
        "    The platform does not expect this error: its traceback is in the log.",
        "  tiny/evaluation: the blocking check first did not pass. it's 2 of 3; not 3",
        "    the blocking check second did not pass.",
        "    Next: train longer or otherwise (`train` of the config), or change the limits in `evaluate`. "
        "What is served stays as it is.",
        "    Report: /reports/tiny.html",
        "  tiny/refused: Expected a file. Received: none.",
        "    Make one.",
        "  Not made, as it needs what failed: tiny/bento.",
    ]
    assert "Stack Trace" in log.read_text(), "the log keeps what the terminal does without"
    assert "superseded" not in log.read_text()


def test_a_failure_whose_own_lines_were_lost_is_told_by_the_end_of_the_run() -> None:
    start = "2026-11-23 09:28:51 +0000 - dagster - ERROR - __ASSET_JOB - ab13 - 42"
    lines = [
        f"{start} - RUN_FAILURE - Execution of run for \"__ASSET_JOB\" failed. Steps failed: ['a__x', 'a__y'].",
        "",
        'dagster._core.errors.DagsterExecutionStepExecutionError: Error occurred while executing op "a__x":',
        "",
        "Stack Trace:",
        '  File "plan.py", line 243, in step',
        "",
        "The above exception was caused by the following exception:",
        "cv_platform.errors.DatasetError: Expected images. Received: none.",
        "",
        "Stack Trace:",
        '  File "own.py", line 2, in x',
    ]
    output = RunOutput(lambda _: None, Path("none"))
    for line in lines:
        output.read(line)
    assert output.failure(1, lines).splitlines() == [
        "  a/x: Expected images. Received: none.",
        "  a/y: failed; the log says why.",
    ]


@pytest.mark.parametrize(
    ("status", "lines", "expected"),
    [
        (-9, ["Traceback …"], "  Dagster's process was ended by SIGKILL: often the system's answer to a full memory."),
        (-15, [], "  Dagster's process was ended by SIGTERM."),
        (1, ["Traceback (most recent call last):", '  File "x"', "ImportError: no x", ""], "  ImportError: no x"),
        (1, ["Error: Invalid value", "", ""], "  Error: Invalid value"),
        (1, [], "  Dagster said nothing."),
    ],
)
def test_a_failure_outside_of_any_asset_is_one_line(status: int, lines: list[str], expected: str) -> None:
    output = RunOutput(lambda _: None, Path("none"))
    for line in lines:
        output.read(line)
    assert output.failure(status, lines) == expected


def test_the_platforms_own_error_outside_of_any_asset_goes_first() -> None:
    output = RunOutput(lambda _: None, Path("none"))
    lines = ["cv_platform.errors.ConfigError: Expected a. Received: b.", "dagster._core.errors.X: Stack"]
    for line in lines:
        output.read(line)
    assert output.failure(1, lines) == "  Expected a. Received: b."
