"""What a run of Dagster's CLI prints, read line by line: what it finished, and why it failed, in plain sentences.

Dagster 1.13 prints an event per line, and an exception with its stack trace in the lines after the event. The terminal
gets the reasons; the traces stay in the log.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_EVENT = re.compile(r"^\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2} \S+ - dagster - [A-Z]+ - ")
_FINISHED = re.compile(r'STEP_SUCCESS - Finished execution of step "(.+?)" in (.+?)\.?$')
_CHECK = re.compile(
    r"ASSET_CHECK_EVALUATION - Asset check '(\w+)' on '(\S+)' did not pass\.(?: Description: '(.*))?$", re.DOTALL
)
_PROGRESS = re.compile(r" - ((?:going on after|starting at) epoch \d.*)$")
_FAILED = re.compile(r'STEP_FAILURE - Execution of step "(.+?)" failed\.')
_RUN_FAILED = re.compile(r"RUN_FAILURE - .* Steps failed: \[(.+?)\]\.")
_SKIPPED = re.compile(r"Dependencies for step (\S+) .*Not executing\.$")
_CHECKS_FAILED = re.compile(r"^dagster\._core\.errors\.DagsterAssetCheckFailedError: ")
_WRAPPER = re.compile(r"^dagster\._core\.errors\.\w+: Error occurred while .*$")
_CAUSE = "The above exception was caused by the following exception:"
_TRACE = "Stack Trace:"
_PLATFORM_ERROR = re.compile(r"^cv_platform\.errors\.\w+: ")
_ANY_ERROR = re.compile(r"^([\w.]*(?:Error|Exception|Interrupt|Exit))(?:: |$)")

_KEPT_EVENTS = ("ASSET_CHECK_EVALUATION - ", "STEP_FAILURE - ", "RUN_FAILURE - ")
"""Those whose following lines belong to them."""

_NEXT_STEPS = {
    "validation_report": "mend the dataset under a new tag, or change the limits in `validate` of the config.",
    "evaluation": "train longer or otherwise (`train` of the config), or change the limits in `evaluate`. "
    "What is served stays as it is.",
}
"""By the asset whose blocking check did not pass; errors of the platform say it themselves."""


@dataclass
class RunOutput:
    """Reads the output of one run.

    Attributes:
        say: is given a line per finished asset, per check that did not pass, and where a training goes on.
        records: folder of the assets' records, `$CV_HOME/records`.
    """

    say: Callable[[str], None]
    records: Path
    _block: list[str] = field(default_factory=list[str])
    _is_kept: bool = False
    _checks: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    _failures: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    _skipped: list[str] = field(default_factory=list[str])
    _errors: list[str] = field(default_factory=list[str])

    def read(self, line: str) -> None:
        """Takes the next line."""
        text = line.rstrip()
        if _EVENT.match(text):
            self._close_event()
            self._is_kept = any(event in text for event in _KEPT_EVENTS)
            self._block = [text] if self._is_kept else []
            if found := _FINISHED.search(text):
                self.say(f"    {_asset(found[1])}: {found[2]}")
            elif found := _PROGRESS.search(text):
                self.say(f"    {found[1]}")
            elif found := _SKIPPED.search(text):
                self._skipped.append(_asset(found[1]))
        elif self._is_kept:
            self._block.append(text)
        elif _PLATFORM_ERROR.match(text) and text not in self._errors:
            self._errors.append(text)

    def failure(self, status: int, last_lines: list[str]) -> str:
        """Returns why the run failed, in a few lines; to be called once, after the last line.

        Args:
            status: the exit status of the CLI, negative for a signal.
            last_lines: the end of its output, for a failure outside of any asset.
        """
        self._close_event()
        reasons = [
            f"{'  ' if position else ''}{line}"
            for asset, reason in self._failures.items()
            for position, line in enumerate([f"{asset}: {reason[0]}", *reason[1:]])
        ]
        if not reasons:
            reasons = [_without_class(text) for text in self._errors] or [_last_words(status, last_lines)]
        if self._skipped:
            reasons.append(f"Not made, as it needs what failed: {', '.join(self._skipped)}.")
        return "\n".join(f"  {line}" for line in reasons)

    def _close_event(self) -> None:
        block, self._block, self._is_kept = self._block, [], False
        if not block:
            return
        if found := _FAILED.search(block[0]):
            asset = _asset(found[1])
            self._failures[asset] = self._reasons(asset, [line for line in block[1:] if line])
        elif found := _RUN_FAILED.search(block[0]):
            # The run tells the first failure again; the only word of it where Dagster has lost the step's own lines.
            for step in re.findall(r"'(.+?)'", found[1]):
                asset = _asset(step)
                is_told = any(f'"{step}"' in line or line.startswith(f"{asset}: ") for line in block[1:])
                told = [line for line in block[1:] if line] if is_told else []
                self._failures.setdefault(asset, self._reasons(asset, told))
        elif found := _CHECK.search("\n".join(block)):
            # What is not Dagster's, such as a library's own output, may follow; the description ends with a quote.
            description = " ".join((found[3] or "").rpartition("'")[0].split())
            self._checks[found[2], found[1]] = description
            self.say(f"    {found[2]}: the check {found[1]} did not pass. {description}".rstrip())

    def _reasons(self, asset: str, lines: list[str]) -> list[str]:
        if lines and _CHECKS_FAILED.match(lines[0]):
            failed = [check for line in lines[1:2] for check in line.rpartition(": ")[2].split(",")]
            reasons = [
                f"the blocking check {check} did not pass. {self._checks.get((asset, check), '')}".rstrip()
                for check in failed
            ]
            name = asset.rpartition("/")[2]
            if name in _NEXT_STEPS:
                reasons.append(f"Next: {_NEXT_STEPS[name]}")
            report = self._report(asset)
            return [*reasons, f"Report: {report}"] if report else reasons
        if lines and _WRAPPER.match(lines[0]):
            inner = lines[1:]
            if inner and inner[0] == _TRACE and _CAUSE in inner:
                inner = inner[inner.index(_CAUSE) + 1 :]
            lines = inner or lines
        said = lines[: lines.index(_TRACE)] if _TRACE in lines else lines[:1]
        if not said:
            return ["failed; the log says why."]
        if _PLATFORM_ERROR.match(said[0]):
            return [_without_class(said[0]), *said[1:]]
        return [*said, "The platform does not expect this error: its traceback is in the log."]

    def _report(self, asset: str) -> str | None:
        """Returns where the report of an asset lies that was made although its check did not pass."""
        try:
            record = json.loads((self.records / f"{asset}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # It only helps; the failure is what matters.
        return record.get("report_path")


def _asset(step: str) -> str:
    return step.replace("__", "/")


def _without_class(text: str) -> str:
    return _PLATFORM_ERROR.sub("", text)


def _last_words(status: int, lines: list[str]) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        memory = ": often the system's answer to a full memory" if name == "SIGKILL" else ""
        return f"Dagster's process was ended by {name}{memory}."
    said = [line.rstrip() for line in lines if line.strip()]
    errors = [line for line in said if _ANY_ERROR.match(line)]
    return (errors or said or ["Dagster said nothing."])[-1]
