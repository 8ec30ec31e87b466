"""What the controller and the operator do to the store: facts in, transitions out, in one transaction each.

`apply` is conditional on the revision that the facts were read at, so a transition that was computed from older facts
changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, case, func, insert, select, update

from coordinator.rounds import state as s
from coordinator.rounds.sentences import paused
from coordinator.storage import schema
from coordinator.storage.database import Database
from coordinator.storage.effects import carry_out, note, over
from coordinator.storage.facts import facts_of
from protos import jobspec
from protos.errors import Conflict, NotFound


@dataclass(frozen=True)
class Driven:
    """Who drives a job, and how often it has shown that it lives."""

    id: str
    driver: str
    generation: int
    beats: int


class Jobs:
    def __init__(self, database: Database) -> None:
        self._database = database

    # --- the controller's side

    def active(self) -> list[Driven]:
        """The jobs that some controller has to drive."""
        jobs = schema.jobs
        wanted = (s.JobState.SUBMITTED.value, s.JobState.RUNNING.value)
        with self._database.read() as connection:
            rows = connection.execute(
                select(jobs.c.id, jobs.c.driver, jobs.c.driver_generation, jobs.c.driver_beats)
                .where(jobs.c.state.in_(wanted))
                .order_by(jobs.c.created_unix_seconds, jobs.c.id)
            )
            return [Driven(row.id, row.driver, row.driver_generation, row.driver_beats) for row in rows]

    def take(self, job: Driven, *, driver: str, grace_seconds: float) -> int | None:
        """Becomes the driver: the new generation; None when somebody has driven it since `job` was read.

        Every live lease gets at least `grace_seconds` to report again, because nobody renewed it meanwhile.
        """
        tasks, jobs = schema.tasks, schema.jobs
        generation = job.generation + 1
        with self._database.write() as connection:
            won = connection.execute(
                update(jobs)
                .where(jobs.c.id == job.id, jobs.c.driver_generation == job.generation)
                .where(jobs.c.driver_beats == job.beats)
                .values(driver=driver, driver_generation=generation)
            )
            if won.rowcount != 1:
                return None
            until = _service_seconds(connection, job.id) + grace_seconds
            connection.execute(
                update(tasks)
                .where(tasks.c.job_id == job.id, schema.OPEN, tasks.c.state != s.TaskState.QUEUED.value)
                .where(tasks.c.lease_until < until)
                .values(lease_until=until)
            )
        return generation

    def release(self, job_id: str, *, driver_generation: int) -> None:
        """Lets another replica take the job at once."""
        self._write_as_driver(job_id, driver_generation, driver="")

    def tick(self, job_id: str, *, elapsed_seconds: float, driver_generation: int = 0) -> bool:
        """Advances the job's clock of service while it runs, and shows that its driver lives.

        False when this generation does not drive the job any more; generation 0 is a job that nobody ever drove.
        """
        jobs = schema.jobs
        served = case((jobs.c.state == s.JobState.RUNNING.value, elapsed_seconds), else_=0.0)
        return self._write_as_driver(
            job_id,
            driver_generation,
            driver_beats=jobs.c.driver_beats + 1,
            service_seconds=jobs.c.service_seconds + served,
        )

    def facts(self, job_id: str, *, now_unix_seconds: float) -> tuple[s.Job, s.Facts, int]:
        """The job, everything a decision may depend on, and the revision that `apply` asks for."""
        with self._database.read() as connection:
            row = connection.execute(select(schema.jobs).where(schema.jobs.c.id == job_id)).one()
            return _job(row), facts_of(connection, row, now_unix_seconds), row.revision

    def apply(self, job: s.Job, transition: s.Transition, *, revision: int, now_unix_seconds: float) -> bool:
        """Writes a transition whole, or not at all (False) when the job or its driver changed since it was read."""
        jobs = schema.jobs
        with self._database.write() as connection:
            won = connection.execute(
                update(jobs)
                .where(jobs.c.id == job.id, jobs.c.revision == revision)
                .where(jobs.c.driver_generation == job.driver_generation)
                .values(revision=revision + 1, sentence=transition.sentence)
            )
            if won.rowcount != 1:
                return False
            number = connection.execute(
                select(schema.rounds.c.number)
                .where(schema.rounds.c.job_id == job.id)
                .order_by(schema.rounds.c.number.desc())
                .limit(1)
            ).scalar()
            for effect in transition.effects:
                number = carry_out(connection, job, number, effect, now_unix_seconds)
            connection.execute(
                update(schema.rounds)
                .where(schema.rounds.c.job_id == job.id, schema.rounds.c.number == number)
                .values(sentence=transition.sentence)
            )
            note(connection, job.id, number or 0, transition.sentence, now_unix_seconds)
        return True

    def say(self, job_id: str, sentence: str, *, driver_generation: int) -> None:
        """Replaces the sentence that says what the job waits for."""
        self._write_as_driver(job_id, driver_generation, sentence=sentence)

    def _write_as_driver(self, job_id: str, driver_generation: int, **values: Any) -> bool:
        jobs = schema.jobs
        with self._database.write() as connection:
            done = connection.execute(
                update(jobs).where(jobs.c.id == job_id, jobs.c.driver_generation == driver_generation).values(**values)
            )
            return done.rowcount == 1

    # --- commands

    def previous(self, job_id: str, *, version: int) -> dict[str, Any]:
        """The row of a version: its digest, and those of what the next aggregation goes on from."""
        versions = schema.versions
        with self._database.read() as connection:
            row = connection.execute(
                select(versions).where(versions.c.job_id == job_id, versions.c.version == version)
            ).one()
            return dict(row._mapping)

    def finish_command(
        self,
        job_id: str,
        *,
        round_number: int,
        generation: int,
        digest: str,
        size: int,
        optimizer_digest: str,
        seconds: Mapping[str, float],
        sealed_size: Callable[[str], int | None],
        encoded_digest: str = "",
        encoded_size: int = 0,
        residual_digest: str = "",
        metrics: Mapping[str, float] | None = None,
        driver_generation: int = 0,
    ) -> bool:
        """False when the command is not the current one any more, another replica drives the job, or a blob that it
        made was deleted before anything named it: then it is still queued."""
        return self._end_command(
            job_id,
            driver_generation=driver_generation,
            round_number=round_number,
            generation=generation,
            state=s.CommandState.DONE,
            digest=digest,
            size=size,
            optimizer_digest=optimizer_digest,
            encoded_digest=encoded_digest,
            encoded_size=encoded_size,
            residual_digest=residual_digest,
            metrics=dict(metrics or {}),
            seconds=dict(seconds),
            holds=lambda: all(
                sealed_size(made) is not None
                for made in (digest, optimizer_digest, encoded_digest, residual_digest)
                if made
            ),
        )

    def fail_command(
        self, job_id: str, *, round_number: int, generation: int, error: str, corrupt_site: str = "",
        driver_generation: int = 0,
    ) -> bool:  # fmt: skip
        return self._end_command(
            job_id,
            driver_generation=driver_generation,
            round_number=round_number,
            generation=generation,
            state=s.CommandState.FAILED,
            error=error,
            corrupt_site=corrupt_site,
        )

    def _end_command(
        self, job_id: str, *, driver_generation: int, round_number: int, generation: int, state: s.CommandState,
        holds: Callable[[], bool] = lambda: True, **values: Any,
    ) -> bool:  # fmt: skip
        commands, jobs = schema.commands, schema.jobs
        mine = select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.driver_generation == driver_generation)
        with self._database.write() as connection:
            # `holds` is asked in this transaction: what deletes blobs cannot run beside it (storage/garbage.py).
            if connection.execute(mine).first() is None or not holds():
                return False
            done = connection.execute(
                update(commands)
                .where(commands.c.job_id == job_id, commands.c.round == round_number)
                .where(commands.c.generation == generation, commands.c.state == s.CommandState.QUEUED.value)
                .values(state=state.value, **values)
            )
            return done.rowcount == 1

    # --- the operator's side

    def create(self, spec: jobspec.JobSpec, *, job_id: str, submit_token: str, now_unix_seconds: float) -> str:
        """The id of the new job, or of the one that the same token submitted before."""
        jobs = schema.jobs
        with self._database.write() as connection:
            if submit_token:
                known = connection.execute(select(jobs).where(jobs.c.submit_token == submit_token)).first()
                if known is not None:
                    if known.spec != spec.canonical_json:
                        raise Conflict(f"The submit token belongs to job {known.id}, which has another recipe.")
                    return known.id
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    submit_token=submit_token or None,
                    spec=spec.canonical_json,
                    state=s.JobState.SUBMITTED.value,
                    sentence="submitted; the coordinator is about to begin",
                    base_digest=(spec.base_model.digest or "") if spec.base_model else "",
                    created_unix_seconds=now_unix_seconds,
                )
            )
            note(connection, job_id, 0, f"job {spec.name} was submitted", now_unix_seconds)
        return job_id

    def control(self, job_id: str, *, action: str, site: str = "", now_unix_seconds: float) -> None:
        """`action`: pause, resume, cancel or readmit; `site`: the one to readmit, all when empty.

        A job that is in the wanted state already is left as it is: the answer to the first order may have been lost.
        Conflict when the job's state does not allow it; NotFound when the site is not set aside.
        """
        jobs, tasks = schema.jobs, schema.tasks
        new, allowed, sentence = _ACTIONS[action]
        with self._database.write() as connection:
            mine = jobs.c.id == job_id
            before = s.JobState(connection.execute(select(jobs.c.state).where(mine)).scalar_one())
            if before is new:
                return
            if before not in allowed:
                raise Conflict(f"Job {job_id} is {before.value.lower()}: it cannot be told to {action}.")
            values: dict[str, Any] = {"revision": jobs.c.revision + 1}
            if new is not None:
                values |= {"state": new.value, "sentence": paused(job_id) if action == "pause" else sentence}
            connection.execute(update(jobs).where(mine).values(**values))
            if action == "cancel":
                connection.execute(
                    update(tasks)
                    .where(tasks.c.job_id == job_id, schema.OPEN)
                    .values(state=s.TaskState.EXPIRED.value, reason=sentence)
                )
            if action == "resume" and before is s.JobState.FAILED:
                _forgive(connection, job_id)
            if action == "readmit":
                sentence = f"{_readmit(connection, job_id, site)} may take part again"
            note(connection, job_id, 0, sentence, now_unix_seconds)


_RUNNING = (s.JobState.SUBMITTED, s.JobState.RUNNING)
_UNDER_WAY = (*_RUNNING, s.JobState.PAUSED, s.JobState.FAILED)
_ACTIONS: dict[str, tuple[s.JobState | None, tuple[s.JobState, ...], str]] = {
    "pause": (s.JobState.PAUSED, (s.JobState.RUNNING,), "paused by the operator"),
    "resume": (s.JobState.RUNNING, (s.JobState.PAUSED, s.JobState.FAILED), "resumed by the operator"),
    "cancel": (s.JobState.CANCELLED, _UNDER_WAY, "cancelled by the operator"),
    "readmit": (None, _UNDER_WAY, ""),
}


def _readmit(connection: Connection, job_id: str, site: str) -> str:
    """The names of the sites that are no longer set aside."""
    standings = schema.standings
    mine = and_(standings.c.job_id == job_id, standings.c.set_aside)
    aside = sorted(connection.execute(select(standings.c.site).where(mine)).scalars())
    if site and site not in aside:
        hint = f"Set aside are: {', '.join(aside)}." if aside else "No site is set aside there."
        raise NotFound(f"{site} is not set aside in job {job_id}.", hint=hint)
    chosen = [site] if site else aside
    connection.execute(standings.delete().where(standings.c.job_id == job_id, standings.c.site.in_(chosen)))
    return ", ".join(chosen) or "all sites"


def _forgive(connection: Connection, job_id: str) -> None:
    """A failed job goes on: what ended its round no longer counts, and what it was measuring is measured."""
    tasks, rounds, versions, jobs = schema.tasks, schema.rounds, schema.versions, schema.jobs
    number = select(func.max(rounds.c.number)).where(rounds.c.job_id == job_id).scalar_subquery()
    of_round = and_(tasks.c.job_id == job_id, tasks.c.round == number)
    connection.execute(update(tasks).where(of_round).values(failures=0))
    # Whoever has a reason has tried to make version 0: see rounds/machine.py.
    connection.execute(update(tasks).where(of_round, tasks.c.kind == s.TaskKind.INIT.value).values(reason=""))
    unjudged = select(versions.c.version).where(versions.c.job_id == job_id, versions.c.unjudged)
    now = select(jobs.c.service_seconds).where(jobs.c.id == job_id).scalar_subquery()
    connection.execute(
        update(tasks)
        .where(tasks.c.job_id == job_id, tasks.c.round.in_(unjudged))
        .where(tasks.c.kind == s.TaskKind.EVALUATE.value, tasks.c.reason == over(s.JobState.FAILED))
        .values(
            state=s.TaskState.QUEUED.value,
            reason="",
            generation=tasks.c.generation + 1,
            queued_at=now,
            last_progress_at=now,
            lease_until=0.0,
        )
    )


def _job(row: Row[Any]) -> s.Job:
    return s.Job(
        id=row.id,
        spec=jobspec.from_json(row.spec),
        state=s.JobState(row.state),
        head_version=row.head_version,
        best_version=row.best_version,
        service_seconds=row.service_seconds,
        base_digest=row.base_digest,
        driver_generation=row.driver_generation,
    )


def _service_seconds(connection: Connection, job_id: str) -> float:
    return connection.execute(select(schema.jobs.c.service_seconds).where(schema.jobs.c.id == job_id)).scalar_one()
