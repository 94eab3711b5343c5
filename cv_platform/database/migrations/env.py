"""Alembic's entry: runs the migrations on the connection, and inside the transaction, of `migrate`."""

from __future__ import annotations

from alembic import context

from cv_platform.database.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, compare_type=True)
with context.begin_transaction():
    context.run_migrations()
