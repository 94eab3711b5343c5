"""Tables of the request log. What changes here needs a migration; a test compares the two.

All times are `timestamptz`, in UTC. The SQL is kept to what PostgreSQL 17 has. Columns named as in the original system:
`request_method`, `request_url`, `response_status_code`, `response_message`, `timespan`, `prediction_id`, `created_on`,
`model_name`, `prediction_json`, `uae_feats`, `bbsd_feats`, `raw_hm`.
"""

from __future__ import annotations

from sqlalchemy import (
    REAL,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

FOLDER = "folder"
"""`predictions.client` of what nobody sent: an image of `score.source` that people are asked to label."""
SCHEMA_REVISION = "0011"
"""Newest migration. It is written here too because the service checks it without importing Alembic."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _created_on() -> Column:
    return Column("created_on", DateTime(timezone=True), nullable=False, server_default=func.now())


images = Table(
    "images",
    metadata,
    Column("sha256", Text, primary_key=True, comment="64 hex digits of the content"),
    Column("content", LargeBinary, nullable=False, comment="the upload as received"),
    Column("bytes", Integer, nullable=False),
    Column("media_type", Text, nullable=False),
    _created_on(),
    Index(None, "created_on"),
    comment="One upload, kept once however often it was sent",
)

upload_vectors = Table(
    "upload_vectors",
    metadata,
    Column("sha256", Text, ForeignKey("images.sha256", ondelete="CASCADE"), primary_key=True),
    Column("encoder", Text, primary_key=True, comment="its key; another key, other vectors"),
    Column("vector", LargeBinary, nullable=False, comment="little-endian float16; empty: the upload does not decode"),
    _created_on(),
    comment="What an upload shows, as the monitor has computed it; gone with the upload",
)

predictions = Table(
    "predictions",
    metadata,
    Column("prediction_id", Uuid, primary_key=True),
    Column("model_name", Text, nullable=False),
    Column("model_version", Text, nullable=False),
    Column("predicted_class", Text, nullable=False, comment="multi-label: positive classes joined by |"),
    Column("prediction_json", JSONB, nullable=False, comment="class name to probability"),
    Column("uae_feats", ARRAY(REAL), nullable=False, comment="UAE embedding"),
    Column("bbsd_feats", ARRAY(REAL), nullable=False, comment="probabilities in class order"),
    Column("features", ARRAY(REAL), nullable=False, comment="penultimate layer"),
    Column("properties", ARRAY(REAL), nullable=False, comment="pixel statistics of the preprocessed image"),
    Column("image_sha256", Text, ForeignKey("images.sha256"), comment="null when uploads are not kept"),
    Column("raw_hm", ARRAY(REAL), comment="Grad-CAM map in 0-1, row by row"),
    Column("hm_height", Integer),
    Column("hm_width", Integer),
    Column("client", Text, comment="8 hex digits of the SHA-256 of the API key that it came with"),
    Column("tag", Text, comment="where the client says that the image is from"),
    Column("network", Text, comment="of the client, as a trusted proxy tells: its /24 or /48, never an address"),
    _created_on(),
    Column(
        "logged_on",
        DateTime(timezone=True),
        server_default=func.clock_timestamp(),
        comment="when the row came from a spool, which an outage delays; scheduled windows go by it",
    ),
    Index(None, "model_name", "model_version", "created_on"),
    # Rows come in its order: a few pages for a whole table. What it has not summed up every window reads whole, and
    # a vacuum comes when a fifth of a table is new: https://www.postgresql.org/docs/17/brin.html#BRIN-OPERATION
    Index(None, "logged_on", postgresql_using="brin", postgresql_with={"autosummarize": "on"}),
    Index(None, "image_sha256"),
    comment="One answered prediction",
)


def is_request() -> ColumnElement[bool]:
    """Returns the SQL condition on `predictions` that somebody sent the image."""
    return predictions.c.client.is_distinct_from(FOLDER)


api_log = Table(
    "api_log",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("entry_id", Uuid, nullable=False, unique=True, comment="makes draining idempotent"),
    Column("request_method", Text, nullable=False),
    Column("request_url", Text, nullable=False),
    Column("response_status_code", Integer, nullable=False),
    Column("response_message", Text, nullable=False),
    Column("timespan", Double, nullable=False, comment="seconds"),
    Column("prediction_id", Uuid, ForeignKey("predictions.prediction_id", ondelete="SET NULL")),
    Column("model_version", Text),
    Column("client_error", Text),
    _created_on(),
    Index(None, "created_on"),
    Index(None, "prediction_id"),
    comment="One request to /predict, the refused ones too",
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    Column("entry_id", Uuid, nullable=False, unique=True, comment="makes draining idempotent"),
    # No foreign key: feedback may be drained before its prediction, which another replica's spool still holds.
    Column("prediction_id", Uuid, nullable=False),
    Column("true_class", Text, nullable=False),
    Column("source", Text, nullable=False),
    _created_on(),
    Index(None, "prediction_id", "created_on"),
    comment="One statement of a prediction's true class; the latest counts, all are kept",
)

deletions = Table(
    "deletions",
    metadata,
    Column("prediction_id", Uuid, primary_key=True),
    _created_on(),
    comment="A prediction that was deleted: what still waits in a spool of it does not arrive",
)

labeling_items = Table(
    "labeling_items",
    metadata,
    Column("item_id", Uuid, primary_key=True),
    Column("experiment", Text, nullable=False),
    Column("prediction_id", Uuid, ForeignKey("predictions.prediction_id", ondelete="CASCADE"), nullable=False),
    Column("reason", Text, nullable=False, comment="random or uncertain, or what else of labels.*_share"),
    Column("score", Double, nullable=False, comment="of the reason: higher was asked for first"),
    Column(
        "chance",
        Double,
        comment="of random ones: with which each request of the window was drawn; its inverse is their weight",
    ),
    Column("window_end_utc", DateTime(timezone=True), nullable=False, comment="exclusive"),
    Column("place", Integer, nullable=False, comment="in the queue, from 0"),
    Column(
        "skipped_by",
        ARRAY(Text),
        nullable=False,
        server_default="{}",
        comment="labellers who would not say what it shows",
    ),
    _created_on(),
    UniqueConstraint("experiment", "prediction_id"),
    Index(None, "prediction_id"),
    comment="One image that people are asked to label; what they say is feedback on its prediction",
)

shadow_answers = Table(
    "shadow_answers",
    metadata,
    Column("prediction_id", Uuid, ForeignKey("predictions.prediction_id", ondelete="CASCADE"), primary_key=True),
    Column("model_name", Text, nullable=False),
    Column("model_version", Text, primary_key=True, comment="of the challenger"),
    Column("predicted_class", Text, nullable=False, comment="multi-label: positive classes joined by |"),
    Column("probabilities", ARRAY(REAL), nullable=False, comment="in the challenger's class order"),
    Column("unknown_score", Double, comment="above 1: unknown; null where there is no rule"),
    Column("agrees", Boolean, nullable=False, comment="with the class that the client was told"),
    Column("seconds", Double, nullable=False, comment="in spare time: decoding and model"),
    _created_on(),
    comment="What a challenger says of an image that the champion has answered",
)

drift_reports = Table(
    "drift_reports",
    metadata,
    Column("report_id", Uuid, primary_key=True),
    Column("experiment", Text, nullable=False),
    Column("model_name", Text, nullable=False),
    Column("model_version", Text, nullable=False),
    Column("window_start_utc", DateTime(timezone=True), nullable=False, comment="inclusive"),
    Column("window_end_utc", DateTime(timezone=True), nullable=False, comment="exclusive"),
    Column("rows", Integer, nullable=False),
    Column("verdict", Text, nullable=False, comment="drift, no drift or insufficient data"),
    Column("details", JSONB, nullable=False),
    Column("report_url", Text, nullable=False),
    _created_on(),
    Index(None, "experiment", "created_on"),
    comment="One verdict on one window of predictions",
)
