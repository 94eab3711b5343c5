"""What was deleted, so that it does not arrive later."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "deletions",
        sa.Column("prediction_id", sa.Uuid(), nullable=False),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("prediction_id", name="pk_deletions"),
        comment="A prediction that was deleted: what still waits in a spool of it does not arrive",
    )


def downgrade() -> None:
    op.drop_table("deletions")
