"""When a prediction reached the log, which is later than its own time where a spool had to wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "predictions",
        sa.Column(
            "logged_on",
            sa.DateTime(timezone=True),
            comment="when the row came from a spool, which an outage delays; scheduled windows go by it",
        ),
    )
    # Of those that are there, nobody knows it any more; none of them is late for a window to come.
    op.execute("UPDATE predictions SET logged_on = created_on")
    op.alter_column("predictions", "logged_on", nullable=False, server_default=sa.text("clock_timestamp()"))
    op.create_index("ix_predictions_logged_on", "predictions", ["logged_on"], postgresql_using="brin")


def downgrade() -> None:
    op.drop_column("predictions", "logged_on")
