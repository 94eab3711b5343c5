"""A run's events as people get them: reasons, and no stack traces."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from cv_platform.defs.materialize import RunStory, run_assets
from cv_platform.errors import CvPlatformError, TrainingError
from cv_platform.local.environment import platform_environment, prepare_home
from cv_platform.local.graph import materialize
from cv_platform.settings import Settings


@dg.asset(
    key_prefix="tiny",
    check_specs=[
        dg.AssetCheckSpec(name, asset=["tiny", "evaluation"], blocking=name != "third")
        for name in ("first", "second", "third")
    ],
)
def evaluation() -> dg.MaterializeResult:
    return dg.MaterializeResult(
        metadata={"report": dg.MetadataValue.path("/reports/tiny.html")},
        check_results=[
            dg.AssetCheckResult(check_name="first", passed=False, description="it's 2 of 3;\nnot 3"),
            dg.AssetCheckResult(check_name="second", passed=False),
            dg.AssetCheckResult(
                check_name="third", passed=False, severity=dg.AssetCheckSeverity.WARN, description="slow"
            ),
        ],
    )


@dg.asset(key_prefix="tiny")
def refused() -> None:
    try:
        {}["x"]
    except KeyError as err:
        raise TrainingError("Expected a file. Received: none.\nMake one.") from err


@dg.asset(key_prefix="tiny")
def broken() -> None:
    raise ValueError("odd")


@dg.asset(key_prefix="tiny")
def whole(context) -> None:
    context.log.info("going on after epoch 3")
    context.log.info("to be started at 10.0.0.2:2222: a command")


@dg.asset(key_prefix="tiny", deps=[evaluation])
def bento() -> None: ...


def told(definitions: dg.Definitions) -> tuple[bool, list[str], list[str]]:
    said = list[str]()
    story = RunStory(said.append)
    with dg.instance_for_test() as instance:
        succeeded = run_assets(definitions, "key:tiny/*", {}, instance, story)
    return succeeded, said, story.failure().splitlines()


def test_a_failed_run_gives_reasons_and_no_stack_trace() -> None:
    succeeded, said, failure = told(dg.Definitions(assets=[evaluation, refused, broken, whole, bento]))

    assert not succeeded
    assert [line for line in said if "check" in line] == [
        "    tiny/evaluation: the check first did not pass. it's 2 of 3; not 3",
        "    tiny/evaluation: the check second did not pass.",
        "    tiny/evaluation: the check third did not pass. slow",
    ]
    rest = [line for line in said if "check" not in line]
    assert [line.partition(":")[0] for line in rest] == [
        "    going on after epoch 3",
        "    to be started at 10.0.0.2",
        "    tiny/whole",
    ]
    assert failure == [
        "tiny/broken: ValueError: odd",
        "  The platform does not expect this error: its traceback is in the log.",
        "tiny/evaluation: the blocking check first did not pass. it's 2 of 3; not 3",
        "  the blocking check second did not pass.",
        "  Next: train longer or otherwise (`train` of the config), or change the limits in `evaluate`. "
        "What is served stays as it is.",
        "  Report: /reports/tiny.html",
        "tiny/refused: Expected a file. Received: none.",
        "  Make one.",
        "Not made, as it needs what failed: tiny/bento.",
    ]


def test_a_failure_outside_of_any_asset_is_told_too() -> None:
    @dg.resource
    def closed() -> None:
        raise TrainingError("Expected a server. Received: none.")

    @dg.asset(key_prefix="tiny", required_resource_keys={"closed"})
    def waiting() -> None: ...

    succeeded, said, failure = told(dg.Definitions(assets=[waiting], resources={"closed": closed}))
    assert (succeeded, said, failure) == (False, [], ["Expected a server. Received: none."])


def test_a_run_that_succeeds_has_its_assets_told() -> None:
    succeeded, said, _ = told(dg.Definitions(assets=[whole]))
    assert succeeded
    assert [line.partition(":")[0] for line in said] == [
        "    going on after epoch 3",
        "    to be started at 10.0.0.2",
        "    tiny/whole",
    ]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    settings = Settings.from_environment({"CV_HOME": str(tmp_path / "home"), "CV_CONFIGS": str(tmp_path)})
    prepare_home(settings)
    return platform_environment(settings)


def failure_of(environment: dict[str, str], log: Path) -> list[str]:
    with pytest.raises(CvPlatformError) as caught:
        materialize("key:tiny/*", environment, log=log, say=lambda line: None)
    return str(caught.value).splitlines()


def test_definitions_that_do_not_load_are_the_reason(environment: dict[str, str], tmp_path: Path) -> None:
    message = failure_of({**environment, "CV_CONFIGS": str(tmp_path / "none")}, tmp_path / "log")
    assert message[0] == "tiny/* was not materialised completely (status 1)."
    assert message[1].startswith("  Expected")
    assert str(tmp_path / "none") in message[1]
    assert message[-1] == f"  The whole log, with tracebacks: {tmp_path / 'log'}"
    assert "Traceback" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            "  Dagster's process was ended by SIGKILL: often the system's answer to a full memory.",
        ),
        ("import os; os.kill(os.getpid(), 15)", "  Dagster's process was ended by SIGTERM."),
        ("import os; os._exit(3)", "  Dagster's process ended without a word."),
    ],
)
def test_a_process_that_dies_is_told_by_its_end(
    environment: dict[str, str], tmp_path: Path, program: str, expected: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(program)
    message = failure_of({**environment, "PYTHONPATH": str(tmp_path)}, tmp_path / "log")
    assert message[1] == expected
