"""By which API key a prediction was asked for, and with which tag: two columns without a default, added at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "predictions",
        sa.Column("client", sa.Text(), comment="8 hex digits of the SHA-256 of the API key that it came with"),
    )
    op.add_column("predictions", sa.Column("tag", sa.Text(), comment="where the client says that the image is from"))
    op.alter_column("labeling_items", "reason", comment="random, unknown, drift, novel, unlabelled or uncertain")


def downgrade() -> None:
    op.alter_column("labeling_items", "reason", comment="random, unknown, drift, novel or uncertain")
    op.drop_column("predictions", "tag")
    op.drop_column("predictions", "client")
