"""Alembic migrations of the request log; run by `database/migrate.py`."""
