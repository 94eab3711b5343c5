"""Phases `digits` and `predict`: from data to a served model by Dagster's API, then requests and reports."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from cv_platform.config import load_experiment
from cv_platform.demo import shifted
from cv_platform.errors import ServiceError
from trials.findings import Findings, wait_until
from trials.stack.dagster_api import RunEnd
from trials.stack.stage import EXPERIMENT, Stage

EXPERIMENT_SECONDS = 540.0
REPORT_SECONDS = 240.0
STATEMENTS = 100
"""Of what an image really shows; from `monitor.min_feedback` on, production metrics judge by them."""
TAKEN_UP_SECONDS = 60.0


def run_digits(stage: Stage, findings: Findings) -> None:
    """Materialises everything of the digits experiment in one run, launched through nginx."""
    minimum = load_experiment(stage.checkout.folder / "configs" / f"{EXPERIMENT}.yaml").evaluate.min_accuracy
    end = stage.dagster.wait(stage.dagster.launch(f"{EXPERIMENT}_experiment"), seconds=EXPERIMENT_SECONDS)
    done = sum(status == "SUCCESS" for status in end.steps.values())
    findings.add(
        "all assets of digits in one run, launched by GraphQL through nginx",
        f"{end.status}, {done} of {len(end.steps)} steps in {end.seconds:.0f} s" + _because(end),
        end.status == "SUCCESS" and done == len(end.steps) > 0,
    )
    if end.status != "SUCCESS":
        return
    evaluation = stage.dagster.latest(EXPERIMENT, "evaluation")
    accuracy, version = float(evaluation["accuracy"]), str(evaluation["version"])
    findings.add(f"test accuracy ≥ {minimum:g}", f"{accuracy:.4f}", accuracy >= minimum)
    run = stage.get("MLFLOW_PORT", "/api/2.0/mlflow/runs/get", run_id=str(evaluation["mlflow_run_id"]))["run"]
    logged = {metric["key"]: metric["value"] for metric in run["data"]["metrics"]}
    findings.add(
        "the run in MLflow, finished, with the same accuracy",
        f"{run['info']['run_name']!r} {run['info']['status']}, {logged.get('accuracy')}",
        run["info"]["status"] == "FINISHED" and logged.get("accuracy") == accuracy,
    )
    seconds = wait_until(
        lambda: stage.health().get("model_version") == version, seconds=TAKEN_UP_SECONDS, what=f"{version} to be served"
    )
    findings.add("the service on that version", f"{version} ({seconds:.0f} s after the run's end)", True)


def predict_and_report(stage: Stage, findings: Findings) -> None:
    """Sends the test images as they are and as a worse camera gives them, and has a report made of each window.

    The sensor's own reports, of all that came since the last one, would come between and say something else.
    """
    stage.dagster.stop_sensor(f"{EXPERIMENT}_new_predictions")
    send_window(stage, findings, is_shifted=False)
    send_window(stage, findings, is_shifted=True)


def send_window(stage: Stage, findings: Findings, *, is_shifted: bool) -> None:
    """Sends the test images, and has a drift report made of these requests, which must see the shift, or none."""
    images = [digit.png for digit in stage.digits]
    if is_shifted:
        images = [shifted(image, number) for number, image in enumerate(images)]
    start = datetime.now(UTC)
    answers = stage.predict(images)
    identifiers = {str(answer["prediction_id"]) for answer in answers if answer["status"] == 200}
    missing = stage.missing_rows(identifiers)
    right = sum(
        answer.get("predicted_class") == digit.label for answer, digit in zip(answers, stage.digits, strict=True)
    )
    findings.add(
        f"{len(images)} test images{' as a worse camera gives them' if is_shifted else ''}: 200, each with its row",
        f"{len(identifiers)} × 200, {len(identifiers) - missing} rows, {right / len(images):.3f} right",
        len(identifiers) == len(images) and not missing,
    )
    if not is_shifted:
        truths = [digit.label for digit in stage.digits[:STATEMENTS]]
        taken = stage.state_truths([str(answer["prediction_id"]) for answer in answers[:STATEMENTS]], truths)
        findings.add(f"{STATEMENTS} statements of the true class taken", f"{taken}", taken == STATEMENTS)
    _report(stage, findings, start, datetime.now(UTC), "drift" if is_shifted else "no drift")


def job_runs(stage: Stage, findings: Findings, what: str, job: str, *, tries: int = 1) -> None:
    """Adds whether a job, launched by GraphQL, ends well.

    Args:
        stage: where it runs.
        findings: receives it.
        what: why it is launched.
        job: its name.
        tries: after PostgreSQL's death each pool of Dagster's webserver holds a dead connection, which the next request
            meets and removes.
    """
    refused = 0
    while True:
        try:
            launched = stage.dagster.launch(job)
            break
        except ServiceError:
            refused += 1
            if refused == tries:
                raise
            time.sleep(1.0)
    run = stage.dagster.wait(launched, seconds=REPORT_SECONDS)
    seen = f"{run.status} in {run.seconds:.0f} s{_because(run)}" + (
        f", launched at try {refused + 1}" if refused else ""
    )
    findings.add(what, seen, run.status == "SUCCESS")


def _report(stage: Stage, findings: Findings, start: datetime, end: datetime, verdict: str) -> None:
    # As the schedule asks: production metrics look back further than the window, to statements about earlier ones.
    window = {"window_start_utc": start.isoformat(), "window_end_utc": end.isoformat(), "window_by": "logged"}
    config = {"resources": {f"{EXPERIMENT}_config": {"config": {"monitor": window}}}}
    run = stage.dagster.wait(stage.dagster.launch(f"{EXPERIMENT}_drift_report", config), seconds=REPORT_SECONDS)
    report = stage.dagster.latest(EXPERIMENT, "drift_report", run_id=run.run_id)
    made = run.status == "SUCCESS" and bool(report)
    findings.add(
        f"its drift report by GraphQL: {verdict}",
        f"{run.status} in {run.seconds:.0f} s: {report.get('verdict')} in {report.get('dagster/row_count')} requests"
        + _because(run),
        made and report.get("verdict") == verdict,
    )
    if not made:
        return
    projects = stage.get("EVIDENTLY_PORT", "/api/projects")
    found = [
        snapshot["name"]
        for project in projects
        if project["name"] == EXPERIMENT
        for snapshot in stage.get("EVIDENTLY_PORT", f"/api/projects/{project['id']}/snapshots")
        if snapshot["id"] == report.get("evidently_run_id")
    ]
    findings.add("the report in Evidently", repr(found[0]) if found else "not there", len(found) == 1)


def _because(end: RunEnd) -> str:
    return f": {end.problem}" if end.problem else ""
