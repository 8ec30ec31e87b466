"""Ready-made frames of served blobs: one model is read and framed once for all sites that fetch it at the same time.

Readers of one round start together and stay close to each other, so a cache much smaller than the model serves most of
them. Its budget, and not the number of readers or the size of the model, bounds the memory.

Frames are made of bytes that were compared with the digest, and are forgotten when a reader found another: what was
once wrong is never served for good.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from coordinator.storage.blobs import BlobStore
from protos import frames
from protos.errors import CorruptData, Unavailable


class FrameCache:
    """Least recently used frames by (digest, offset), for one event loop; disk reads and checksums run in `disk`."""

    def __init__(self, blobs: BlobStore, *, disk: Executor, budget_bytes: int) -> None:
        self._blobs = blobs
        self._disk = disk
        self._budget_bytes = budget_bytes
        self._held_bytes = 0
        self._frames: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._running: dict[Any, asyncio.Future[Any]] = {}

    @asynccontextmanager
    async def reading(self, digest: str, *, again: bool) -> AsyncIterator[None]:
        """Until the block ends the blob is a file here; from S3 it is copied first, once for all who wait for it.

        `again`: the reader has had all of it and wants it once more, so what it had may have been wrong. NotFound.
        """
        with self._blobs.in_use(digest):
            look = self._blobs.verify if again else self._blobs.path
            try:
                await self._once((digest, again), partial(look, digest))
            except CorruptData as error:
                raise Unavailable(
                    error.message, hint="The operator has to restore it from a backup; then it goes on by itself."
                ) from error
            if again:
                self._forget(digest)
            yield

    async def frame(self, digest: str, *, offset: int) -> bytes:
        """The encoded frame that begins at `offset` and ends at the next multiple of FRAME_BYTES, or at the end."""
        key = (digest, offset)
        held = self._frames.get(key)
        if held is not None:
            self._frames.move_to_end(key)
            return held
        frame: bytes = await self._once(("frame", key), partial(self._load, digest, offset))
        if key not in self._frames:
            self._keep(key, frame)
        return frame

    async def _once(self, key: object, work: Callable[[], Any]) -> Any:
        """Who wants the same at the same time waits for the same thread."""
        running = self._running.get(key)
        if running is None:
            running = asyncio.get_running_loop().run_in_executor(self._disk, work)
            self._running[key] = running
            running.add_done_callback(lambda _: self._running.pop(key))
        # A reader that goes away must not take it from the others.
        return await asyncio.shield(running)

    def _load(self, digest: str, offset: int) -> bytes:
        length = frames.FRAME_BYTES - offset % frames.FRAME_BYTES
        return frames.encode(self._blobs.read(digest, offset=offset, length=length), offset=offset)

    def _keep(self, key: tuple[str, int], frame: bytes) -> None:
        self._frames[key] = frame
        self._held_bytes += len(frame)
        while self._held_bytes > self._budget_bytes:
            _, dropped = self._frames.popitem(last=False)
            self._held_bytes -= len(dropped)

    def _forget(self, digest: str) -> None:
        for key in [key for key in self._frames if key[0] == digest]:
            self._held_bytes -= len(self._frames.pop(key))
