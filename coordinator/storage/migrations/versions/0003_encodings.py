"""What encoded versions need, and the numbers of an aggregation."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for table in ("commands", "versions"):
        op.add_column(table, sa.Column("encoded_digest", sa.String(length=64), server_default="", nullable=False))
        op.add_column(table, sa.Column("encoded_size", sa.BigInteger(), server_default="0", nullable=False))
        op.add_column(table, sa.Column("residual_digest", sa.String(length=64), server_default="", nullable=False))
    op.add_column("commands", sa.Column("metrics", sa.JSON()))
    op.create_index(op.f("ix_versions_encoded_digest"), "versions", ["encoded_digest"])
    op.create_index(op.f("ix_versions_residual_digest"), "versions", ["residual_digest"])
