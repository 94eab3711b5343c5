"""What a challenger said of images that the champion had answered: a table of its own, gone with the prediction."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "shadow_answers",
        sa.Column("prediction_id", sa.Uuid(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False, comment="of the challenger"),
        sa.Column("predicted_class", sa.Text(), nullable=False, comment="multi-label: positive classes joined by |"),
        sa.Column("probabilities", ARRAY(sa.REAL()), nullable=False, comment="in the challenger's class order"),
        sa.Column("unknown_score", sa.Double(), comment="above 1: unknown; null where there is no rule"),
        sa.Column("agrees", sa.Boolean(), nullable=False, comment="with the class that the client was told"),
        sa.Column("seconds", sa.Double(), nullable=False, comment="in spare time: decoding and model"),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["prediction_id"],
            ["predictions.prediction_id"],
            name="fk_shadow_answers_prediction_id_predictions",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("prediction_id", "model_version", name="pk_shadow_answers"),
        comment="What a challenger says of an image that the champion has answered",
    )


def downgrade() -> None:
    op.drop_table("shadow_answers")
