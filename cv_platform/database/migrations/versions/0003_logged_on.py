"""When a prediction reached the log, which is later than its own time where a spool had to wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Null for the rows that are there, of which nobody knows it any more: they count by their own time
    # (`WindowBounds`), and the table, which may be large, is not written anew.
    op.add_column(
        "predictions",
        sa.Column(
            "logged_on",
            sa.DateTime(timezone=True),
            comment="when the row came from a spool, which an outage delays; scheduled windows go by it",
        ),
    )
    op.alter_column("predictions", "logged_on", server_default=sa.text("clock_timestamp()"))
    op.create_index("ix_predictions_logged_on", "predictions", ["logged_on"], postgresql_using="brin")


def downgrade() -> None:
    op.drop_column("predictions", "logged_on")
