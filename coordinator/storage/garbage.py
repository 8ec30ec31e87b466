"""Garbage: blobs that nothing needs any more, never one that a running upload, open task, round or command needs.

A blob goes in two steps. First the row that names it goes, in a transaction that has seen that nobody needs it; then
the blob, inside a writing transaction that has seen that no row names it. There is one writer at a time, and who writes
a row that names a blob looks in that same transaction whether the blob is there (`Uploads.add`, `Work.finish`,
`Jobs.finish_command`), so one of the two always sees the other. A kill between the steps leaves a blob without a row,
which the next listing of the blob store finds. Ages keep useless work away and decide nothing.

One gap is left, with several replicas only: a replica that is stopped between its last look at the database and the
deletion, for longer than the database holds the lock for it, or a DELETE that the S3 server carries out late. If
another replica has named the very same bytes meanwhile, its row is left without them. For an upload or update of a
site that heals by itself: who needs it finds it missing, and asks the site again or goes on without it. A version would
have to be equal to one that was just deleted; it is put back from a backup.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sqlalchemy import Connection, and_, or_, select, update

from coordinator.rounds import state as s
from coordinator.storage import base_models, schema
from coordinator.storage.blobs import BlobStore, UnfinishedUpload
from coordinator.storage.database import Database
from protos import jobspec
from protos.errors import CorruptData, NotFound

# A blob without a row may be a moment before its row; one of this age is not.
ORPHAN_SECONDS = 3600.0
UNFINISHED_SECONDS = 86_400.0
LIST_EVERY_SECONDS = 3600.0
# Rows in one question, and blobs deleted under one write lock: others wait for it meanwhile.
BATCH_ROWS = 500
BATCH_BLOBS = 10

Item = TypeVar("Item")

# Tasks that hand in a whole version.
_MAKING = (s.TaskKind.INIT.value, s.TaskKind.DISTILL.value)
# A job that failed may be resumed, and its failed round keeps what was accepted.
_FINAL = tuple(state.value for state in s.JobState if state.final)


@dataclass
class GarbageCollector:
    """`collect` is for one thread at a time; other replicas may collect meanwhile."""

    database: Database
    blobs: BlobStore
    # How many of a job's newest versions are kept, besides the best one; 0: all.
    keep_versions: int = 0
    _listed_at: float = field(default=float("-inf"))

    @property
    def listing_is_due(self) -> bool:
        return time.monotonic() - self._listed_at >= LIST_EVERY_SECONDS

    def collect(self) -> int:
        """How many blobs were deleted. The blob store itself is listed only once in a while."""
        listing = self.listing_is_due
        if listing:
            self._listed_at = time.monotonic()
        deleted = self._delete(self._release())
        if listing:
            deleted += self._delete_orphans()
            self._drop_unfinished()
        return deleted

    def _release(self) -> set[str]:
        """Digests of the rows that are dropped because nobody needs them."""
        released: set[str] = set()
        for release in (_release_uploads, _release_states, self._release_versions):
            found = {""}
            while found:
                # Most of the time there is nothing, and then the write lock is not taken.
                with self.database.read() as connection:
                    found = release(connection, write=False)
                if found:
                    with self.database.write() as connection:
                        found = release(connection, write=True)
                released |= found
        return released

    def _release_versions(self, connection: Connection, *, write: bool) -> set[str]:
        if not self.keep_versions:
            return set()
        versions, released = schema.versions, set()
        for job_id, numbers in _old_versions(connection, keep=self.keep_versions).items():
            if write:
                mine = and_(versions.c.job_id == job_id, versions.c.version.in_(numbers))
                connection.execute(update(versions).where(mine).values(deleted=True))
            released |= {digest for digests in numbers.values() for digest in digests if digest}
        return released

    def _delete(self, digests: Collection[str]) -> int:
        deleted = 0
        for batch in _batches(sorted(digests), BATCH_BLOBS):
            with self.database.write() as connection:
                for digest in set(batch) - named(connection, batch):
                    # Fails if the database ended this transaction meanwhile, and with it the lock.
                    connection.execute(select(1))
                    self.blobs.delete(digest)
                    deleted += 1
        return deleted

    def _delete_orphans(self) -> int:
        old = [blob.digest for blob in self.blobs.stored() if blob.age_seconds > ORPHAN_SECONDS]
        deleted = 0
        for batch in _batches(old, BATCH_ROWS):
            with self.database.read() as connection:
                orphans = set(batch) - named(connection, batch)
            deleted += self._delete(orphans)
        return deleted

    def _drop_unfinished(self) -> None:
        """An upload that is dropped by mistake begins anew; it is never wrong, so nothing is locked for it."""
        old = [part for part in self.blobs.unfinished() if part.age_seconds > UNFINISHED_SECONDS]
        with self.database.read() as connection:
            uploading = _uploading_sites(connection)
            needed = [part for part in old if part.owner in uploading and not _is_update(connection, part)]
        for part in old:
            if part not in needed or self.blobs.size(part.digest) is not None:
                self.blobs.drop_unfinished(part.owner, part.digest)


def drop_damaged(database: Database, blobs: BlobStore, digest: str) -> bool:
    """Whether the blob is damaged indeed, and not a local copy of it; then its owners are asked for it again.

    Its bytes stay until sealing replaces them, or no row names them any more: another owner may have mended it by now.
    """
    try:
        blobs.verify(digest)
    except (CorruptData, NotFound):
        with database.write() as connection:
            connection.execute(schema.uploads.delete().where(schema.uploads.c.digest == digest))
        return True
    return False


def named(connection: Connection, digests: Sequence[str]) -> set[str]:
    """Which of these blobs some row names. Every look-up has an index, however long the history is."""
    versions, files, uploads = schema.versions, schema.files, schema.uploads
    found = (in_progress(connection) | base_models.named(connection)) & set(digests)
    for question in (
        select(versions.c.digest).where(versions.c.digest.in_(digests), ~versions.c.deleted),
        select(versions.c.encoded_digest).where(versions.c.encoded_digest.in_(digests), ~versions.c.deleted),
        select(versions.c.optimizer_digest).where(versions.c.optimizer_digest.in_(digests)),
        select(versions.c.residual_digest).where(versions.c.residual_digest.in_(digests)),
        select(files.c.digest).where(files.c.digest.in_(digests)),
        select(uploads.c.digest).where(uploads.c.digest.in_(digests)),
    ):
        found |= set(connection.execute(question).scalars())
    return found


def all_named(connection: Connection) -> set[str]:
    """Every blob that some row names."""
    versions = schema.versions
    found = in_progress(connection) | base_models.named(connection)
    for question in (
        select(versions.c.digest).where(~versions.c.deleted),
        select(versions.c.encoded_digest).where(versions.c.encoded_digest > "", ~versions.c.deleted),
        select(versions.c.optimizer_digest).where(versions.c.optimizer_digest > ""),
        select(versions.c.residual_digest).where(versions.c.residual_digest > ""),
        select(schema.files.c.digest),
        select(schema.uploads.c.digest),
    ):
        found |= set(connection.execute(question).scalars())
    return found


def _rounds_in_progress(connection: Connection) -> list[tuple[str, int]]:
    """(job, round) of rounds that are not over: the latest one of a job that may go on, or none."""
    jobs, rounds = schema.jobs, schema.rounds
    found = []
    for job_id in connection.execute(select(jobs.c.id).where(jobs.c.state.not_in(_FINAL))).scalars():
        mine = select(rounds.c.number, rounds.c.phase).where(rounds.c.job_id == job_id)
        latest = connection.execute(mine.order_by(rounds.c.number.desc()).limit(1)).first()
        if latest is not None and latest.phase != s.Phase.COMMITTED.value:
            found.append((job_id, latest.number))
    return found


def in_progress(connection: Connection) -> set[str]:
    """Blobs that a round in progress has: its updates, what was aggregated of them, a version before its commit."""
    updates, commands, tasks = schema.updates, schema.commands, schema.tasks
    found: set[str] = set()
    for job_id, number in _rounds_in_progress(connection):
        for question in (
            select(updates.c.digest).where(updates.c.job_id == job_id, updates.c.round == number),
            select(
                commands.c.digest, commands.c.optimizer_digest, commands.c.encoded_digest, commands.c.residual_digest
            ).where(commands.c.job_id == job_id, commands.c.round == number),
        ):
            for row in connection.execute(question):
                found |= set(row)
        made = select(tasks.c.result).where(
            tasks.c.job_id == job_id, tasks.c.round == number, tasks.c.kind.in_(_MAKING)
        )
        found |= {result.get("digest", "") for result in connection.execute(made).scalars()}
    return found - {""}


def _uploading_sites(connection: Connection) -> set[str]:
    """Sites that may go on with an upload: for an open task, or one of a round in progress, which may be queued again.
    An evaluation uploads nothing."""
    tasks = schema.tasks
    sites = select(tasks.c.site).where(tasks.c.kind != s.TaskKind.EVALUATE.value)
    found = set(connection.execute(sites.where(schema.OPEN)).scalars())
    for job_id, number in _rounds_in_progress(connection):
        found |= set(connection.execute(sites.where(tasks.c.job_id == job_id, tasks.c.round == number)).scalars())
    return found


def _is_update(connection: Connection, part: UnfinishedUpload) -> bool:
    """Whether this upload was handed in with a result: what is left of it was not cleared away."""
    updates = schema.updates
    mine = select(updates.c.digest).where(updates.c.digest == part.digest, updates.c.site == part.owner)
    return connection.execute(mine.limit(1)).first() is not None


def _release_uploads(connection: Connection, *, write: bool) -> set[str]:
    """Uploads that were handed in with a result that is settled, and those of sites that have nothing to go on with."""
    uploads = schema.uploads
    rows = connection.execute(
        select(uploads.c.owner, uploads.c.digest)
        .where(or_(uploads.c.recorded, uploads.c.owner.not_in(_uploading_sites(connection))))
        .where(uploads.c.digest.not_in(in_progress(connection)))
        .limit(BATCH_ROWS)
    ).all()
    if write:
        for row in rows:
            mine = and_(uploads.c.owner == row.owner, uploads.c.digest == row.digest)
            connection.execute(uploads.delete().where(mine))
    return {row.digest for row in rows}


def _release_states(connection: Connection, *, write: bool) -> set[str]:
    """What no round goes on from: the server optimizer's state and the residual of all versions but the heads of jobs
    that may go on."""
    versions, jobs = schema.versions, schema.jobs
    rows = connection.execute(
        select(versions.c.job_id, versions.c.version, versions.c.optimizer_digest, versions.c.residual_digest)
        .join(jobs, jobs.c.id == versions.c.job_id)
        .where(or_(versions.c.optimizer_digest > "", versions.c.residual_digest > ""))
        .where(or_(versions.c.version < jobs.c.head_version, jobs.c.state.in_(_FINAL)))
        .limit(BATCH_ROWS)
    ).all()
    if write:
        for row in rows:
            mine = and_(versions.c.job_id == row.job_id, versions.c.version == row.version)
            connection.execute(update(versions).where(mine).values(optimizer_digest="", residual_digest=""))
    return {digest for row in rows for digest in (row.optimizer_digest, row.residual_digest) if digest}


def _old_versions(connection: Connection, *, keep: int) -> dict[str, dict[int, tuple[str, str]]]:
    """By job: version and digests of those beyond the newest `keep` that are not the best, that nothing begins at, and
    that are not still to be compared with the best. Encoded versions are differences from version 0, so it stays."""
    jobs, versions, tasks = schema.jobs, schema.versions, schema.tasks
    found: dict[str, dict[int, tuple[str, str]]] = {}
    for job in connection.execute(select(jobs).where(jobs.c.head_version >= keep)).all():
        begun = connection.execute(select(tasks.c.version).where(tasks.c.job_id == job.id, schema.OPEN)).scalars()
        kept = {*begun, *([] if job.best_version is None else [job.best_version])}
        if jobspec.from_json(job.spec).encoding.down != "raw":
            kept.add(0)
        old = connection.execute(
            select(versions.c.version, versions.c.digest, versions.c.encoded_digest)
            .where(versions.c.job_id == job.id, ~versions.c.deleted, ~versions.c.unjudged)
            .where(versions.c.version <= job.head_version - keep, versions.c.version.not_in(kept))
            .limit(BATCH_ROWS)
        ).all()
        if old:
            found[job.id] = {row.version: (row.digest, row.encoded_digest) for row in old}
    return found


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
