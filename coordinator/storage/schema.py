"""The tables. Everything that must survive is a row here or a blob that a row names.

Uniqueness does the work that locks would do badly: one update for each (job, round, site), one version for each
(job, number), one evaluation for each (job, version, site, split). `migrations/` builds the same tables step by step.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    literal_column,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

sites = Table(
    "sites",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("state", String(16), nullable=False),  # INVITED -> ENROLLED -> REVOKED
    # Certificates that were issued before this are of an earlier enrollment and no longer good.
    Column("enrolled_unix_seconds", Float, nullable=False, default=0.0),
    Column("certificate_serial", String(64), nullable=False, default=""),
    Column("certificate_expires_unix_seconds", Float, nullable=False, default=0.0),
    Column("last_seen_unix_seconds", Float, nullable=False, default=0.0),
    # Raised each time the site is noted as seen: who watches it change knows that the site is there, by his own clock.
    Column("calls", BigInteger, nullable=False, default=0, server_default="0"),
    Column("agent", JSON, nullable=False, default=dict),  # the last AgentInfo
)

invitations = Table(
    "invitations",
    metadata,
    Column("secret_hash", String(64), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("role", String(16), nullable=False),
    Column("expires_unix_seconds", Float, nullable=False),
    Column("used_by_key", String(64), nullable=False, default=""),  # hash of the key that it was redeemed for
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("submit_token", String(128), unique=True),
    Column("spec", Text, nullable=False),  # canonical JSON
    Column("state", String(16), nullable=False),  # see rounds/state.py
    Column("sentence", Text, nullable=False, default=""),
    Column("base_digest", String(64), nullable=False, default=""),
    Column("head_version", BigInteger),
    Column("best_version", BigInteger),
    Column("service_seconds", Float, nullable=False, default=0.0),
    Column("created_unix_seconds", Float, nullable=False),
    # Raised by every transition: a step that was computed from older facts is refused.
    Column("revision", BigInteger, nullable=False, default=0),
    # Which replica drives the job. A new driver raises the generation, which fences the one before; the driver raises
    # the beats each turn, and a replica that has seen them stand still for long enough, by its own clock, takes over.
    Column("driver", String(63), nullable=False, default="", server_default=""),
    Column("driver_generation", BigInteger, nullable=False, default=0, server_default="0"),
    Column("driver_beats", BigInteger, nullable=False, default=0, server_default="0"),
)

rounds = Table(
    "rounds",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("number", BigInteger, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("cohort", JSON, nullable=False),
    Column("opened_at", Float, nullable=False),
    Column("deadline_at", Float, nullable=False),
    Column("collecting_at", Float),
    Column("aggregating_at", Float),
    Column("distilling_at", Float),
    Column("ended_at", Float),
    Column("sentence", Text, nullable=False, default=""),
    # Why the aggregate became the version as it is, where the recipe asks for a distillation.
    Column("undistilled", Text, nullable=False, default="", server_default=""),
)

tasks = Table(
    "tasks",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("round", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("site", String(63), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("split", String(16), nullable=False, default=""),
    Column("state", String(16), nullable=False),
    Column("generation", BigInteger, nullable=False, default=0),
    Column("queued_at", Float, nullable=False),
    Column("lease_until", Float, nullable=False, default=0.0),
    Column("last_progress_at", Float, nullable=False),
    Column("failures", Integer, nullable=False, default=0),
    Column("progress", JSON, nullable=False, default=dict),
    Column("reason", Text, nullable=False, default=""),
    Column("bytes_up", BigInteger, nullable=False, default=0),
    Column("bytes_down", BigInteger, nullable=False, default=0),
    # INIT: digest, size and base digest of version 0. DISTILL: digest, size and metrics of the version.
    Column("result", JSON, nullable=False, default=dict),
    Index("ix_tasks_site_state", "site", "state"),
    Index("ix_tasks_job_round", "job_id", "round"),
)
# What is not over is a handful of rows among millions. Spelled out, not bound: the index is used only for a condition
# that is known to be its own.
OPEN = tasks.c.state.in_([literal_column("'QUEUED'"), literal_column("'LEASED'"), literal_column("'RUNNING'")])
open_tasks = Index("ix_tasks_open", tasks.c.job_id, tasks.c.site, sqlite_where=OPEN, postgresql_where=OPEN)

# How a site stands in a job. Set aside: it is not drawn again until the operator readmits it.
standings = Table(
    "standings",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("failures_in_a_row", Integer, nullable=False, default=0),
    Column("set_aside", Boolean, nullable=False, default=False),
    Column("reason", Text, nullable=False, default=""),
)

updates = Table(
    "updates",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("round", BigInteger, primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("fate", String(16), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("digest", String(64), nullable=False, index=True),
    Column("size", BigInteger, nullable=False),
    Column("examples", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("metrics", JSON, nullable=False, default=dict),
    Column("seconds", JSON, nullable=False, default=dict),
)

commands = Table(
    "commands",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("round", BigInteger, primary_key=True),
    Column("generation", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("contributions", JSON, nullable=False),
    Column("queued_at", Float, nullable=False),
    Column("digest", String(64), nullable=False, default=""),
    Column("size", BigInteger, nullable=False, default=0),
    Column("optimizer_digest", String(64), nullable=False, default=""),
    # See versions.
    Column("encoded_digest", String(64), nullable=False, default="", server_default=""),
    Column("encoded_size", BigInteger, nullable=False, default=0, server_default="0"),
    Column("residual_digest", String(64), nullable=False, default="", server_default=""),
    # What the aggregation measured of itself, once it is done.
    Column("metrics", JSON),
    Column("error", Text, nullable=False, default=""),
    Column("corrupt_site", String(63), nullable=False, default=""),
    Column("seconds", JSON, nullable=False, default=dict),
)

versions = Table(
    "versions",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("size", BigInteger, nullable=False),
    # State of the server optimizer after this version; empty without one.
    Column("optimizer_digest", String(64), nullable=False, default="", index=True),
    # The same version as a rounded difference from version 0, and what that rounding lost; empty without an encoding.
    Column("encoded_digest", String(64), nullable=False, default="", server_default="", index=True),
    Column("encoded_size", BigInteger, nullable=False, default=0, server_default="0"),
    Column("residual_digest", String(64), nullable=False, default="", server_default="", index=True),
    Column("contributions", JSON, nullable=False),
    Column("committed_unix_seconds", Float, nullable=False),
    # Its bytes were deleted, because the settings keep only so many versions; the record stays.
    Column("deleted", Boolean, nullable=False, default=False, server_default="0"),
    # It is measured, and not compared with the best version yet. Of thousands of versions that is the last few.
    Column("unjudged", Boolean, nullable=False, default=False, server_default="0"),
)
unjudged_versions = Index(
    "ix_versions_unjudged",
    versions.c.job_id,
    sqlite_where=versions.c.unjudged,
    postgresql_where=versions.c.unjudged,
)

# The record of a version holds the part of every site; which ones are kept must be known without reading them all.
kept_versions = Index(
    "ix_versions_kept",
    versions.c.job_id,
    versions.c.version,
    sqlite_where=~versions.c.deleted,
    postgresql_where=~versions.c.deleted,
)

files = Table(
    "files",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("name", String(200), primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("size", BigInteger, nullable=False),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("split", String(16), primary_key=True),
    Column("examples", BigInteger, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("seconds", JSON, nullable=False, default=dict),
)

uploads = Table(
    "uploads",
    metadata,
    Column("owner", String(63), primary_key=True),
    Column("digest", String(64), primary_key=True, index=True),
    Column("size", BigInteger, nullable=False),
    # A result was handed in with it: for another result the owner uploads it again.
    Column("recorded", Boolean, nullable=False, default=False, server_default="0"),
)

# Base models that sites may fetch for a job of theirs. Complete: all of its blobs have arrived, and they stay.
base_models = Table(
    "base_models",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("files", JSON, nullable=False),  # [[name, digest, size], ...]
    Column("complete", Boolean, nullable=False),
)

# What is true of this database as a whole, such as which blob store belongs to it.
federation = Table(
    "federation",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("value", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("unix_seconds", Float, nullable=False),
    Column("job_id", String(80), nullable=False, index=True),
    Column("round", BigInteger, nullable=False),
    Column("sentence", Text, nullable=False),
)
