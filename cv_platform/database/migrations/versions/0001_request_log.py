"""Tables of the request log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "drift_reports",
        sa.Column("report_id", sa.Uuid(), nullable=False),
        sa.Column("experiment", sa.Text(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("window_start_utc", sa.DateTime(timezone=True), nullable=False, comment="inclusive"),
        sa.Column("window_end_utc", sa.DateTime(timezone=True), nullable=False, comment="exclusive"),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False, comment="drift, no drift or insufficient data"),
        sa.Column("details", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("report_url", sa.Text(), nullable=False),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("report_id", name="pk_drift_reports"),
        comment="One verdict on one window of predictions",
    )
    op.create_index(
        "ix_drift_reports_experiment_created_on", "drift_reports", ["experiment", "created_on"], unique=False
    )
    op.create_table(
        "feedback",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("entry_id", sa.Uuid(), nullable=False, comment="makes draining idempotent"),
        sa.Column("prediction_id", sa.Uuid(), nullable=False),
        sa.Column("true_class", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_feedback"),
        sa.UniqueConstraint("entry_id", name="uq_feedback_entry_id"),
        comment="One statement of a prediction's true class; the latest counts, all are kept",
    )
    op.create_index("ix_feedback_prediction_id_created_on", "feedback", ["prediction_id", "created_on"], unique=False)
    op.create_table(
        "images",
        sa.Column("sha256", sa.Text(), nullable=False, comment="64 hex digits of the content"),
        sa.Column("content", sa.LargeBinary(), nullable=False, comment="the upload as received"),
        sa.Column("bytes", sa.Integer(), nullable=False),
        sa.Column("media_type", sa.Text(), nullable=False),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_images"),
        comment="One upload, kept once however often it was sent",
    )
    op.create_table(
        "predictions",
        sa.Column("prediction_id", sa.Uuid(), nullable=False),
        sa.Column("model_name", sa.Text(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("predicted_class", sa.Text(), nullable=False, comment="multi-label: positive classes joined by |"),
        sa.Column(
            "prediction_json",
            postgresql.JSONB(astext_type=sa.Text()),
            nullable=False,
            comment="class name to probability",
        ),
        sa.Column("uae_feats", postgresql.ARRAY(sa.REAL()), nullable=False, comment="UAE embedding"),
        sa.Column("bbsd_feats", postgresql.ARRAY(sa.REAL()), nullable=False, comment="probabilities in class order"),
        sa.Column("features", postgresql.ARRAY(sa.REAL()), nullable=False, comment="penultimate layer"),
        sa.Column(
            "properties",
            postgresql.ARRAY(sa.REAL()),
            nullable=False,
            comment="pixel statistics of the preprocessed image",
        ),
        sa.Column("image_sha256", sa.Text(), nullable=True, comment="null when uploads are not kept"),
        sa.Column("raw_hm", postgresql.ARRAY(sa.REAL()), nullable=True, comment="Grad-CAM map in 0-1, row by row"),
        sa.Column("hm_height", sa.Integer(), nullable=True),
        sa.Column("hm_width", sa.Integer(), nullable=True),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["image_sha256"], ["images.sha256"], name="fk_predictions_image_sha256_images"),
        sa.PrimaryKeyConstraint("prediction_id", name="pk_predictions"),
        comment="One answered prediction",
    )
    op.create_index("ix_predictions_image_sha256", "predictions", ["image_sha256"], unique=False)
    op.create_index(
        "ix_predictions_model_name_model_version_created_on",
        "predictions",
        ["model_name", "model_version", "created_on"],
        unique=False,
    )
    op.create_table(
        "api_log",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("entry_id", sa.Uuid(), nullable=False, comment="makes draining idempotent"),
        sa.Column("request_method", sa.Text(), nullable=False),
        sa.Column("request_url", sa.Text(), nullable=False),
        sa.Column("response_status_code", sa.Integer(), nullable=False),
        sa.Column("response_message", sa.Text(), nullable=False),
        sa.Column("timespan", sa.Double(), nullable=False, comment="seconds"),
        sa.Column("prediction_id", sa.Uuid(), nullable=True),
        sa.Column("model_version", sa.Text(), nullable=True),
        sa.Column("client_error", sa.Text(), nullable=True),
        sa.Column("created_on", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["prediction_id"],
            ["predictions.prediction_id"],
            name="fk_api_log_prediction_id_predictions",
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_api_log"),
        sa.UniqueConstraint("entry_id", name="uq_api_log_entry_id"),
        comment="One request to /predict, the refused ones too",
    )
    op.create_index("ix_api_log_created_on", "api_log", ["created_on"], unique=False)
    op.create_index("ix_api_log_prediction_id", "api_log", ["prediction_id"], unique=False)


def downgrade() -> None:
    op.drop_index("ix_api_log_prediction_id", table_name="api_log")
    op.drop_index("ix_api_log_created_on", table_name="api_log")
    op.drop_table("api_log")
    op.drop_index("ix_predictions_model_name_model_version_created_on", table_name="predictions")
    op.drop_index("ix_predictions_image_sha256", table_name="predictions")
    op.drop_table("predictions")
    op.drop_table("images")
    op.drop_index("ix_feedback_prediction_id_created_on", table_name="feedback")
    op.drop_table("feedback")
    op.drop_index("ix_drift_reports_experiment_created_on", table_name="drift_reports")
    op.drop_table("drift_reports")
