"""`python -m cv_platform.defs.runs.unfinished`: prints the ids of the runs that have not ended, as JSON.

A process of its own, so that commands need not import Dagster, by its public API, so that its storage may be SQLite or
PostgreSQL.
"""

from __future__ import annotations

import json
import sys

import dagster as dg

UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def main() -> None:
    """Asks the instance at DAGSTER_HOME."""
    with dg.DagsterInstance.get() as instance:
        records = instance.get_run_records(dg.RunsFilter(statuses=UNFINISHED))
        sys.stdout.write(json.dumps([record.dagster_run.run_id for record in records]) + "\n")


if __name__ == "__main__":
    main()
