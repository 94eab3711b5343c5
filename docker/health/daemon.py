"""Exits with 0 when each of Dagster's daemons has written its heartbeat within two minutes.

`dagster-daemon liveness-check` says the same for 4 s of CPU each time.
"""

import os
import sys

import psycopg2

NEEDED = {"SENSOR", "SCHEDULER", "QUEUED_RUN_COORDINATOR"}

url = os.environ["DAGSTER_POSTGRES_URL"].replace("postgresql+psycopg2://", "postgresql://", 1)
connection = psycopg2.connect(url, connect_timeout=5)
with connection, connection.cursor() as cursor:
    cursor.execute(
        "SELECT daemon_type FROM daemon_heartbeats WHERE timestamp > (now() AT TIME ZONE 'UTC') - interval '2 minutes'"
    )
    alive = {row[0] for row in cursor.fetchall()}
sys.stdout.write(f"alive: {', '.join(sorted(alive)) or 'none'}\n")
sys.exit(0 if alive >= NEEDED else 1)
