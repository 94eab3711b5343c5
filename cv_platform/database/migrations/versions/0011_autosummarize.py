"""What came last is in the index of `logged_on` soon, not at the next vacuum; no row is read or written anew for it."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER INDEX ix_predictions_logged_on SET (autosummarize = on)")
    # Only what comes from now on is summed up by itself.
    op.execute("SELECT brin_summarize_new_values('ix_predictions_logged_on')")


def downgrade() -> None:
    op.execute("ALTER INDEX ix_predictions_logged_on RESET (autosummarize)")
