"""The facts of a job, read from one state of the database: everything that a decision may depend on, and nothing else.

A step is taken at least once a second for each job, so every question here has an index and its answer does not grow
with the job's history.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Row, or_, select

from coordinator.rounds import state as s
from coordinator.rounds.evaluation import TEST
from coordinator.storage import schema
from coordinator.storage.sites import CONNECTED_SECONDS
from coordinator.storage.work import task_of
from protos import jobspec
from protos.identity import Role


def facts_of(connection: Connection, job: Row[Any], now_unix_seconds: float) -> s.Facts:
    rounds, updates = schema.rounds, schema.updates
    sites = tuple(
        s.SiteFact(
            row.name,
            house=row.role == Role.HOUSE.value,
            connected=now_unix_seconds - row.last_seen_unix_seconds <= CONNECTED_SECONDS,
        )
        for row in connection.execute(select(schema.sites).where(schema.sites.c.state == "ENROLLED"))
    )
    row = connection.execute(
        select(rounds).where(rounds.c.job_id == job.id).order_by(rounds.c.number.desc()).limit(1)
    ).first()
    if row is None:
        return s.Facts(sites=sites)
    current = s.Round(row.number, row.attempt, s.Phase(row.phase), tuple(row.cohort), row.opened_at, row.deadline_at)
    task_rows = _tasks(connection, job, row.number)
    command = connection.execute(
        select(schema.commands).where(schema.commands.c.job_id == job.id, schema.commands.c.round == row.number)
    ).first()
    head = connection.execute(
        select(schema.versions.c.size, schema.versions.c.contributions).where(
            schema.versions.c.job_id == job.id, schema.versions.c.version == job.head_version
        )
    ).first()
    last = connection.execute(
        select(rounds.c.cohort).where(rounds.c.job_id == job.id, rounds.c.number == row.number - 1, rounds.c.number > 0)
    ).scalar()
    unjudged = frozenset(
        connection.execute(
            select(schema.versions.c.version).where(schema.versions.c.job_id == job.id, schema.versions.c.unjudged)
        ).scalars()
    )
    return s.Facts(
        model_bytes=head.size if head else 0,
        last_cohort=tuple(last or ()),
        last_counted=frozenset(part["site"] for part in head.contributions) if head and last else frozenset(),
        unjudged=unjudged,
        sites=sites,
        round=current,
        tasks=tuple(task_of(r) for r in task_rows),
        updates=tuple(
            s.Update(r.site, s.Fate(r.fate), r.digest, r.size, r.examples, r.steps, r.reason)
            for r in connection.execute(
                select(updates).where(updates.c.job_id == job.id, updates.c.round == row.number)
            )
        ),
        evaluations=_evaluations(connection, job, unjudged),
        command=None if command is None else _command(command),
        set_aside={
            r.site: r.reason
            for r in connection.execute(
                select(schema.standings).where(schema.standings.c.job_id == job.id, schema.standings.c.set_aside)
            )
        },
        initial=_made(task_rows, s.TaskKind.INIT),
        distilled=_made(task_rows, s.TaskKind.DISTILL),
    )


def _made(rows: Collection[Row[Any]], kind: s.TaskKind) -> s.Contribution | None:
    """The sealed version that a task of this kind has handed in."""
    row = next((row for row in rows if row.kind == kind.value and row.result.get("digest")), None)
    return s.Contribution(row.site, row.result["digest"], row.result["size"], 1.0) if row else None


def _tasks(connection: Connection, job: Row[Any], number: int) -> list[Row[Any]]:
    """Those of the round, every one that is not over, and the test. Both questions have an index of their own."""
    tasks = schema.tasks
    tested = job.best_version if job.best_version is not None else number
    found = {
        row.id: row
        for mine in (tasks.c.round.in_((number, tested)), schema.OPEN)
        for row in connection.execute(select(tasks).where(tasks.c.job_id == job.id, mine))
        if s.TaskState(row.state).open
        or (row.split == TEST if row.kind == s.TaskKind.EVALUATE.value else row.round == number)
    }
    return [found[identifier] for identifier in sorted(found)]


def _evaluations(connection: Connection, job: Row[Any], unjudged: Collection[int]) -> tuple[s.Evaluation, ...]:
    """What is compared with the best version, and for early stopping what came after it: see Facts.unjudged."""
    found = schema.evaluations
    wanted = [found.c.version.in_({*unjudged, *([] if job.best_version is None else [job.best_version])})]
    if job.best_version is not None and jobspec.from_json(job.spec).evaluation.early_stop:
        wanted.append(found.c.version > job.best_version)
    rows = connection.execute(select(found).where(found.c.job_id == job.id, or_(*wanted)))
    return tuple(s.Evaluation(row.version, row.site, row.split, row.examples, row.metrics) for row in rows)


def _command(row: Row[Any]) -> s.Command:
    return s.Command(
        round=row.round,
        generation=row.generation,
        state=s.CommandState(row.state),
        contributions=tuple(s.Contribution(**part) for part in row.contributions),
        queued_at=row.queued_at,
        digest=row.digest,
        size=row.size,
        optimizer_digest=row.optimizer_digest,
        error=row.error,
        corrupt_site=row.corrupt_site,
        metrics=row.metrics or {},
    )
