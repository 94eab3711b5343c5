"""`python -m cv_platform.defs.materialize MODULE SELECTION`: materialises assets, and says what happened as it happens.

A process of its own, so that commands need not import Dagster. It reads Dagster's event log by the run's id, and writes
a JSON object a line to standard output: `{"said": …}` for what finished, and `{"failed": …}`, once, for why the run
failed. All that Dagster and the assets print, tracebacks among it, goes to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from cv_platform.errors import CvPlatformError

_POLL_SECONDS = 0.5
_PROGRESS = ("going on after epoch ", "starting at epoch ", "to be started at ")
"""How lines of the training's log begin that people wait for."""
_WRAPPERS = ("Dagster", "Failure", "RetryRequested")
"""How classes begin that stand around an error of an asset's body, and say nothing of their own."""
_NEXT_STEPS = {
    "validation_report": "mend the dataset under a new tag, or change the limits in `validate` of the config.",
    "evaluation": "train longer or otherwise (`train` of the config), or change the limits in `evaluate`. "
    "What is served stays as it is.",
}
"""By the asset whose blocking check did not pass; errors of the platform say it themselves."""


@dataclass
class RunStory:
    """What the events of one run come to, in plain sentences.

    Attributes:
        say: is given a line per finished asset, per check that did not pass, and where a training goes on.
    """

    say: Callable[[str], None]
    _planned: list[str] = field(default_factory=list[str])
    _started: set[str] = field(default_factory=set[str])
    _blocking: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    _reports: dict[str, str] = field(default_factory=dict[str, str])
    _failures: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    _run_failure: list[str] = field(default_factory=list[str])

    def take(self, entry: dg.EventLogEntry) -> None:
        """Takes the next entry of the run's log."""
        event = entry.dagster_event
        if event is None:
            if entry.user_message.startswith(_PROGRESS):
                self.say(f"    {entry.user_message}")
            return
        asset = (event.step_key or "").replace("__", "/")
        if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED:
            assert event.asset_key is not None
            self._planned.append(event.asset_key.to_user_string())
        elif event.event_type == dg.DagsterEventType.STEP_START:
            self._started.add(asset)
        elif event.event_type == dg.DagsterEventType.STEP_SUCCESS:
            self.say(f"    {asset}: {_duration(event.step_success_data.duration_ms)}")
        elif event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION:
            report = event.step_materialization_data.materialization.metadata.get("report")
            if isinstance(report, dg.PathMetadataValue):
                self._reports[asset] = str(report.value)
        elif event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
            self._take_check(event.asset_check_evaluation_data)
        elif event.event_type == dg.DagsterEventType.STEP_FAILURE:
            self._failures[asset] = self._reasons(asset, event.step_failure_data.error)
        elif event.event_type == dg.DagsterEventType.RUN_FAILURE:
            self._run_failure = _told(event.job_failure_data.error)

    def failure(self) -> str:
        """Returns why the run failed, in a few lines; to be called once, after the last entry."""
        reasons = [
            f"{'  ' if position else ''}{line}"
            for asset, reason in self._failures.items()
            for position, line in enumerate([f"{asset}: {reason[0]}", *reason[1:]])
        ]
        skipped = [asset for asset in self._planned if asset not in self._started]
        if reasons and skipped:
            reasons.append(f"Not made, as it needs what failed: {', '.join(sorted(skipped))}.")
        return "\n".join(reasons or self._run_failure or _told(None))

    def _take_check(self, check: dg.AssetCheckEvaluation) -> None:
        if check.passed:
            return
        asset = check.asset_key.to_user_string()
        finding = f"check {check.check_name} did not pass. {' '.join((check.description or '').split())}".rstrip()
        self.say(f"    {asset}: the {finding}")
        if check.blocking and check.severity == dg.AssetCheckSeverity.ERROR:
            self._blocking.setdefault(asset, []).append(f"the blocking {finding}")

    def _reasons(self, asset: str, error: Any) -> list[str]:
        if error is None or error.cls_name != "DagsterAssetCheckFailedError":
            return _told(error)
        reasons = [*self._blocking.get(asset, ["a blocking check did not pass."])]
        if (name := asset.rpartition("/")[2]) in _NEXT_STEPS:
            reasons.append(f"Next: {_NEXT_STEPS[name]}")
        if asset in self._reports:
            reasons.append(f"Report: {self._reports[asset]}")
        return reasons


def _told(error: Any) -> list[str]:
    """Returns an error (Dagster's `SerializableErrorInfo`) in lines, without the exceptions that wrap it."""
    while error is not None and error.cause is not None and (error.cls_name or "").startswith(_WRAPPERS):
        error = error.cause
    if error is None:
        return ["failed; the log says why."]
    kind, _, message = error.message.strip().partition(": ")
    if kind.startswith(CvPlatformError.__module__):
        return message.splitlines()
    return [
        *error.message.strip().splitlines(),
        "The platform does not expect this error: its traceback is in the log.",
    ]


def _duration(milliseconds: float) -> str:
    seconds = milliseconds / 1000
    return f"{seconds:.2f}s" if seconds < 60 else f"{int(seconds // 60)}m{int(seconds % 60)}s"


def run_assets(
    definitions: dg.Definitions, selection: str, config: dict[str, Any], instance: dg.DagsterInstance, story: RunStory
) -> bool:
    """Materialises assets in this process, tells `story` every event as it is logged; returns whether all succeeded.

    Args:
        definitions: with the assets.
        selection: as `dagster asset materialize --select` takes it.
        config: run config.
        instance: keeps the run.
        story: is told.
    """
    keys = dg.AssetSelection.from_string(selection).resolve(definitions.resolve_asset_graph())
    job = definitions.resolve_implicit_global_asset_job_def()
    run_id, cursor = str(uuid.uuid4()), None
    has_ended = threading.Event()

    def tell() -> None:
        nonlocal cursor
        while True:
            is_last = has_ended.wait(_POLL_SECONDS)
            while True:
                page = instance.get_records_for_run(run_id, cursor)
                for record in page.records:
                    story.take(record.event_log_entry)
                cursor = page.cursor
                if not page.has_more:
                    break
            if is_last:
                return

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        return job.execute_in_process(
            run_config=config,
            instance=instance,
            asset_selection=sorted(keys),
            run_id=run_id,
            raise_on_error=False,
        ).success
    finally:
        has_ended.set()
        teller.join()


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module", help="that has `defs`")
    parser.add_argument("selection")
    parser.add_argument("--config-json", type=json.loads, default={})
    options = parser.parse_args()
    stories = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Dagster marks the run as ended, as after Ctrl-C.

    def write(**message: str) -> None:
        stories.write(json.dumps(message) + "\n")
        stories.flush()

    story = RunStory(lambda line: write(said=line))
    try:
        defs: dg.Definitions = importlib.import_module(options.module).defs
        with dg.DagsterInstance.get() as instance:
            if run_assets(defs, options.selection, options.config_json, instance, story):
                return 0
        write(failed=story.failure())
    except Exception as err:  # Of a config or definition that does not load: no run has kept it.
        traceback.print_exc()
        write(failed=str(err) if isinstance(err, CvPlatformError) else f"{type(err).__name__}: {err}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
