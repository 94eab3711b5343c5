"""Uploads by their time: retention finds those that are too old without a look at the others."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_images_created_on", "images", ["created_on"])


def downgrade() -> None:
    op.drop_index("ix_images_created_on", "images")
