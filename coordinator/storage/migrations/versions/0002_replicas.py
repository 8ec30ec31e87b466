"""What replicas, garbage collection and long histories need."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_OPEN = sa.text("state IN ('QUEUED', 'LEASED', 'RUNNING')")


def upgrade() -> None:
    op.create_table(
        "federation",
        sa.Column("name", sa.String(length=63), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_federation")),
    )
    op.add_column("jobs", sa.Column("driver", sa.String(length=63), server_default="", nullable=False))
    op.add_column("jobs", sa.Column("driver_generation", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("driver_beats", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("sites", sa.Column("calls", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("versions", sa.Column("deleted", sa.Boolean(), server_default="0", nullable=False))
    op.add_column("versions", sa.Column("unjudged", sa.Boolean(), server_default="0", nullable=False))
    # The versions of unfinished jobs are compared once more: evaluations of some may still be under way.
    jobs = sa.table("jobs", sa.column("id", sa.String), sa.column("state", sa.String))
    versions = sa.table("versions", sa.column("job_id", sa.String), sa.column("unjudged", sa.Boolean))
    unfinished = sa.select(jobs.c.id).where(jobs.c.state.in_(("RUNNING", "PAUSED", "FAILED")))
    op.execute(sa.update(versions).where(versions.c.job_id.in_(unfinished)).values(unjudged=True))
    op.create_index(
        "ix_versions_unjudged",
        "versions",
        ["job_id"],
        sqlite_where=sa.text("unjudged = 1"),
        postgresql_where=sa.text("unjudged"),
    )
    op.create_index(
        "ix_versions_kept",
        "versions",
        ["job_id", "version"],
        sqlite_where=sa.text("deleted = 0"),
        postgresql_where=sa.text("NOT deleted"),
    )
    op.add_column("uploads", sa.Column("recorded", sa.Boolean(), server_default="0", nullable=False))
    op.create_index("ix_tasks_open", "tasks", ["job_id", "site"], sqlite_where=_OPEN, postgresql_where=_OPEN)
    op.create_index(op.f("ix_uploads_digest"), "uploads", ["digest"])
    op.create_index(op.f("ix_versions_optimizer_digest"), "versions", ["optimizer_digest"])
