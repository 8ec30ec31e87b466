"""Base models that the coordinator has for sites that lack them: a row each, and a blob for each file."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from coordinator.rounds.state import JobState, TaskState
from coordinator.storage import schema
from coordinator.storage.database import Database
from protos import jobspec
from protos.digests import base_model_digest
from protos.errors import AlreadyExists, Conflict, NotFound

File = tuple[str, str, int]  # name, digest, size

_LIVE = (TaskState.LEASED.value, TaskState.RUNNING.value)
_FINAL = tuple(state.value for state in JobState if state.final)


@dataclass(frozen=True)
class BaseModelRow:
    name: str
    digest: str
    files: tuple[File, ...]
    complete: bool


class BaseModels:
    def __init__(self, database: Database) -> None:
        self._database = database

    def announce(self, name: str, files: tuple[File, ...], *, complete: bool | None) -> str:
        """Notes what the name stands for, and whether all of it is here (None: as before). From now on its blobs are
        kept.

        Returns its digest. AlreadyExists: the name stands for other content.
        """
        digest = base_model_digest((file, size, blob) for file, blob, size in files)
        models = schema.base_models
        with self._database.write() as connection:
            row = connection.execute(select(models).where(models.c.name == name)).first()
            if row is not None and row.digest != digest:
                raise AlreadyExists(
                    f"The name {name} stands for a base model with another digest here.",
                    hint="Choose another name: jobs rely on this one.",
                )
            if row is None:
                values = {"name": name, "digest": digest, "files": [list(file) for file in files]}
                connection.execute(insert(models).values(complete=bool(complete), **values))
            elif complete is not None:
                connection.execute(update(models).where(models.c.name == name).values(complete=complete))
        return digest

    def remove(self, name: str) -> None:
        """Its blobs are garbage from now on, unless something else names them.

        NotFound; Conflict: a job that is under way relies on it.
        """
        jobs, models = schema.jobs, schema.base_models
        with self._database.write() as connection:
            if not _rows(connection, name=name):
                raise NotFound(
                    f"No base model named {name[:80]!r} is served.", hint="`silotune model list` shows what is."
                )
            for row in connection.execute(select(jobs.c.id, jobs.c.spec).where(jobs.c.state.not_in(_FINAL))):
                base = jobspec.from_json(row.spec).base_model
                if base is not None and base.name == name:
                    raise Conflict(
                        f"Job {row.id} relies on the base model {name}.",
                        hint="Let the job end, or cancel it, before.",
                    )
            connection.execute(models.delete().where(models.c.name == name))

    def all(self) -> list[BaseModelRow]:
        with self._database.read() as connection:
            return _rows(connection)

    def serves(self, spec: jobspec.JobSpec) -> bool:
        """Whether a site that lacks the job's base model can fetch it."""
        with self._database.read() as connection:
            return bool(files_for(connection, spec, base_digest=""))

    def expects(self, digest: str, *, size: int) -> bool:
        """Whether a blob of this size is a file of an announced base model."""
        return any((digest, size) == file[1:] for row in self.all() for file in row.files)


def files_for(connection: Connection, spec: jobspec.JobSpec, *, base_digest: str) -> tuple[File, ...]:
    """The files of a job's base model; none where the coordinator does not have that very one."""
    base = spec.base_model
    if base is None:
        return ()
    for row in _rows(connection, name=base.name):
        if row.complete and all(wanted in (None, "", row.digest) for wanted in (base.digest, base_digest)):
            return row.files
    return ()


def readable(connection: Connection, *, site: str, digest: str) -> tuple[int, str] | None:
    """(size, task) of a blob that belongs to the base model of a live task of this site."""
    tasks, jobs = schema.tasks, schema.jobs
    live = (
        select(tasks.c.id, jobs.c.spec, jobs.c.base_digest)
        .join(jobs, jobs.c.id == tasks.c.job_id)
        .where(tasks.c.site == site, tasks.c.state.in_(_LIVE))
    )
    for row in connection.execute(live):
        for _, blob, size in files_for(connection, jobspec.from_json(row.spec), base_digest=row.base_digest):
            if blob == digest:
                return size, row.id
    return None


def named(connection: Connection) -> set[str]:
    """The blobs of all base models."""
    return {digest for row in _rows(connection) for _, digest, _ in row.files}


def _rows(connection: Connection, *, name: str | None = None) -> list[BaseModelRow]:
    models = schema.base_models
    wanted = select(models).order_by(models.c.name)
    rows = connection.execute(wanted if name is None else wanted.where(models.c.name == name))
    return [
        BaseModelRow(row.name, row.digest, tuple((file, blob, size) for file, blob, size in row.files), row.complete)
        for row in rows
    ]
