"""Another reason to ask what an image shows: champion and challenger disagree; the comment names the list's home."""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.alter_column("labeling_items", "reason", comment="random or uncertain, or what else of labels.*_share")


def downgrade() -> None:
    op.alter_column("labeling_items", "reason", comment="random, unknown, drift, novel, unlabelled or uncertain")
