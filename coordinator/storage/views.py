"""What the operator may look at: read-only records, made from one state of the database each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select

from coordinator.rounds import state as s
from coordinator.storage import schema
from coordinator.storage.database import Database
from coordinator.storage.work import task_of
from protos import jobspec
from protos.errors import Conflict, NotFound

# Of all rounds that are looked at together.
MAX_UPDATES = 10_000


@dataclass(frozen=True)
class JobRecord:
    id: str
    spec: jobspec.JobSpec
    state: s.JobState
    sentence: str
    round: int
    head_version: int | None
    best_version: int | None
    base_digest: str
    service_seconds: float
    eta_seconds: float | None
    created_unix_seconds: float


@dataclass(frozen=True)
class UpdateRecord:
    site: str
    fate: s.Fate
    reason: str
    examples: int
    steps: int
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class RoundRecord:
    number: int
    attempt: int
    phase: s.Phase
    sentence: str
    cohort: tuple[str, ...]
    # selecting, collecting, aggregating, distilling, total; and the aggregation worker's own read, combine, write.
    seconds: Mapping[str, float]
    # Payload of the round's tasks, the evaluation of the version that it made included.
    bytes_up: int
    bytes_down: int
    # What the aggregation measured of itself, such as "aggregation_error", and what the distillation did.
    metrics: Mapping[str, float] = field(default_factory=dict)
    # Why the aggregate became the version without the distillation that the recipe asks for; else empty.
    undistilled: str = ""
    updates: tuple[UpdateRecord, ...] = field(default=())


@dataclass(frozen=True)
class ModelRecord:
    version: int
    digest: str
    size: int
    contributions: tuple[s.Contribution, ...]
    files: tuple[tuple[str, str, int], ...]  # name, digest, size


@dataclass(frozen=True)
class EventRecord:
    id: int
    unix_seconds: float
    round: int
    sentence: str


class Views:
    def __init__(self, database: Database) -> None:
        self._database = database

    def jobs(self) -> list[JobRecord]:
        """All jobs, the newest first."""
        with self._database.read() as connection:
            rows = connection.execute(select(schema.jobs).order_by(schema.jobs.c.created_unix_seconds.desc())).all()
        return [self._job(row) for row in rows]

    def job(self, id_or_name: str) -> JobRecord:
        """NotFound; Conflict when several jobs have this name."""
        with self._database.read() as connection:
            rows = connection.execute(select(schema.jobs).where(schema.jobs.c.id == id_or_name)).all()
            if not rows:
                everything = connection.execute(select(schema.jobs)).all()
                rows = [row for row in everything if jobspec.from_json(row.spec).name == id_or_name]
        if not rows:
            raise NotFound(f"There is no job {id_or_name!r}.", hint="`silotune job list` shows them all.")
        if len(rows) > 1:
            ids = ", ".join(sorted(row.id for row in rows))
            raise Conflict(f"{len(rows)} jobs are named {id_or_name!r}.", hint=f"Give the id instead: {ids}.")
        return self._job(rows[0])

    def rounds(self, job_id: str, *, last: int, until: int | None = None) -> list[RoundRecord]:
        """The latest `last` rounds up to round `until`, oldest first; fewer when those have too many updates."""
        rounds, updates, tasks, commands = schema.rounds, schema.updates, schema.tasks, schema.commands
        with self._database.read() as connection:
            newest = select(rounds).where(rounds.c.job_id == job_id).order_by(rounds.c.number.desc()).limit(last)
            rows = _not_too_many(
                connection.execute(newest if until is None else newest.where(rounds.c.number <= until))
            )
            if not rows:
                return []
            numbers = (rows[-1].number, rows[0].number)
            by_round: dict[int, list[UpdateRecord]] = {}
            for row in connection.execute(
                select(updates)
                .where(updates.c.job_id == job_id, updates.c.round.between(*numbers))
                .order_by(updates.c.site)
            ):
                by_round.setdefault(row.round, []).append(
                    UpdateRecord(
                        row.site, s.Fate(row.fate), row.reason, row.examples, row.steps, row.metrics, row.seconds
                    )
                )
            traffic = {
                row.round: (int(row.up or 0), int(row.down or 0))
                for row in connection.execute(
                    select(
                        tasks.c.round,
                        func.sum(tasks.c.bytes_up).label("up"),
                        func.sum(tasks.c.bytes_down).label("down"),
                    )
                    .where(tasks.c.job_id == job_id, tasks.c.round.between(*numbers))
                    .group_by(tasks.c.round)
                )
            }
            worker = {
                row.round: row
                for row in connection.execute(
                    select(commands.c.round, commands.c.seconds, commands.c.metrics).where(
                        commands.c.job_id == job_id, commands.c.round.between(*numbers)
                    )
                )
            }
            distilled = {
                row.round: row.result.get("metrics", {})
                for row in connection.execute(
                    select(tasks.c.round, tasks.c.result)
                    .where(tasks.c.job_id == job_id, tasks.c.round.between(*numbers))
                    .where(tasks.c.kind == s.TaskKind.DISTILL.value, tasks.c.state == s.TaskState.SUCCEEDED.value)
                )
            }
        records = []
        for row in reversed(rows):
            up, down = traffic.get(row.number, (0, 0))
            made = worker.get(row.number)
            records.append(
                RoundRecord(
                    number=row.number,
                    attempt=row.attempt,
                    phase=s.Phase(row.phase),
                    sentence=row.sentence,
                    cohort=tuple(row.cohort),
                    seconds=_durations(row, made.seconds if made else {}),
                    bytes_up=up,
                    bytes_down=down,
                    metrics={**((made.metrics if made else None) or {}), **distilled.get(row.number, {})},
                    undistilled=row.undistilled,
                    updates=tuple(by_round.get(row.number, ())),
                )
            )
        return records

    def tasks(self, job_id: str, *, round_number: int) -> list[s.Task]:
        """The tasks of one round, and every evaluation that is not over."""
        tasks = schema.tasks
        with self._database.read() as connection:
            # Two questions, because each has an index.
            found = {
                row.id: task_of(row)
                for mine in (tasks.c.round == round_number, schema.OPEN)
                for row in connection.execute(select(tasks).where(tasks.c.job_id == job_id, mine))
            }
        by_site = sorted(found.values(), key=lambda task: task.site)
        return sorted(by_site, key=lambda task: task.kind.value, reverse=True)

    def paused_sites(self) -> set[str]:
        """The sites at which a task is paused."""
        tasks = schema.tasks
        with self._database.read() as connection:
            rows = connection.execute(select(tasks.c.site, tasks.c.progress).where(schema.OPEN)).all()
        return {row.site for row in rows if row.progress.get("stage") == "PAUSED"}

    def evaluations(self, job_id: str, *, since_version: int = 0, version: int | None = None) -> list[s.Evaluation]:
        """Those of one version, or of all since one."""
        found = schema.evaluations
        mine = found.c.version >= since_version if version is None else found.c.version == version
        with self._database.read() as connection:
            rows = connection.execute(
                select(found)
                .where(found.c.job_id == job_id, mine)
                .order_by(found.c.version, found.c.site, found.c.split)
            ).all()
        return [s.Evaluation(row.version, row.site, row.split, row.examples, row.metrics) for row in rows]

    def events(self, job_id: str, *, after_id: int, limit: int = 500) -> list[EventRecord]:
        """Decisions, oldest first."""
        events = schema.events
        with self._database.read() as connection:
            rows = connection.execute(
                select(events)
                .where(events.c.job_id == job_id, events.c.id > after_id)
                .order_by(events.c.id)
                .limit(limit)
            ).all()
        return [EventRecord(row.id, row.unix_seconds, row.round, row.sentence) for row in rows]

    def model(self, job_id: str, *, version: int | None) -> ModelRecord:
        """A committed version: the one asked for, else the best, else the head. NotFound."""
        job = self.job(job_id)
        chosen = (
            version if version is not None else job.best_version if job.best_version is not None else job.head_version
        )
        if chosen is None:
            raise NotFound(f"Job {job_id} has no committed version yet.", hint=f"It says: {job.sentence}.")
        versions, files = schema.versions, schema.files
        with self._database.read() as connection:
            row = connection.execute(
                select(versions).where(versions.c.job_id == job_id, versions.c.version == chosen)
            ).first()
            if row is None:
                raise NotFound(f"Job {job_id} has no version {chosen}; its head is version {job.head_version}.")
            if row.deleted:
                raise NotFound(
                    f"Version {chosen} of job {job_id} was deleted: the newest versions and the best one are kept.",
                    hint="`keep_versions` in section [storage] of coordinator.toml says how many are kept.",
                )
            parts = connection.execute(select(files).where(files.c.job_id == job_id).order_by(files.c.name)).all()
        return ModelRecord(
            version=row.version,
            digest=row.digest,
            size=row.size,
            contributions=tuple(s.Contribution(**part) for part in row.contributions),
            files=tuple((part.name, part.digest, part.size) for part in parts),
        )

    def aggregate(self, job_id: str, *, round_number: int) -> tuple[str, int]:
        """Digest and size of what a round has aggregated."""
        commands = schema.commands
        mine = (commands.c.job_id == job_id, commands.c.round == round_number)
        with self._database.read() as connection:
            digest, size = connection.execute(select(commands.c.digest, commands.c.size).where(*mine)).one()
        return digest, size

    def _job(self, row: Any) -> JobRecord:
        spec = jobspec.from_json(row.spec)
        rounds = schema.rounds
        with self._database.read() as connection:
            number = connection.execute(select(func.max(rounds.c.number)).where(rounds.c.job_id == row.id)).scalar()
            spans = connection.execute(
                select(rounds.c.opened_at, rounds.c.ended_at)
                .where(rounds.c.job_id == row.id, rounds.c.number > 0, rounds.c.ended_at.is_not(None))
                .order_by(rounds.c.number.desc())
                .limit(10)
            ).all()
        eta = None
        if spans and row.state == s.JobState.RUNNING.value:
            typical = sum(span.ended_at - span.opened_at for span in spans) / len(spans)
            eta = typical * (spec.rounds - (row.head_version or 0))
        return JobRecord(
            id=row.id,
            spec=spec,
            state=s.JobState(row.state),
            sentence=self._sentence(row),
            round=number or 0,
            head_version=row.head_version,
            best_version=row.best_version,
            base_digest=row.base_digest,
            service_seconds=row.service_seconds,
            eta_seconds=eta,
            created_unix_seconds=row.created_unix_seconds,
        )

    def _sentence(self, row: Any) -> str:
        """What the job waits for. While nothing can be written that is the database, whatever was written before."""
        trouble = self._database.trouble
        if not trouble or s.JobState(row.state).ended:
            return row.sentence
        return (
            f"nothing can be decided now: {trouble[0].lower()}{trouble[1:].rstrip('.')}; nothing is lost, and it goes "
            f"on by itself when that is over. Before that: {row.sentence}"
        )


def _not_too_many(rows: Iterable[Any]) -> list[Any]:
    found: list[Any] = []
    sites = 0
    for row in rows:
        sites += len(row.cohort)
        if found and sites > MAX_UPDATES:
            break
        found.append(row)
    return found


def _durations(row: Any, worker: Mapping[str, float]) -> dict[str, float]:
    marks = [
        ("selecting", row.opened_at, row.collecting_at),
        ("collecting", row.collecting_at, row.aggregating_at if row.aggregating_at is not None else row.ended_at),
        ("aggregating", row.aggregating_at, row.distilling_at if row.distilling_at is not None else row.ended_at),
        ("distilling", row.distilling_at, row.ended_at),
        ("total", row.opened_at, row.ended_at),
    ]
    found = {name: max(0.0, end - start) for name, start, end in marks if start is not None and end is not None}
    return {**found, **{f"aggregation_{name}": value for name, value in worker.items()}}
