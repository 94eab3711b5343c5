"""What people are asked to label: a table of its own, so that nothing that is there is touched."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "labeling_items",
        sa.Column("item_id", sa.Uuid(), nullable=False),
        sa.Column("experiment", sa.Text(), nullable=False),
        sa.Column("prediction_id", sa.Uuid(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False, comment="random, unknown, drift, novel or uncertain"),
        sa.Column("score", sa.Double(), nullable=False, comment="of the reason: higher was asked for first"),
        sa.Column(
            "chance",
            sa.Double(),
            comment="of random ones: with which each request of the window was drawn; its inverse is their weight",
        ),
        sa.Column("window_end_utc", sa.DateTime(timezone=True), nullable=False, comment="exclusive"),
        sa.Column("place", sa.Integer(), nullable=False, comment="in the queue, from 0"),
        sa.Column(
            "skipped_by",
            ARRAY(sa.Text()),
            server_default="{}",
            nullable=False,
            comment="labellers who would not say what it shows",
        ),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["prediction_id"],
            ["predictions.prediction_id"],
            name="fk_labeling_items_prediction_id_predictions",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("item_id", name="pk_labeling_items"),
        sa.UniqueConstraint("experiment", "prediction_id", name="uq_labeling_items_experiment_prediction_id"),
        comment="One image that people are asked to label; what they say is feedback on its prediction",
    )
    op.create_index("ix_labeling_items_prediction_id", "labeling_items", ["prediction_id"])


def downgrade() -> None:
    op.drop_table("labeling_items")
