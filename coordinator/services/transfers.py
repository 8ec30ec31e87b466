"""TransferService: bytes in both directions, resumable at any offset (protos/v1/transfer.proto says what is promised).

Who may read a blob is a question to the store, so this file has no policy. `max_transfers` streams are served at a
time, WAITING_PER_TURN times as many wait for their turn, and further ones are told to come again: neither the number of
sites nor the size of a model is in the memory. While one batch of frames is hashed and written by a thread, the next is
received.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from prometheus_client import Counter

from coordinator.observe import Metrics
from coordinator.rounds.state import TaskKind
from coordinator.services.wire import Caller, Frames, Send
from coordinator.storage.blobs import BlobStore, Upload
from coordinator.storage.frames import FrameCache
from coordinator.storage.store import Store
from protos import frames
from protos.digests import check_digest
from protos.errors import InvalidInput, NotFound, Unavailable
from protos.frames import FRAME_BYTES
from protos.identity import Role
from protos.v1 import transfer_pb2 as pb

Answer = TypeVar("Answer")

# Appended together by one hop to a thread. More than one frame costs memory for each stream and was not faster.
BATCH_FRAMES = 1
# Streams that wait for their turn, for each that is served; what a waiting upload has sent is held by gRPC.
WAITING_PER_TURN = 3
# An agent does one transfer at a time; its connection before may not be known to be dead yet.
STREAMS_PER_CALLER = 2
# The lease is looked at again after so many frames, and the certificate at every frame.
LEASE_CHECK_FRAMES = 256
# A peer that neither sends nor takes a frame for so long loses its turn, not its bytes.
STALL_SECONDS = 60.0
MAX_DIGESTS = 1000


class TransferService:
    def __init__(
        self,
        store: Store,
        *,
        blobs: BlobStore,
        disk: Executor,
        metrics: Metrics,
        max_transfers: int,
        max_blob_bytes: int,
        frame_cache_bytes: int,
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._disk = disk
        self._metrics = metrics
        self._max_blob_bytes = max_blob_bytes
        self._turns = asyncio.Semaphore(max_transfers)
        self._most_waiting = WAITING_PER_TURN * max_transfers
        self._waiting = 0
        self._streams: collections.Counter[str] = collections.Counter()
        # The blob that each caller has read to its end.
        self._had: dict[str, str] = {}
        self._cache = FrameCache(blobs, disk=disk, budget_bytes=frame_cache_bytes)

    async def find_missing(self, request: pb.FindMissingRequest, caller: Caller) -> pb.FindMissingResponse:
        if len(request.blobs) > MAX_DIGESTS:
            raise InvalidInput(f"{len(request.blobs)} blobs were asked for; {MAX_DIGESTS} at most.")
        have = await self._uploaded(caller, [check_digest(blob.digest) for blob in request.blobs])
        return pb.FindMissingResponse(missing=[blob for blob in request.blobs if blob.digest not in have])

    async def query_write_status(
        self, request: pb.QueryWriteStatusRequest, caller: Caller
    ) -> pb.QueryWriteStatusResponse:
        digest = check_digest(request.blob.digest)
        if await self._uploaded(caller, [digest]):
            return pb.QueryWriteStatusResponse(committed_size=request.blob.size, sealed=True)
        kept = await self._in_disk(self._blobs.committed_size, caller.identity.name, digest)
        return pb.QueryWriteStatusResponse(committed_size=kept, sealed=False)

    async def read(self, request: pb.ReadRequest, caller: Caller, send: Send) -> None:
        digest = check_digest(request.digest)
        readable = await asyncio.to_thread(self._store.uploads.readable, caller.identity, digest)
        if readable is None:
            raise NotFound(f"There is no blob {digest[:16]} that this caller may read.")
        if request.offset > readable.size:
            raise InvalidInput(f"Byte {request.offset} is beyond the end of the blob, which has {readable.size}.")
        name = caller.identity.name
        again = request.offset == 0 and self._had.get(name) == digest
        async with (
            self._turn(caller),
            self._cache.reading(digest, again=again),
            self._traffic("down", task_id=readable.task_id) as traffic,
        ):
            offset = request.offset
            ahead = self._frame_ahead(digest, offset=offset, size=readable.size)
            try:
                while ahead is not None:
                    frame = await ahead
                    end = min(readable.size, (offset // FRAME_BYTES + 1) * FRAME_BYTES)
                    ahead = self._frame_ahead(digest, offset=end, size=readable.size)
                    async with _stall_limit():
                        await send(frame)
                    traffic.add(end - offset)
                    offset = end
            finally:
                if ahead is not None:
                    ahead.cancel()
        self._had[name] = digest

    async def write(self, messages: Frames, caller: Caller) -> pb.WriteResponse:
        opening = await _next(messages)
        target = frames.decode(opening or b"").target
        if target is None:
            raise InvalidInput("The first frame of an upload must name its target.")
        blob, owner = target.blob, caller.identity.name
        check_digest(blob.digest)
        if blob.size > self._max_blob_bytes:
            raise InvalidInput(f"The blob has {blob.size} bytes; {self._max_blob_bytes} are the most allowed here.")
        await self._check_lease(target, caller)
        limit = await asyncio.to_thread(self._store.uploads.size_limit, target.task_id)
        if limit is not None and blob.size > limit:
            raise InvalidInput(f"The update has {blob.size} bytes; one of this job has at most {limit}.")
        if await self._uploaded(caller, [blob.digest]):
            return pb.WriteResponse(committed_size=blob.size, sealed=True)
        async with self._turn(caller), self._traffic("up", task_id=target.task_id) as traffic:
            upload = await self._in_disk(partial(self._blobs.open_upload, owner, blob.digest, size=blob.size))
            try:
                if upload.offset < blob.size:
                    await self._receive(messages, opening, upload=upload, target=target, caller=caller, traffic=traffic)
                if upload.offset < blob.size:
                    return pb.WriteResponse(committed_size=upload.offset, sealed=False)
                await self._in_disk(upload.seal)
            finally:
                await self._in_disk(upload.close)
        add = partial(self._store.uploads.add, owner, digest=blob.digest, size=blob.size)
        await asyncio.to_thread(add, sealed_size=self._blobs.size)
        await self._in_disk(self._blobs.forget_upload, owner, blob.digest)
        return pb.WriteResponse(committed_size=blob.size, sealed=True)

    async def _receive(
        self,
        messages: Frames,
        opening: bytes | None,
        *,
        upload: Upload,
        target: pb.UploadTarget,
        caller: Caller,
        traffic: _Traffic,
    ) -> None:
        """Appends frames until the stream ends. Whatever ends it, what has arrived is kept."""
        appender = _Appender(partial(self._in_disk, _append, upload), traffic=traffic)
        message, received = opening, 0
        try:
            while message is not None:
                await appender.add(message)
                received += 1
                if received % LEASE_CHECK_FRAMES == 0:
                    await self._check_lease(target, caller)
                message = await _next(messages)
        finally:
            await appender.finish()

    async def _check_lease(self, target: pb.UploadTarget, caller: Caller) -> None:
        if caller.identity.role is Role.OPERATOR:
            expects = partial(self._store.base_models.expects, target.blob.digest, size=target.blob.size)
            if not await asyncio.to_thread(expects):
                raise InvalidInput("This blob is no file of a base model that was announced.")
            return
        task = await asyncio.to_thread(
            self._store.work.live, target.task_id, site=caller.identity.name, generation=target.generation
        )
        if task.kind is TaskKind.EVALUATE:
            raise InvalidInput("An evaluation has nothing to upload.")

    async def _uploaded(self, caller: Caller, digests: list[str]) -> set[str]:
        known = await asyncio.to_thread(self._store.uploads.known, caller.identity.name, digests)
        # A blob that was lost all the same is asked for again.
        return {digest for digest in known if await self._in_disk(self._blobs.size, digest) is not None}

    def _frame_ahead(self, digest: str, *, offset: int, size: int) -> asyncio.Task[bytes] | None:
        return asyncio.create_task(self._cache.frame(digest, offset=offset)) if offset < size else None

    @asynccontextmanager
    async def _traffic(self, direction: str, *, task_id: str) -> AsyncIterator[_Traffic]:
        traffic = _Traffic(self._metrics.transfer_bytes.labels(direction=direction))
        with self._metrics.transfers_active.labels(direction=direction).track_inprogress():
            try:
                yield traffic
            finally:
                if task_id and traffic.counted_bytes:
                    counted = {f"bytes_{direction}": traffic.counted_bytes}
                    await asyncio.to_thread(partial(self._store.uploads.add_traffic, task_id, **counted))

    @asynccontextmanager
    async def _turn(self, caller: Caller) -> AsyncIterator[None]:
        """One of the streams that are served. Unavailable when too many wait already, or this caller has its share."""
        name = caller.identity.name
        if self._waiting >= self._most_waiting or self._streams[name] >= STREAMS_PER_CALLER:
            raise Unavailable(
                "The coordinator serves as many transfers as it can.", hint="It is tried again by itself."
            )
        self._streams[name] += 1
        try:
            self._waiting += 1
            try:
                await self._turns.acquire()
            finally:
                self._waiting -= 1
            try:
                yield
            finally:
                self._turns.release()
        finally:
            self._streams[name] -= 1
            if not self._streams[name]:
                del self._streams[name]

    def _in_disk(self, function: Callable[..., Answer], *arguments: object) -> asyncio.Future[Answer]:
        return asyncio.get_running_loop().run_in_executor(self._disk, function, *arguments)


@dataclass
class _Traffic:
    """Payload bytes of one stream."""

    counter: Counter
    counted_bytes: int = 0

    def add(self, count: int) -> None:
        self.counter.inc(count)
        self.counted_bytes += count


class _Appender:
    """Appends batches of frames one after another, while the next ones are received."""

    def __init__(self, append: Callable[[list[bytes]], asyncio.Future[int]], *, traffic: _Traffic) -> None:
        self._append = append
        self._traffic = traffic
        self._waiting: list[bytes] = []
        self._running: asyncio.Task[None] | None = None

    async def add(self, message: bytes) -> None:
        """Returns at once, or when fewer than BATCH_FRAMES wait. Raises what an earlier append raised."""
        self._waiting.append(message)
        if self._running is None or self._running.done():
            await self.finish()
            self._running = asyncio.create_task(self._run())
        if len(self._waiting) >= BATCH_FRAMES:
            await self._running

    async def finish(self) -> None:
        """Returns when everything is appended. Raises what an append raised."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            self._traffic.add(await self._append(batch))


def _append(upload: Upload, messages: list[bytes]) -> int:
    """Payload bytes appended. A damaged frame ends it: those before it are kept, and the offset stays at them."""
    appended = 0
    for message in messages:
        frame = frames.decode(message)
        if frame.data:
            upload.append(frame.data, offset=frame.offset)
            appended += len(frame.data)
    return appended


async def _next(messages: Frames) -> bytes | None:
    """The next frame; None at the end of the stream."""
    async with _stall_limit():
        return await anext(messages, None)


@asynccontextmanager
async def _stall_limit() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(STALL_SECONDS):
            yield
    except TimeoutError as error:
        raise Unavailable(
            f"Nothing moved for {STALL_SECONDS:g} s, so the transfer was ended.", hint="It continues where it stopped."
        ) from error
