"""What agents do to the store: take tasks, report, hand in results.

Each call looks and writes in one `write()`, where nobody else writes meanwhile (database.py): what it saw still holds
when it writes. A grant of an older generation is fenced, and a repeat of a finished call gets the answer that the first
one got.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, and_, case, insert, or_, select, update

from coordinator.rounds.state import Fate, JobState, Phase, Task, TaskKind, TaskState
from coordinator.storage import schema
from coordinator.storage.database import Database
from coordinator.storage.grants import Grant, grant_of, live_jobs
from protos.errors import AlreadyExists, Conflict, LeaseFenced, NotFound

# A task that failed this often is not offered again: see rounds.machine.MAX_FAILURES.
HOPELESS = 1000
# Failed tasks in a row, over rounds, after which a site is set aside.
SET_ASIDE_AFTER = 3
_LIVE = (TaskState.LEASED.value, TaskState.RUNNING.value)
# A lease that ran out, as long as nobody else got the task: its holder may still go on and finish. Generations fence.
_HELD = (TaskState.QUEUED.value, *_LIVE)
# What holds up a round goes first.
_PRIORITY = case({kind.value: place for place, kind in enumerate(TaskKind)}, value=schema.tasks.c.kind)


@dataclass(frozen=True)
class Result:
    """What a site hands in with a task that succeeded."""

    digest: str = ""
    size: int = 0
    examples: int = 0
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    files: tuple[tuple[str, str, int], ...] = ()  # INIT: (name, digest, size)
    base_digest: str = ""

    @property
    def blobs(self) -> list[str]:
        return [digest for digest in (self.digest, *(digest for _, digest, _ in self.files)) if digest]


class Work:
    def __init__(self, database: Database) -> None:
        self._database = database

    # --- tasks

    def sites_with_work(self) -> frozenset[str]:
        """Sites that have a task which is not over, of a job that runs."""
        tasks, jobs = schema.tasks, schema.jobs
        found = (
            select(tasks.c.site)
            .join(jobs, jobs.c.id == tasks.c.job_id)
            .where(schema.OPEN, jobs.c.state == JobState.RUNNING.value)
            .distinct()
        )
        with self._database.read() as connection:
            return frozenset(connection.execute(found).scalars())

    def lease(self, site: str, *, lease_seconds: float, holding: Collection[str] = ()) -> Grant | None:
        """The next task of this site, leased; None when there is none.

        A task that is leased to the site but that its agent does not hold is granted anew.
        """
        tasks, jobs = schema.tasks, schema.jobs
        free = and_(tasks.c.state.in_(_HELD), tasks.c.id.not_in(tuple(holding)))
        next_task = (
            select(tasks, jobs.c.service_seconds)
            .join(jobs, jobs.c.id == tasks.c.job_id)
            .where(tasks.c.site == site, free, jobs.c.state == JobState.RUNNING.value)
            .order_by(_PRIORITY, jobs.c.created_unix_seconds, tasks.c.queued_at, tasks.c.id)
            .limit(1)
        )
        # An agent that works and waits for more looks each second: that must not cost the write lock.
        with self._database.read() as connection:
            if connection.execute(next_task).first() is None:
                return None
        with self._database.write() as connection:
            row = connection.execute(next_task).first()
            if row is None:
                return None
            connection.execute(
                update(tasks)
                .where(tasks.c.id == row.id)
                .values(
                    state=TaskState.LEASED.value,
                    generation=row.generation + 1,
                    lease_until=row.service_seconds + lease_seconds,
                    # Whoever takes it late, because it had other work, did not stand still until then.
                    last_progress_at=row.last_progress_at if row.lease_until else row.service_seconds,
                )
            )
            leased = connection.execute(select(tasks).where(tasks.c.id == row.id)).one()
            return grant_of(connection, task_of(leased))

    def live_jobs(self) -> frozenset[str]:
        """The jobs that go on, or that the operator may let go on."""
        with self._database.read() as connection:
            return live_jobs(connection)

    def heartbeat(
        self, task_id: str, *, site: str, generation: int, progress: Mapping[str, Any], lease_seconds: float
    ) -> tuple[bool, str]:
        """(whether to go on, why not). LeaseFenced when a newer grant replaced this one; NotFound."""
        tasks, jobs = schema.tasks, schema.jobs
        # Every busy agent does this every few seconds: two statements, and no more, under the lock.
        mine = select(tasks, jobs.c.service_seconds).join(jobs, jobs.c.id == tasks.c.job_id)
        with self._database.write() as connection:
            row = connection.execute(mine.where(tasks.c.id == task_id, tasks.c.site == site)).first()
            if row is None:
                raise _unknown()
            if row.generation != generation:
                raise _fenced(task_id)
            if row.state not in _HELD:
                return False, row.reason or f"the task is {row.state.lower()}"
            now = row.service_seconds
            moved = _measure(progress) != _measure(row.progress)
            connection.execute(
                update(tasks)
                .where(tasks.c.id == task_id)
                .values(
                    state=TaskState.RUNNING.value,
                    lease_until=now + lease_seconds,
                    progress=dict(progress),
                    last_progress_at=now if moved else row.last_progress_at,
                )
            )
            return True, ""

    def live(self, task_id: str, *, site: str, generation: int) -> Task:
        """The task, when this grant of it is the current one and work on it is wanted. LeaseFenced, NotFound."""
        with self._database.read() as connection:
            row = _own(connection, task_id, site=site)
        if row.generation != generation or row.state not in _HELD:
            raise _fenced(task_id)
        return task_of(row)

    def finish(
        self, task_id: str, *, site: str, generation: int, result: Result, sealed_size: Callable[[str], int | None]
    ) -> tuple[Fate, str]:
        """Records a result once: an update counts by (job, round, site) and its digest.

        LeaseFenced, NotFound; AlreadyExists: another result of this task is recorded; Conflict: a blob of it is gone.
        """
        with self._database.write() as connection:
            row = _own(connection, task_id, site=site)
            recorded = _recorded(connection, row, result)
            if recorded is not None:
                return recorded
            if row.generation != generation:
                raise _fenced(task_id)
            task = task_of(row)
            if task.state.open:
                # In this transaction: the one that deletes blobs cannot run beside it (storage/garbage.py).
                gone = next((digest for digest in result.blobs if sealed_size(digest) is None), "")
                if gone:
                    raise Conflict(f"The blob {gone[:16]} is not here.", hint="Upload it again, then report again.")
                self._end(connection, task, TaskState.SUCCEEDED, "", result=result)
                fate, reason = _record(connection, task, result)
            elif _may_be_asked_again(connection, task):
                # The next attempt of the round will want this very update: the agent keeps it and is asked for it.
                raise _fenced(task_id)
            else:
                fate, reason = Fate.DISCARDED, task.reason or "the round closed before this arrived"
                if task.kind is TaskKind.TRAIN:
                    _insert_update(connection, task, result, fate=fate, reason=reason)
            return fate, reason

    def fail(self, task_id: str, *, site: str, generation: int, state: TaskState, reason: str) -> None:
        """FAILED or DECLINED by the site."""
        with self._database.write() as connection:
            row = _own(connection, task_id, site=site)
            if row.state == state.value and row.reason == reason:
                return
            if row.generation != generation:
                raise _fenced(task_id)
            if row.state in _HELD:
                task = task_of(row)
                self._end(connection, task, state, reason, failures=row.failures + 1)
                _note_failure(connection, task, reason, at_once=state is TaskState.DECLINED)

    def reject(self, task_id: str, *, site: str, generation: int, result: Result, reason: str) -> None:
        """The update is invalid: recorded with its reason, and the site does not get the task again."""
        with self._database.write() as connection:
            row = _own(connection, task_id, site=site)
            if row.generation != generation:
                raise _fenced(task_id)
            if row.state in _HELD:
                task = task_of(row)
                self._end(connection, task, TaskState.FAILED, reason, failures=row.failures + HOPELESS)
                _note_failure(connection, task, reason)
                if task.kind is TaskKind.TRAIN:
                    _insert_update(connection, task, result, fate=Fate.REJECTED, reason=reason)

    def _end(
        self,
        connection: Connection,
        task: Task,
        state: TaskState,
        reason: str,
        *,
        failures: int | None = None,
        result: Result | None = None,
    ) -> None:
        values: dict[str, Any] = {"state": state.value, "reason": reason}
        if failures is not None:
            values["failures"] = failures
        if result is not None and task.kind is TaskKind.INIT:
            values["result"] = {"digest": result.digest, "size": result.size, "base_digest": result.base_digest}
        if result is not None and task.kind is TaskKind.DISTILL:
            values["result"] = {"digest": result.digest, "size": result.size, "metrics": dict(result.metrics)}
        done = connection.execute(
            update(schema.tasks)
            .where(schema.tasks.c.id == task.id, schema.tasks.c.generation == task.generation)
            .where(schema.tasks.c.state.in_(_HELD))
            .values(**values)
        )
        if done.rowcount != 1:
            raise _fenced(task.id)
        # A transition that was computed without knowing this must not be written.
        jobs = schema.jobs
        connection.execute(update(jobs).where(jobs.c.id == task.job_id).values(revision=jobs.c.revision + 1))


def task_of(row: Row[Any]) -> Task:
    progress = row.progress
    return Task(
        id=row.id,
        job_id=row.job_id,
        round=row.round,
        kind=TaskKind(row.kind),
        site=row.site,
        version=row.version,
        split=row.split,
        state=TaskState(row.state),
        generation=row.generation,
        queued_at=row.queued_at,
        lease_until=row.lease_until,
        last_progress_at=row.last_progress_at,
        failures=row.failures,
        stage=progress.get("stage", ""),
        done=progress.get("done", 0),
        total=progress.get("total", 0),
        unit=progress.get("unit", ""),
        metrics=progress.get("metrics", {}),
        reason=row.reason,
    )


def _own(connection: Connection, task_id: str, *, site: str) -> Row[Any]:
    row = connection.execute(
        select(schema.tasks).where(schema.tasks.c.id == task_id, schema.tasks.c.site == site)
    ).first()
    if row is None:
        raise _unknown()
    return row


def _unknown() -> NotFound:
    return NotFound("There is no such task for this site.")


def _fenced(task_id: str) -> LeaseFenced:
    return LeaseFenced(f"This lease of task {task_id} is no longer the current one.", hint="Ask for work again.")


def _measure(progress: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(progress.get(key) for key in ("stage", "done", "total"))


def _note_recorded(connection: Connection, task: Task, result: Result) -> None:
    """The uploads have become a result."""
    uploads = schema.uploads
    mine = and_(uploads.c.owner == task.site, uploads.c.digest.in_(result.blobs))
    connection.execute(update(uploads).where(mine).values(recorded=True))


def _recorded(connection: Connection, row: Row[Any], result: Result) -> tuple[Fate, str] | None:
    """The answer that this result got before, if it was handed in before."""
    if row.kind == TaskKind.TRAIN.value:
        updates = schema.updates
        found = connection.execute(
            select(updates).where(
                updates.c.job_id == row.job_id, updates.c.round == row.round, updates.c.site == row.site
            )
        ).first()
        if found is None or (found.fate != Fate.ACCEPTED.value and row.state in _HELD):
            return None
        if found.digest != result.digest and found.fate != Fate.ACCEPTED.value:
            return None
        if found.digest != result.digest:
            raise AlreadyExists(f"Another update of {row.site} for round {row.round} is recorded already.")
        return Fate(found.fate), found.reason
    if row.state != TaskState.SUCCEEDED.value:
        return None
    if row.kind != TaskKind.EVALUATE.value and row.result.get("digest") != result.digest:
        raise AlreadyExists("Another version of this site is recorded already.")
    return Fate.ACCEPTED, ""


def _record(connection: Connection, task: Task, result: Result) -> tuple[Fate, str]:
    if task.kind is TaskKind.EVALUATE:
        connection.execute(
            insert(schema.evaluations).values(
                job_id=task.job_id,
                version=task.version,
                site=task.site,
                split=task.split,
                examples=result.examples,
                metrics=dict(result.metrics),
                seconds=dict(result.seconds),
            )
        )
    elif task.kind is TaskKind.INIT:
        connection.execute(schema.files.delete().where(schema.files.c.job_id == task.job_id))
        for name, digest, size in result.files:
            connection.execute(insert(schema.files).values(job_id=task.job_id, name=name, digest=digest, size=size))
        _note_recorded(connection, task, result)
    elif task.kind is TaskKind.DISTILL:
        _note_recorded(connection, task, result)
    else:
        collecting = connection.execute(
            select(schema.rounds.c.phase).where(
                schema.rounds.c.job_id == task.job_id, schema.rounds.c.number == task.round
            )
        ).scalar_one()
        fate, reason = Fate.ACCEPTED, ""
        if collecting != Phase.COLLECTING.value:
            fate, reason = Fate.DISCARDED, f"round {task.round} closed before this update arrived"
        _insert_update(connection, task, result, fate=fate, reason=reason)
        connection.execute(schema.standings.delete().where(_standing(task), ~schema.standings.c.set_aside))
        return fate, reason
    return Fate.ACCEPTED, ""


def _may_be_asked_again(connection: Connection, task: Task) -> bool:
    rounds, jobs = schema.rounds, schema.jobs
    now = connection.execute(
        select(rounds.c.phase, jobs.c.state)
        .join(jobs, jobs.c.id == rounds.c.job_id)
        .where(rounds.c.job_id == task.job_id, rounds.c.number == task.round)
    ).first()
    if now is None or task.kind is not TaskKind.TRAIN:
        return False
    # A failed job may be resumed, and then this round is the one that goes on.
    failed = now.phase == Phase.FAILED.value and now.state == JobState.FAILED.value
    return failed or now.phase in (Phase.SELECTING.value, Phase.COLLECTING.value)


def _standing(task: Task):  # type: ignore[no-untyped-def]
    return and_(schema.standings.c.job_id == task.job_id, schema.standings.c.site == task.site)


def _note_failure(connection: Connection, task: Task, reason: str, *, at_once: bool = False) -> None:
    if task.kind is not TaskKind.TRAIN:
        return
    before = connection.execute(select(schema.standings).where(_standing(task))).first()
    count = 1 if before is None else before.failures_in_a_row + 1
    values = {"failures_in_a_row": count, "set_aside": at_once or count >= SET_ASIDE_AFTER, "reason": reason}
    if before is None:
        connection.execute(insert(schema.standings).values(job_id=task.job_id, site=task.site, **values))
    else:
        connection.execute(update(schema.standings).where(_standing(task)).values(**values))


def _insert_update(connection: Connection, task: Task, result: Result, *, fate: Fate, reason: str) -> None:
    updates = schema.updates
    key = and_(updates.c.job_id == task.job_id, updates.c.round == task.round, updates.c.site == task.site)
    # A rejected or discarded update makes room for the one of the round's next attempt.
    connection.execute(
        updates.delete().where(key, or_(*(updates.c.fate == f.value for f in Fate if f != Fate.ACCEPTED)))
    )
    connection.execute(
        insert(updates).values(
            job_id=task.job_id,
            round=task.round,
            site=task.site,
            fate=fate.value,
            reason=reason,
            digest=result.digest,
            size=result.size,
            examples=result.examples,
            steps=result.steps,
            metrics=dict(result.metrics),
            seconds=dict(result.seconds),
        )
    )
    _note_recorded(connection, task, result)
