"""What the agent fetches for a task: the version that it starts from, or as little of it as its trainer needs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from client_agent import transfers
from client_agent.grant import Grant
from client_agent.observe import AgentMetrics
from client_agent.session import Session
from client_agent.taskdir import VersionNeeded
from protos.errors import CorruptData, InvalidInput, NotFound, OutOfSpace
from protos.v1 import agent_pb2
from protos.v1.manifest_pb2 import BlobRef

Answered = TypeVar("Answered")
# Runs an operation that needs the lease, again after the lease was granted anew.
UnderLease = Callable[[Grant, Callable[[], Awaitable[Answered]]], Awaitable[Answered]]


@dataclass(frozen=True)
class Fetched:
    """The version itself, or its difference from version 0; neither, where the task starts from version 0 (or from
    nothing, for INIT)."""

    model: Path | None = None
    encoded: Path | None = None
    # Of a distillation without labels: the files of task.members.
    members: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Fetching:
    cache: transfers.BlobCache
    session: Session
    metrics: AgentMetrics

    async def version(self, grant: Grant, *, whole: bool, under_lease: UnderLease[Path]) -> Fetched:
        """What the task starts from; with `whole` the version itself, also where a trainer could make it.

        Errors as `blob`; VersionNeeded when the coordinator has lost the difference.
        """
        task = grant.task
        if not task.HasField("model"):
            return Fetched()
        if task.members:
            model = await self.blob(task.model, grant, under_lease=under_lease)
            return Fetched(model, members=await self.members(grant, under_lease=under_lease))
        if task.initial and not whole:
            if task.initial == task.model.digest:
                return Fetched()
            if task.HasField("encoded"):
                return Fetched(encoded=await self.blob(task.encoded.blob, grant, under_lease=under_lease))
        return Fetched(model=await self.blob(task.model, grant, under_lease=under_lease))

    async def members(self, grant: Grant, *, under_lease: UnderLease[Path]) -> tuple[Path, ...]:
        """The updates that the task names, in its order. Errors as `blob`."""
        return tuple([await self.blob(member.blob, grant, under_lease=under_lease) for member in grant.task.members])

    async def blob(self, blob: BlobRef, grant: Grant, *, under_lease: UnderLease[Path]) -> Path:
        """A blob that the task names, in the cache. InvalidInput after several bad arrivals."""

        def progress(done: int, total: int) -> None:
            grant.at(agent_pb2.STAGE_FETCHING, done=done, total=total, unit="bytes")

        received = self.metrics.transfer_bytes.labels("down").inc
        corrupt = 0

        async def attempt() -> Path:
            nonlocal corrupt
            try:
                return await transfers.download(
                    blob,
                    cache=self.cache,
                    open_channel=self.session.open_channel,
                    progress=progress,
                    received=received,
                    pace=self.session.receiving,
                )
            except CorruptData as error:
                corrupt += 1
                if corrupt >= transfers.CORRUPT_ATTEMPTS:
                    raise InvalidInput("The model arrived damaged several times.", hint=error.hint) from error
                raise
            except OutOfSpace:
                grant.at(agent_pb2.STAGE_WAITING_FOR_DISK)
                raise
            except NotFound as error:
                # Of the whole version it means that the lease is lost, and that is looked at next.
                if blob == grant.task.encoded.blob:
                    raise VersionNeeded(error.message) from error
                raise

        progress(0, blob.size)
        path = await under_lease(grant, attempt)
        needed = {blob.digest, grant.task.model.digest, *(member.blob.digest for member in grant.task.members)}
        await asyncio.to_thread(self.cache.prune, needed=needed)
        return path
