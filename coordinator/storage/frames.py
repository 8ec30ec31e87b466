"""Ready-made frames of served blobs: one model is read and framed once for all sites that fetch it at the same time.

Readers of one round start together and stay close to each other, so a cache much smaller than the model serves most of
them. Its budget, and not the number of readers or the size of the model, bounds the memory.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from concurrent.futures import Executor

from coordinator.storage.blobs import BlobStore
from protos import frames


class FrameCache:
    """Least recently used frames by (digest, offset), for one event loop; disk reads and checksums run in `disk`."""

    def __init__(self, blobs: BlobStore, *, disk: Executor, budget_bytes: int) -> None:
        self._blobs = blobs
        self._disk = disk
        self._budget_bytes = budget_bytes
        self._held_bytes = 0
        self._frames: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._loading: dict[tuple[str, int], asyncio.Future[bytes]] = {}

    async def frame(self, digest: str, *, offset: int) -> bytes:
        """The encoded frame that begins at `offset` and ends at the next multiple of FRAME_BYTES, or at the end."""
        key = (digest, offset)
        held = self._frames.get(key)
        if held is not None:
            self._frames.move_to_end(key)
            return held
        loading = self._loading.get(key)
        if loading is None:
            loading = asyncio.get_running_loop().run_in_executor(self._disk, self._load, digest, offset)
            self._loading[key] = loading
            loading.add_done_callback(lambda done: self._loaded(key, done))
        # A reader that goes away must not take the frame from the others that wait for it.
        return await asyncio.shield(loading)

    def _load(self, digest: str, offset: int) -> bytes:
        length = frames.FRAME_BYTES - offset % frames.FRAME_BYTES
        return frames.encode(self._blobs.read(digest, offset=offset, length=length), offset=offset)

    def _loaded(self, key: tuple[str, int], done: asyncio.Future[bytes]) -> None:
        del self._loading[key]
        if done.cancelled() or done.exception() is not None:
            return
        self._frames[key] = done.result()
        self._held_bytes += len(done.result())
        while self._held_bytes > self._budget_bytes:
            _, dropped = self._frames.popitem(last=False)
            self._held_bytes -= len(dropped)
