#!/bin/sh
# Run once by the image, on an empty data folder: a database per program, and for each a role that can do no more than
# it has to. Passwords come from the environment (docker/.env).
set -eu

# \getenv, not --set: who lists processes sees no password. The variables are quoted by psql, whatever they hold.
psql --no-psqlrc --no-password --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres --file - <<'SQL'
\getenv owner_password REQUEST_LOG_PASSWORD
\getenv service_password SERVICE_DB_PASSWORD
\getenv dagster_password DAGSTER_DB_PASSWORD
\getenv mlflow_password MLFLOW_DB_PASSWORD
\getenv monitor_password MONITOR_DB_PASSWORD
\getenv reader_password READER_DB_PASSWORD
CREATE ROLE request_log LOGIN PASSWORD :'owner_password';
CREATE ROLE service LOGIN PASSWORD :'service_password';
CREATE ROLE dagster LOGIN PASSWORD :'dagster_password';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
-- Reads statistics, no rows.
CREATE ROLE monitor LOGIN PASSWORD :'monitor_password' IN ROLE pg_monitor;
-- Reads the request log, for notebooks.
CREATE ROLE reader LOGIN PASSWORD :'reader_password';

CREATE DATABASE request_log OWNER request_log;
CREATE DATABASE dagster OWNER dagster;
CREATE DATABASE mlflow OWNER mlflow;

-- By default everybody may connect to every database, and make temporary tables there.
REVOKE ALL ON DATABASE postgres, template1, request_log, dagster, mlflow FROM PUBLIC;
GRANT CONNECT ON DATABASE postgres, request_log, dagster, mlflow TO monitor;
-- Temporary tables: the service copies its rows into one first.
GRANT CONNECT, TEMPORARY ON DATABASE request_log TO service;
GRANT CONNECT ON DATABASE request_log TO reader;

\connect request_log
GRANT USAGE ON SCHEMA public TO service, reader;
ALTER SCHEMA public OWNER TO request_log;
-- Rows, not tables: migrations are the owner's.
ALTER DEFAULT PRIVILEGES FOR ROLE request_log IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO service;
ALTER DEFAULT PRIVILEGES FOR ROLE request_log IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO service;
ALTER DEFAULT PRIVILEGES FOR ROLE request_log IN SCHEMA public GRANT SELECT ON TABLES TO reader;
SQL
