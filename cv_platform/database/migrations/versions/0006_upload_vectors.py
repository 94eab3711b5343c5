"""The encoder's vectors of uploads that a drift report has looked at: a table of its own, gone with the upload."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "upload_vectors",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("encoder", sa.Text(), nullable=False, comment="its key; another key, other vectors"),
        sa.Column(
            "vector",
            sa.LargeBinary(),
            nullable=False,
            comment="little-endian float16; empty: the upload does not decode",
        ),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["sha256"], ["images.sha256"], name="fk_upload_vectors_sha256_images", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("sha256", "encoder", name="pk_upload_vectors"),
        comment="What an upload shows, as the monitor has computed it; gone with the upload",
    )


def downgrade() -> None:
    op.drop_table("upload_vectors")
