"""The phase DISTILLING: when it began, and why a round went without it."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("rounds", sa.Column("distilling_at", sa.Float()))
    op.add_column("rounds", sa.Column("undistilled", sa.Text(), server_default="", nullable=False))
