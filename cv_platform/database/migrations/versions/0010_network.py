"""From which network a prediction was asked for: a column without a default, added at once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "of the client, as a trusted proxy tells: its /24 or /48, never an address"
    op.add_column("predictions", sa.Column("network", sa.Text(), comment=comment))


def downgrade() -> None:
    op.drop_column("predictions", "network")
