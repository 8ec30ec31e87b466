"""A task with everything that its agent must know about the job, read when the task is leased."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, select

from coordinator.rounds.state import Fate, JobState, Task, TaskKind
from coordinator.storage import schema
from coordinator.storage.base_models import File, files_for
from protos import jobspec

_FINAL = tuple(state.value for state in JobState if state.final)


@dataclass(frozen=True)
class Grant:
    task: Task
    spec_json: str
    base_digest: str
    model_digest: str  # empty for INIT
    model_size: int
    # The same version as a difference from version 0, and the digest of that; empty where versions travel raw.
    encoded_digest: str = ""
    encoded_size: int = 0
    initial_digest: str = ""
    # TRAIN with error feedback: the latest round whose committed version this site's update counted in; 0: none.
    counted_round: int = 0
    # Of the base model, where the coordinator has it: name, digest, size.
    base_files: tuple[File, ...] = ()


def grant_of(connection: Connection, task: Task) -> Grant:
    jobs, versions = schema.jobs, schema.versions
    job = connection.execute(select(jobs.c.spec, jobs.c.base_digest).where(jobs.c.id == task.job_id)).one()
    spec = jobspec.from_json(job.spec)
    base_files = files_for(connection, spec, base_digest=job.base_digest)
    if task.kind is TaskKind.INIT:
        return Grant(task, job.spec, job.base_digest, "", 0, base_files=base_files)
    of_job = select(versions).where(versions.c.job_id == task.job_id)
    model = connection.execute(of_job.where(versions.c.version == task.version)).first()
    encoding = spec.encoding
    initial = None
    if encoding.down != "raw":
        initial = connection.execute(of_job.where(versions.c.version == 0)).first()
    keeps_residual = task.kind is TaskKind.TRAIN and encoding.up != "raw" and encoding.error_feedback
    return Grant(
        task=task,
        spec_json=job.spec,
        base_digest=job.base_digest,
        model_digest=model.digest if model else "",
        model_size=model.size if model else 0,
        encoded_digest=model.encoded_digest if model else "",
        encoded_size=model.encoded_size if model else 0,
        initial_digest=initial.digest if initial else "",
        counted_round=_counted_round(connection, task) if keeps_residual else 0,
        base_files=base_files,
    )


def _counted_round(connection: Connection, task: Task) -> int:
    updates, versions = schema.updates, schema.versions
    rows = connection.execute(
        select(versions.c.version, versions.c.contributions)
        .join(updates, (updates.c.job_id == versions.c.job_id) & (updates.c.round == versions.c.version))
        .where(updates.c.job_id == task.job_id, updates.c.site == task.site, updates.c.fate == Fate.ACCEPTED.value)
        .order_by(versions.c.version.desc())
    )
    for row in rows:
        if any(part["site"] == task.site for part in row.contributions):
            return row.version
    return 0


def ended_jobs(connection: Connection, job_ids: Collection[str]) -> list[str]:
    """Those of these jobs with which nothing goes on any more, or that nobody here knows."""
    jobs = schema.jobs
    going_on = select(jobs.c.id).where(jobs.c.id.in_(tuple(job_ids)), jobs.c.state.not_in(_FINAL))
    return sorted(set(job_ids) - set(connection.execute(going_on).scalars()))
