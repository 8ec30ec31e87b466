"""Which blobs a caller may know of: its own uploads, and what its live tasks name."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import and_, insert, select, update

from coordinator.rounds.state import TaskKind, TaskState
from coordinator.storage import base_models, schema
from coordinator.storage.database import Database
from coordinator.storage.grants import readable_for_distilling
from protos.errors import Unavailable
from protos.identity import Identity, Role
from protos.tensors import MAX_HEADER_BYTES

# Tasks that start from a committed version.
_FROM_VERSION = (TaskKind.TRAIN.value, TaskKind.EVALUATE.value)
_LIVE = (TaskState.LEASED.value, TaskState.RUNNING.value)


@dataclass(frozen=True)
class Readable:
    size: int
    task_id: str  # the live task that names the blob; empty for the operator


class Uploads:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, owner: str, *, digest: str, size: int, sealed_size: Callable[[str], int | None]) -> None:
        """Notes that `owner` handed in a blob that is now sealed; a repeat is no error.

        Unavailable when `sealed_size` does not know the blob: it was deleted before anything named it.
        """
        with self._database.write() as connection:
            # In this transaction: the one that deletes blobs cannot run beside it (storage/garbage.py).
            if sealed_size(digest) != size:
                raise Unavailable(f"The blob {digest[:16]} is not here any more.", hint="The upload begins anew.")
            connection.execute(schema.uploads.delete().where(_upload(owner, digest)))
            connection.execute(insert(schema.uploads).values(owner=owner, digest=digest, size=size))

    def known(self, owner: str, digests: Collection[str]) -> set[str]:
        """Which of these blobs this owner has uploaded for a result to come; says nothing of anybody else's."""
        uploads = schema.uploads
        mine = and_(uploads.c.owner == owner, uploads.c.digest.in_(tuple(digests)), ~uploads.c.recorded)
        with self._database.read() as connection:
            return set(connection.execute(select(uploads.c.digest).where(mine)).scalars())

    def readable(self, identity: Identity, digest: str) -> Readable | None:
        """The blob's size, when this identity may read it now: sites what a live task names, the operator models."""
        tasks, versions, files = schema.tasks, schema.versions, schema.files
        with self._database.read() as connection:
            if identity.role is Role.OPERATOR:
                kept = select(versions.c.size).where(versions.c.digest == digest, ~versions.c.deleted)
                for query in (kept, select(files.c.size).where(files.c.digest == digest)):
                    row = connection.execute(query.limit(1)).first()
                    if row is not None:
                        return Readable(row.size, "")
                return None
            # One question for each, because each has an index.
            for name, size in (
                (versions.c.digest, versions.c.size),
                (versions.c.encoded_digest, versions.c.encoded_size),
            ):
                row = connection.execute(
                    select(size.label("size"), tasks.c.id)
                    .join(tasks, and_(tasks.c.job_id == versions.c.job_id, tasks.c.version == versions.c.version))
                    .where(name == digest, tasks.c.site == identity.name)
                    .where(tasks.c.state.in_(_LIVE), tasks.c.kind.in_(_FROM_VERSION))
                ).first()
                if row is not None:
                    return Readable(row.size, row.id)
            found = base_models.readable(connection, site=identity.name, digest=digest) or readable_for_distilling(
                connection, site=identity.name, digest=digest
            )
            return None if found is None else Readable(*found)

    def size_limit(self, task_id: str) -> int | None:
        """The most bytes that the result of a TRAIN or DISTILL task may have: those of the version that its round began
        with, with a header of its own. None for other tasks."""
        tasks, versions = schema.tasks, schema.versions
        with self._database.read() as connection:
            size = connection.execute(
                select(versions.c.size)
                .join(tasks, and_(tasks.c.job_id == versions.c.job_id, tasks.c.version == versions.c.version))
                .where(tasks.c.id == task_id, tasks.c.kind.in_((TaskKind.TRAIN.value, TaskKind.DISTILL.value)))
            ).scalar()
        return None if size is None else size + MAX_HEADER_BYTES

    def add_traffic(self, task_id: str, *, bytes_up: int = 0, bytes_down: int = 0) -> None:
        """Adds to a task's count of bytes on the wire, payload only."""
        tasks = schema.tasks
        with self._database.write() as connection:
            connection.execute(
                update(tasks)
                .where(tasks.c.id == task_id)
                .values(bytes_up=tasks.c.bytes_up + bytes_up, bytes_down=tasks.c.bytes_down + bytes_down)
            )


def _upload(owner: str, digest: str):  # type: ignore[no-untyped-def]
    return and_(schema.uploads.c.owner == owner, schema.uploads.c.digest == digest)
