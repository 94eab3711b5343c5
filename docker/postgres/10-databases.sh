#!/bin/sh
# Run once by the image, on an empty data folder: a database per program, and for each a role that can do no more than
# it has to. Passwords come from the environment (docker/.env).
set -eu

# Values as psql variables: quoted by psql, whatever they hold.
psql --no-psqlrc --no-password --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    --set owner_password="$REQUEST_LOG_PASSWORD" --set service_password="$SERVICE_DB_PASSWORD" \
    --set dagster_password="$DAGSTER_DB_PASSWORD" --set mlflow_password="$MLFLOW_DB_PASSWORD" \
    --set monitor_password="$MONITOR_DB_PASSWORD" --file - <<'SQL'
CREATE ROLE request_log LOGIN PASSWORD :'owner_password';
CREATE ROLE service LOGIN PASSWORD :'service_password';
CREATE ROLE dagster LOGIN PASSWORD :'dagster_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
-- Reads statistics, no rows.
CREATE ROLE monitor LOGIN PASSWORD :'monitor_password' IN ROLE pg_monitor;

CREATE DATABASE request_log OWNER request_log;
CREATE DATABASE dagster OWNER dagster;
CREATE DATABASE mlflow OWNER mlflow;

-- By default everybody may connect to every database, and make temporary tables there.
REVOKE ALL ON DATABASE postgres, template1, request_log, dagster, mlflow FROM PUBLIC;
GRANT CONNECT ON DATABASE postgres, request_log, dagster, mlflow TO monitor;
-- Temporary tables: the service copies its rows into one first.
GRANT CONNECT, TEMPORARY ON DATABASE request_log TO service;

\connect request_log
GRANT USAGE ON SCHEMA public TO service;
ALTER SCHEMA public OWNER TO request_log;
-- Rows, not tables: migrations are the owner's.
ALTER DEFAULT PRIVILEGES FOR ROLE request_log IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO service;
ALTER DEFAULT PRIVILEGES FOR ROLE request_log IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO service;
SQL
