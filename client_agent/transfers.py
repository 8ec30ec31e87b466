"""Blobs in both directions, resumable at any byte, in memory that does not grow with the blob.

One channel for each transfer, grpc.aio with raw frames: the fastest arrangement of Python's gRPC that was measured.
Disk, digests and checksums run in a thread, one batch of frames ahead of the network, so that heartbeats never wait
for them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import grpc
from blake3 import blake3

from client_agent import rpc
from client_agent.bandwidth import UNLIMITED, Pace
from client_agent.hashing import hash_file
from client_agent.taskdir import full_disk_waits, sync_directory
from protos import frames
from protos.digests import check_digest
from protos.errors import CorruptData, NotFound, SilotuneError, Unavailable, WrongOffset
from protos.v1 import transfer_pb2, transfer_pb2_grpc
from protos.v1.manifest_pb2 import BlobRef

BATCH_FRAMES = 4
# No frame for so long: the call is dropped and resumed.
STALL_SECONDS = 60.0
# The coordinator serves a bounded number of transfers at a time; the first frame may wait for its turn.
QUEUE_SECONDS = 300.0
# A call that is still moving at its deadline is resumed by the next.
STREAM_TIMEOUT_SECONDS = 900.0
# Sealing an upload lets the coordinator flush it to its disk.
SEAL_SECONDS = 300.0
CORRUPT_ATTEMPTS = 3
KEPT_BLOBS = 2

# A channel for one attempt, closed when it ends.
OpenChannel = Callable[[], AbstractAsyncContextManager[grpc.aio.Channel]]
# Called with the bytes that are there and the bytes in all.
Progress = Callable[[int, int], None]


class BlobCache:
    """Verified blobs of this site, `<first two digits>/<digest>`; a `.part` beside it is a download in progress."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, digest: str) -> Path:
        return self._directory / check_digest(digest)[:2] / digest

    def prune(self, *, needed: set[str], keep: int = KEPT_BLOBS) -> None:
        """Deletes all but the `needed` blobs and the newest few others; a retried round asks for an old one again."""
        others = [path for path in self._directory.glob("??/*") if path.name.removesuffix(".part") not in needed]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[keep:]:
            path.unlink(missing_ok=True)


async def download(
    blob: BlobRef,
    *,
    cache: BlobCache,
    open_channel: OpenChannel,
    progress: Progress,
    received: Callable[[int], None],
    pace: Pace = UNLIMITED,
) -> Path:
    """The verified blob's path; its bytes come from the coordinator where they are not here yet.

    One attempt: Unavailable when the connection is lost or the hours for transfers are over; the next goes on where it
    stopped.
    CorruptData: the whole does not have its digest; it was deleted. `received` counts bytes off the wire.
    """
    path = cache.path(blob.digest)
    if path.exists():
        os.utime(path)
        progress(blob.size, blob.size)
        return path
    pace.check_open()
    part = path.with_name(path.name + ".part")
    with full_disk_waits():
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            hasher = await asyncio.to_thread(_hash_existing, part, blob.size)
            offset = part.stat().st_size
            while offset < blob.size:
                async with open_channel() as channel:
                    offset = await _receive(
                        channel, blob, file, hasher, offset=offset, progress=progress, received=received, pace=pace
                    )
            await asyncio.to_thread(os.fsync, file.fileno())
        if hasher.hexdigest() != blob.digest:
            part.unlink()
            raise CorruptData(f"Blob {blob.digest[:12]} arrived with another digest; it was deleted here.")
        part.rename(path)
        sync_directory(path.parent)
    return path


def _hash_existing(part: Path, size: int) -> blake3:
    """The digest so far; a part that is longer than the blob is emptied first."""
    if part.stat().st_size > size:
        os.truncate(part, 0)
    return hash_file(part)


async def _receive(
    channel: grpc.aio.Channel,
    blob: BlobRef,
    file: BinaryIO,
    hasher: blake3,
    *,
    offset: int,
    progress: Progress,
    received: Callable[[int], None],
    pace: Pace,
) -> int:
    """Where the next call goes on: at the blob's end, or where this one was when its time was over."""
    read: Any = channel.unary_stream(
        "/silotune.v1.TransferService/Read",
        request_serializer=transfer_pb2.ReadRequest.SerializeToString,
        response_deserializer=None,
    )

    def store(batch: list[memoryview]) -> None:
        for data in batch:
            hasher.update(data)
        file.writelines(batch)

    batch: list[memoryview] = []
    writing: asyncio.Future[None] | None = None
    began_at = offset
    call = read(transfer_pb2.ReadRequest(digest=blob.digest, offset=offset), timeout=STREAM_TIMEOUT_SECONDS)
    try:
        async with _stall_guard() as moved:
            moved(QUEUE_SECONDS)
            async for message in call:
                moved()
                frame = frames.decode(message)
                if frame.offset != offset or offset + len(frame.data) > blob.size:
                    raise CorruptData(f"A frame for byte {frame.offset} came where byte {offset} was expected.")
                batch.append(frame.data)
                offset += len(frame.data)
                received(len(frame.data))
                if len(batch) == BATCH_FRAMES:
                    if writing is not None:
                        await writing
                    writing = asyncio.ensure_future(asyncio.to_thread(store, batch))
                    batch = []
                    progress(offset, blob.size)
                if offset < blob.size:
                    await _keep_pace(pace, len(frame.data), moved=moved)
        if offset != blob.size:
            raise CorruptData(f"Blob {blob.digest[:12]} ended at byte {offset} of {blob.size}.")
    except grpc.aio.AioRpcError as error:
        if not _is_time_over(error) or offset == began_at:
            raise rpc.from_rpc_error(error) from error
    finally:
        call.cancel()
        # What arrived stays, also when the rest did not: the next attempt goes on from there.
        if writing is not None:
            await writing
        await asyncio.to_thread(store, batch)
        file.flush()
    progress(offset, blob.size)
    return offset


async def upload(
    path: Path,
    blob: BlobRef,
    *,
    task_id: str,
    generation: int,
    open_channel: OpenChannel,
    progress: Progress,
    sent: Callable[[int], None],
    pace: Pace = UNLIMITED,
) -> None:
    """Sends the file's bytes from the offset that the coordinator has; returns when the upload is sealed.

    One attempt: Unavailable when the connection is lost or the hours for transfers are over; the next goes on at the
    committed offset.
    LeaseFenced: a newer grant of the task exists; its generation must be used. `sent` counts bytes on the wire.
    """
    pace.check_open()
    async with open_channel() as channel:
        stub = transfer_pb2_grpc.TransferServiceStub(channel)
        missing = await rpc.call(stub.FindMissing, transfer_pb2.FindMissingRequest(blobs=[blob]))
        if not missing.missing:
            progress(blob.size, blob.size)
            return
        target = transfer_pb2.UploadTarget(task_id=task_id, generation=generation, blob=blob)
        failure: SilotuneError = Unavailable("The upload made no headway.")
        attempts, kept = 0, 0
        while attempts < CORRUPT_ATTEMPTS:
            try:
                status = await rpc.call(stub.QueryWriteStatus, transfer_pb2.QueryWriteStatusRequest(blob=blob))
            except NotFound:
                status = transfer_pb2.QueryWriteStatusResponse()
            if status.sealed:
                break
            # An attempt that brought the upload forward was a good one, however it ended.
            attempts = attempts + 1 if status.committed_size <= kept else 1
            kept = status.committed_size
            try:
                answer = await _send(channel, path, target, offset=kept, progress=progress, sent=sent, pace=pace)
                if answer is None:
                    answer = await _hear_why(channel, target)
            except (WrongOffset, CorruptData) as error:
                failure = error
                continue
            if answer.sealed:
                break
            failure = Unavailable(f"The upload ended early, at byte {answer.committed_size} of {blob.size}.")
        else:
            raise failure
    progress(blob.size, blob.size)


def _write_call(channel: grpc.aio.Channel) -> Any:
    write: Any = channel.stream_unary(
        "/silotune.v1.TransferService/Write",
        request_serializer=None,
        response_deserializer=transfer_pb2.WriteResponse.FromString,
    )
    return write(None, timeout=STREAM_TIMEOUT_SECONDS)


async def _send(
    channel: grpc.aio.Channel,
    path: Path,
    target: transfer_pb2.UploadTarget,
    *,
    offset: int,
    progress: Progress,
    sent: Callable[[int], None],
    pace: Pace,
) -> transfer_pb2.WriteResponse | None:
    """The coordinator's answer; None when it ended the call early and its reason was lost (`_hear_why`)."""
    began_at = offset
    call = _write_call(channel)
    try:
        async with _stall_guard() as moved:
            try:
                moved(QUEUE_SECONDS)
                await call.write(frames.encode_target(target))
                with path.open("rb") as file:
                    file.seek(offset)
                    ahead = asyncio.ensure_future(asyncio.to_thread(_encoded, file, pace.frame_bytes()))
                    try:
                        while batch := await ahead:
                            ahead = asyncio.ensure_future(asyncio.to_thread(_encoded, file, pace.frame_bytes()))
                            for message, length in batch:
                                await call.write(message)
                                moved()
                                offset += length
                                sent(length)
                                if offset < target.blob.size:
                                    await _keep_pace(pace, length, moved=moved)
                            progress(offset, target.blob.size)
                    finally:
                        await asyncio.wait({ahead})
                await call.done_writing()
            except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                pass  # The call ended early; what its own status says counts, and that is asked for next.
            moved(SEAL_SECONDS)
            return await call
    except grpc.aio.AioRpcError as error:
        # A write that fails while the coordinator's refusal arrives overwrites that refusal in grpc.aio.
        if error.code() is grpc.StatusCode.INTERNAL and not error.trailing_metadata():
            return None
        if _is_time_over(error) and offset > began_at:
            return transfer_pb2.WriteResponse(committed_size=offset)
        raise rpc.from_rpc_error(error) from error
    finally:
        call.cancel()


async def _hear_why(channel: grpc.aio.Channel, target: transfer_pb2.UploadTarget) -> transfer_pb2.WriteResponse:
    """Opens the upload and sends nothing: the coordinator refuses it as before, with no write to get in the way."""
    call = _write_call(channel)
    try:
        async with asyncio.timeout(QUEUE_SECONDS):
            await call.write(frames.encode_target(target))
            await call.done_writing()
            return await call
    except grpc.aio.AioRpcError as error:
        raise rpc.from_rpc_error(error) from error
    except (TimeoutError, asyncio.InvalidStateError):
        raise Unavailable("The coordinator ended an upload and does not say why.") from None
    finally:
        call.cancel()


def _is_time_over(error: grpc.aio.AioRpcError) -> bool:
    """The call has had its STREAM_TIMEOUT_SECONDS; one that was moving is simply gone on with."""
    return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def _keep_pace(pace: Pace, count: int, *, moved: Callable[..., None]) -> None:
    pace.check_open()
    pause_seconds = pace.take(count)
    if pause_seconds:
        moved(STALL_SECONDS + pause_seconds)
        await asyncio.sleep(pause_seconds)


def _encoded(file: BinaryIO, frame_bytes: int) -> list[tuple[bytes, int]]:
    """The next frames of the file, ready for the wire, each with the number of its data bytes."""
    batch = []
    for _ in range(BATCH_FRAMES):
        offset = file.tell()
        data = file.read(frame_bytes)
        if not data:
            break
        batch.append((frames.encode(data, offset=offset), len(data)))
    return batch


@asynccontextmanager
async def _stall_guard() -> AsyncIterator[Callable[..., None]]:
    """Unavailable when nothing has moved for STALL_SECONDS; what it yields is called whenever something did."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(STALL_SECONDS) as limit:

            def moved(grace_seconds: float = STALL_SECONDS) -> None:
                limit.reschedule(loop.time() + grace_seconds)

            yield moved
    except TimeoutError:
        raise Unavailable("The transfer stood still: no byte moved in time.") from None
