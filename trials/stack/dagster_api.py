"""Dagster's GraphQL API, as a person's script uses it: launch a job, wait for its end, read what it made.

https://docs.dagster.io/api/graphql
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from cv_platform.errors import ServiceError
from trials.pace import allowed

_ENDED = {"SUCCESS", "FAILURE", "CANCELED"}
_REPOSITORIES = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"
_LAUNCH = """
mutation Launch($parameters: ExecutionParams!) {
  launchRun(executionParams: $parameters) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on PipelineNotFoundError { message }
  }
}
"""
_STATUS = """
query Status($run: ID!) {
  runOrError(runId: $run) {
    __typename
    ... on Run { status startTime endTime stepStats { stepKey status } }
  }
}
"""
_FAILURES = """
query Failures($run: ID!) {
  logsForRun(runId: $run) {
    ... on EventConnection {
      events {
        ... on ExecutionStepFailureEvent { stepKey error { message cause { message } } }
        ... on RunFailureEvent { message }
      }
    }
  }
}
"""
_SENSOR = """
query Sensor($selector: SensorSelector!) {
  sensorOrError(sensorSelector: $selector) { __typename ... on Sensor { sensorState { id } } }
}
"""
_STOP_SENSOR = "mutation Stop($id: String!) { stopSensor(id: $id) { __typename } }"
_METADATA = """
query Metadata($key: AssetKeyInput!) {
  assetOrError(assetKey: $key) {
    ... on Asset {
      assetMaterializations(limit: 20) {
        runId
        metadataEntries {
          label
          ... on TextMetadataEntry { text }
          ... on IntMetadataEntry { intValue }
          ... on FloatMetadataEntry { floatValue }
        }
      }
    }
  }
}
"""


@dataclass(frozen=True)
class RunEnd:
    """How a run ended."""

    run_id: str
    status: str
    """SUCCESS, FAILURE or CANCELED; another one when the time was over."""
    seconds: float
    """From its first step to its end, as Dagster says; waiting in the queue is not in it."""
    steps: Mapping[str, str]
    """Each step's status."""
    problem: str
    """Why it failed; empty if it did not."""


class DagsterApi:
    """A Dagster that is reached by HTTP, with the stack's login.

    Args:
        base_url: of its web server, or of nginx before it.
        user: of the login.
        password: of the login.
        look_seconds: between two looks at a run that is waited for.
    """

    def __init__(self, base_url: str, user: str, password: str, *, look_seconds: float = 2.0) -> None:
        self._url = f"{base_url}/graphql"
        self._look_seconds = look_seconds
        self._login = (user, password)

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """Returns the `data` of a query.

        Raises:
            ServiceError: no answer, another status than 200, or errors in the answer.
        """
        try:
            response = httpx.post(
                self._url, json={"query": query, "variables": variables}, auth=self._login, timeout=60
            )
        except httpx.HTTPError as err:
            raise ServiceError(f"Expected an answer of {self._url}. Received: {err!r}.") from err
        if response.status_code != 200:
            raise ServiceError(
                f"Expected 200 of {self._url}. Received: {response.status_code}, {response.text[:500]}. Is the login "
                "that of docker/.env?"
            )
        answer = response.json()
        if answer.get("errors"):
            raise ServiceError(f"Expected an answer of {self._url} without errors. Received: {answer['errors'][:2]}.")
        return answer["data"]

    def launch(self, job: str, run_config: Mapping[str, Any] | None = None) -> str:
        """Puts a run of a job into Dagster's queue and returns its id.

        Raises:
            ServiceError: there is no such job, or its config is refused.
        """
        parameters = {
            "selector": {**self._repository(), "jobName": job},
            "runConfigData": dict(run_config or {}),
            "mode": "default",
        }
        answer = self.ask(_LAUNCH, parameters=parameters)["launchRun"]
        if answer["__typename"] != "LaunchRunSuccess":
            raise ServiceError(f"Expected Dagster to launch {job}. Received: {answer}.")
        return str(answer["run"]["runId"])

    def wait(self, run_id: str, *, seconds: float) -> RunEnd:
        """Waits for a run's end; while Dagster does not answer too. A run that is late is returned as it is then."""
        limit = allowed(seconds)
        deadline = time.monotonic() + limit
        last: dict[str, Any] = {"status": "unknown"}
        while time.monotonic() < deadline:
            try:
                last = self.ask(_STATUS, run=run_id)["runOrError"]
            except ServiceError as err:
                last = {"status": f"unknown: {err}"}
            if last.get("status") in _ENDED:
                break
            time.sleep(self._look_seconds)
        status = str(last.get("status"))
        took = (last.get("endTime") or 0.0) - (last.get("startTime") or 0.0)
        steps = {step["stepKey"]: step["status"] for step in last.get("stepStats") or []}
        problem = "" if status == "SUCCESS" else self._why(run_id) if status in _ENDED else f"not over in {limit:.0f} s"
        return RunEnd(run_id, status, max(took, 0.0), steps, problem)

    def stop_sensor(self, sensor: str) -> None:
        """Switches a sensor off.

        Raises:
            ServiceError: there is no such sensor, or Dagster refuses.
        """
        found = self.ask(_SENSOR, selector={**self._repository(), "sensorName": sensor})["sensorOrError"]
        if found["__typename"] != "Sensor":
            raise ServiceError(f"Expected a sensor {sensor}. Received: {found}.")
        answer = self.ask(_STOP_SENSOR, id=found["sensorState"]["id"])["stopSensor"]
        if answer["__typename"] != "StopSensorMutationResult":
            raise ServiceError(f"Expected Dagster to stop {sensor}. Received: {answer}.")

    def latest(self, *key: str, run_id: str | None = None) -> dict[str, Any]:
        """Returns the metadata of an asset's latest materialisation by label, and its `run_id`; empty: none yet.

        Args:
            key: of the asset.
            run_id: the run that made it; None: any.
        """
        found = self.ask(_METADATA, key={"path": list(key)})["assetOrError"].get("assetMaterializations") or []
        found = [made for made in found if run_id in (None, made["runId"])]
        if not found:
            return {}
        entries = found[0]["metadataEntries"]
        values = {e["label"]: e.get("text", e.get("intValue", e.get("floatValue"))) for e in entries}
        return {**values, "run_id": found[0]["runId"]}

    def _repository(self) -> dict[str, str]:
        nodes = self.ask(_REPOSITORIES)["repositoriesOrError"].get("nodes") or []
        if not nodes:
            raise ServiceError("Expected Dagster to have loaded the code location. Received: none. See its page.")
        return {"repositoryName": nodes[0]["name"], "repositoryLocationName": nodes[0]["location"]["name"]}

    def _why(self, run_id: str) -> str:
        events = self.ask(_FAILURES, run=run_id)["logsForRun"].get("events") or []
        steps = [
            f"{e['stepKey']}: {((e['error'].get('cause') or e['error'])['message']).strip()}"
            for e in events
            if e.get("error")
        ]
        return "; ".join(steps or [e["message"] for e in events if e.get("message")])[-1500:]
