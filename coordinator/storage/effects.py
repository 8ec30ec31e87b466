"""How each effect of a transition is written. Called inside the transaction of `Jobs.apply`, nowhere else."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, and_, insert, select, update

from coordinator.rounds import state as s
from coordinator.storage import schema
from protos.errors import Internal

_OPEN = tuple(state.value for state in s.TaskState if state.open)


def carry_out(
    connection: Connection, job: s.Job, number: int | None, effect: s.Effect, now_unix_seconds: float
) -> int | None:
    """Writes one effect of a step that was taken at round `number`; returns the round that the job is in now."""
    now = job.service_seconds
    if isinstance(effect, s.OpenRound):
        _open(connection, job, effect)
        return effect.number
    if isinstance(effect, s.SetJobState):
        connection.execute(update(schema.jobs).where(schema.jobs.c.id == job.id).values(state=effect.state.value))
        if effect.state.ended:
            tasks = schema.tasks
            connection.execute(
                update(tasks)
                .where(tasks.c.job_id == job.id, tasks.c.state.in_(_OPEN))
                .values(state=s.TaskState.EXPIRED.value, reason=over(effect.state))
            )
    elif isinstance(effect, s.Judged):
        versions = schema.versions
        connection.execute(
            update(versions)
            .where(versions.c.job_id == job.id, versions.c.version.in_(effect.versions))
            .values(unjudged=False)
        )
    elif isinstance(effect, s.SetBest):
        connection.execute(update(schema.jobs).where(schema.jobs.c.id == job.id).values(best_version=effect.version))
    elif isinstance(effect, s.SetCohort):
        _round(connection, job, number, cohort=list(effect.cohort), phase=s.Phase.COLLECTING.value)
        _stamp(connection, job, number, collecting_at=now)
    elif isinstance(effect, s.QueueTask):
        _queue(connection, job, effect)
    elif isinstance(effect, s.EndTask):
        tasks = schema.tasks
        connection.execute(
            update(tasks)
            .where(tasks.c.id == effect.task_id, tasks.c.state.in_(_OPEN))
            .values(state=effect.state.value, reason=effect.reason)
        )
    elif isinstance(effect, s.RejectUpdate):
        updates = schema.updates
        connection.execute(
            update(updates)
            .where(updates.c.job_id == job.id, updates.c.round == number, updates.c.site == effect.site)
            .values(fate=s.Fate.REJECTED.value, reason=effect.reason)
        )
    elif isinstance(effect, s.Aggregate):
        _round(connection, job, number, phase=s.Phase.AGGREGATING.value)
        _stamp(connection, job, number, aggregating_at=now)
        _command(connection, job, number, effect)
    elif isinstance(effect, s.Distill):
        _round(connection, job, number, phase=s.Phase.DISTILLING.value, deadline_at=effect.deadline_at)
        _stamp(connection, job, number, distilling_at=now)
    elif isinstance(effect, s.Commit):
        _commit(connection, job, number, effect, now_unix_seconds)
    elif isinstance(effect, s.FailRound):
        _round(connection, job, number, phase=s.Phase.FAILED.value, ended_at=now)
    else:
        raise Internal(f"The store does not know the effect {type(effect).__name__}.")
    return number


def over(state: s.JobState) -> str:
    """The reason of tasks that end with their job."""
    return f"the job has {state.value.lower()}"


def note(connection: Connection, job_id: str, round_number: int, sentence: str, now_unix_seconds: float) -> None:
    """One more decision for the record."""
    connection.execute(
        insert(schema.events).values(
            unix_seconds=now_unix_seconds, job_id=job_id, round=round_number, sentence=sentence
        )
    )


def task_id(job_id: str, effect: s.QueueTask) -> str:
    """One id for one piece of work, so that queueing it twice is queueing it once."""
    parts = [job_id, str(effect.round), effect.kind.value.lower(), effect.site, effect.split]
    return ".".join(part for part in parts if part)


def _open(connection: Connection, job: s.Job, effect: s.OpenRound) -> None:
    values: dict[str, Any] = {
        "attempt": effect.attempt,
        "phase": s.Phase.SELECTING.value,
        "opened_at": job.service_seconds,
        "deadline_at": effect.deadline_at,
        "ended_at": None,
        "cohort": [],
    }
    key = and_(schema.rounds.c.job_id == job.id, schema.rounds.c.number == effect.number)
    if connection.execute(select(schema.rounds.c.number).where(key)).first():
        connection.execute(update(schema.rounds).where(key).values(**values))
    else:
        connection.execute(insert(schema.rounds).values(job_id=job.id, number=effect.number, **values))


def _round(connection: Connection, job: s.Job, number: int | None, **values: Any) -> None:
    rounds = schema.rounds
    done = connection.execute(
        update(rounds).where(rounds.c.job_id == job.id, rounds.c.number == number).values(**values)
    )
    if done.rowcount != 1:
        raise Internal(f"Job {job.id} has no round {number}.")


def _stamp(connection: Connection, job: s.Job, number: int | None, **times: float) -> None:
    """Notes when a phase began, the first time only: a substitute in mid-round does not begin it anew."""
    for column, value in times.items():
        rounds = schema.rounds
        connection.execute(
            update(rounds)
            .where(rounds.c.job_id == job.id, rounds.c.number == number, rounds.c[column].is_(None))
            .values({column: value})
        )


def _queue(connection: Connection, job: s.Job, effect: s.QueueTask) -> None:
    tasks = schema.tasks
    identifier = task_id(job.id, effect)
    before = connection.execute(select(tasks).where(tasks.c.id == identifier)).first()
    fresh = {"state": s.TaskState.QUEUED.value, "reason": ""}
    start = {
        "queued_at": job.service_seconds,
        "last_progress_at": job.service_seconds,
        "lease_until": 0.0,
        "progress": {},
    }
    if before is None:
        connection.execute(
            insert(tasks).values(
                id=identifier,
                job_id=job.id,
                round=effect.round,
                kind=effect.kind.value,
                site=effect.site,
                version=effect.version,
                split=effect.split,
                result={},
                **fresh,
                **start,
            )
        )
    elif before.state in _OPEN:
        # The lease ran out: the generation is raised by the next grant, and silence goes on being counted. What was
        # told before it stays, for the sentence that says who is silent.
        connection.execute(update(tasks).where(tasks.c.id == identifier).values(**fresh))
    else:
        # A new try after an end: whoever held the old grant must not report it a second time.
        raised = {"generation": tasks.c.generation + 1}
        connection.execute(update(tasks).where(tasks.c.id == identifier).values(**fresh, **start, **raised))


def _command(connection: Connection, job: s.Job, number: int | None, effect: s.Aggregate) -> None:
    commands = schema.commands
    connection.execute(commands.delete().where(commands.c.job_id == job.id, commands.c.round == number))
    connection.execute(
        insert(commands).values(
            job_id=job.id,
            round=number,
            generation=effect.generation,
            state=s.CommandState.QUEUED.value,
            contributions=[asdict(part) for part in effect.contributions],
            queued_at=job.service_seconds,
            error=effect.last_error,
        )
    )


def _commit(connection: Connection, job: s.Job, number: int | None, effect: s.Commit, now_unix_seconds: float) -> None:
    commands = schema.commands
    # How it is encoded is nothing that a decision depends on, so it goes from row to row.
    mine = and_(commands.c.job_id == job.id, commands.c.round == effect.version)
    made = connection.execute(
        select(commands.c.encoded_digest, commands.c.encoded_size, commands.c.residual_digest).where(mine)
    ).first()
    aggregate = connection.execute(select(commands.c.digest, commands.c.size).where(mine)).first()
    if aggregate is not None and aggregate.digest not in ("", effect.digest):
        # What was distilled is needed no more; as an upload that is settled it goes with the next sweep.
        uploads = schema.uploads
        connection.execute(uploads.delete().where(uploads.c.owner == "", uploads.c.digest == aggregate.digest))
        connection.execute(insert(uploads).values(owner="", recorded=True, **aggregate._asdict()))
    connection.execute(
        insert(schema.versions).values(
            **(made._asdict() if made else {}),
            job_id=job.id,
            version=effect.version,
            digest=effect.digest,
            size=effect.size,
            optimizer_digest=effect.optimizer_digest,
            contributions=[asdict(part) for part in effect.contributions],
            committed_unix_seconds=now_unix_seconds,
            unjudged=effect.measured,
        )
    )
    _round(
        connection, job, number,
        phase=s.Phase.COMMITTED.value, ended_at=job.service_seconds, undistilled=effect.undistilled,
    )  # fmt: skip
    values: dict[str, Any] = {"head_version": effect.version}
    if effect.version == 0:
        tasks = schema.tasks
        results = connection.execute(
            select(tasks.c.result).where(tasks.c.job_id == job.id, tasks.c.kind == s.TaskKind.INIT.value)
        ).scalars()
        values["base_digest"] = next((result.get("base_digest", "") for result in results if result.get("digest")), "")
    connection.execute(update(schema.jobs).where(schema.jobs.c.id == job.id).values(**values))
