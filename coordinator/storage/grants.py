"""A task with everything that its agent must know about the job, read when the task is leased."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from coordinator.rounds.state import Contribution, Fate, JobState, Task, TaskKind, TaskState
from coordinator.storage import schema
from coordinator.storage.base_models import File, files_for
from protos import jobspec

_FINAL = tuple(state.value for state in JobState if state.final)
_LIVE = tuple(state.value for state in TaskState if state.live)


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
    # TRAIN where a site keeps a state: the latest round whose committed version this site's update counted in;
    # DISTILL: its distillation. 0: none.
    counted_round: int = 0
    # Of the base model, where the coordinator has it: name, digest, size.
    base_files: tuple[File, ...] = ()
    # DISTILL without labels: the updates that the aggregate was made of.
    members: tuple[Contribution, ...] = ()


def grant_of(connection: Connection, task: Task) -> Grant:
    jobs, versions = schema.jobs, schema.versions
    job = connection.execute(select(jobs.c.spec, jobs.c.base_digest).where(jobs.c.id == task.job_id)).one()
    spec = jobspec.from_json(job.spec)
    base_files = files_for(connection, spec, base_digest=job.base_digest)
    if task.kind is TaskKind.INIT:
        return Grant(task, job.spec, job.base_digest, "", 0, base_files=base_files)
    if task.kind is TaskKind.DISTILL:
        made = select(schema.commands).where(*_of_round(schema.commands, task))
        aggregate = connection.execute(made).one()
        members = () if labelled(spec) else tuple(Contribution(**part) for part in aggregate.contributions)
        return Grant(
            task, job.spec, job.base_digest, aggregate.digest, aggregate.size,
            counted_round=_distilled_round(connection, task), base_files=base_files, members=members,
        )  # fmt: skip
    of_job = select(versions).where(versions.c.job_id == task.job_id)
    model = connection.execute(of_job.where(versions.c.version == task.version)).first()
    encoding = spec.encoding
    initial = None
    if encoding.down != "raw":
        initial = connection.execute(of_job.where(versions.c.version == 0)).first()
    keeps_residual = encoding.up != "raw" and encoding.error_feedback
    keeps_state = keeps_residual or spec.aggregation.rule == "scaffold" or spec.local.mentor is not None
    return Grant(
        task=task,
        spec_json=job.spec,
        base_digest=job.base_digest,
        model_digest=model.digest if model else "",
        model_size=model.size if model else 0,
        encoded_digest=model.encoded_digest if model else "",
        encoded_size=model.encoded_size if model else 0,
        initial_digest=initial.digest if initial else "",
        counted_round=_counted_round(connection, task) if task.kind is TaskKind.TRAIN and keeps_state else 0,
        base_files=base_files,
    )


def labelled(spec: jobspec.JobSpec) -> bool:
    """Whether a distillation learns from labels and a teacher, not from the sites' updates."""
    return spec.distillation is None or spec.distillation.labels


def readable_for_distilling(connection: Connection, *, site: str, digest: str) -> tuple[int, str] | None:
    """(size, task) of a blob that a live DISTILL task of this site names: the aggregate, or a member of it."""
    tasks, jobs = schema.tasks, schema.jobs
    live = (
        select(tasks.c.id, tasks.c.job_id, tasks.c.round, jobs.c.spec)
        .join(jobs, jobs.c.id == tasks.c.job_id)
        .where(tasks.c.site == site, tasks.c.state.in_(_LIVE), tasks.c.kind == TaskKind.DISTILL.value)
    )
    for task in connection.execute(live):
        made = connection.execute(select(schema.commands).where(*_of_round(schema.commands, task))).one()
        members = [] if labelled(jobspec.from_json(task.spec)) else made.contributions
        sizes = {made.digest: made.size, **{part["digest"]: part["size"] for part in members}}
        if digest in sizes:
            return sizes[digest], task.id
    return None


def _of_round(table, task):  # type: ignore[no-untyped-def]
    return table.c.job_id == task.job_id, table.c.round == task.round


def _distilled_round(connection: Connection, task: Task) -> int:
    """The latest round that this agent distilled; what it handed in in time has become the version."""
    tasks = schema.tasks
    mine = (tasks.c.job_id == task.job_id, tasks.c.round < task.round, tasks.c.site == task.site)
    done = (tasks.c.kind == TaskKind.DISTILL.value, tasks.c.state == TaskState.SUCCEEDED.value)
    found = select(tasks.c.round).where(*mine, *done).order_by(tasks.c.round.desc()).limit(1)
    return connection.execute(found).scalar() or 0


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


def live_jobs(connection: Connection) -> frozenset[str]:
    """The jobs that go on, or that the operator may let go on."""
    jobs = schema.jobs
    return frozenset(connection.execute(select(jobs.c.id).where(jobs.c.state.not_in(_FINAL))).scalars())
