from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.frames import FrameCache
from protos import frames
from protos.errors import NotFound
from protos.frames import FRAME_BYTES

CONTENT = os.urandom(3 * FRAME_BYTES + 5)


class CountingStore(FileBlobStore):
    """The real store, which also counts its reads and can hold them up."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, reserve_bytes=0)
        self.reads = 0
        self.gate = threading.Event()
        self.gate.set()

    def read(self, digest: str, *, offset: int, length: int) -> bytes:
        self.gate.wait(10)
        self.reads += 1
        return super().read(digest, offset=offset, length=length)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    return CountingStore(tmp_path)


@pytest.fixture
def digest(store: CountingStore, tmp_path: Path) -> str:
    (tmp_path / "made").write_bytes(CONTENT)
    return store.adopt(tmp_path / "made")[0]


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


async def test_frames_end_at_multiples_of_their_size_and_hold_the_blob(store, digest, disk):
    cache = FrameCache(store, disk=disk, budget_bytes=16 << 20)
    for offset in (0, 7, FRAME_BYTES, 3 * FRAME_BYTES, 3 * FRAME_BYTES + 4):
        frame = frames.decode(await cache.frame(digest, offset=offset))
        end = min(len(CONTENT), (offset // FRAME_BYTES + 1) * FRAME_BYTES)
        assert (frame.offset, bytes(frame.data)) == (offset, CONTENT[offset:end])


async def test_readers_at_the_same_place_share_one_reading_even_when_the_first_goes_away(store, digest, disk):
    cache = FrameCache(store, disk=disk, budget_bytes=16 << 20)
    store.gate.clear()
    readers = [asyncio.create_task(cache.frame(digest, offset=0)) for _ in range(5)]
    await asyncio.sleep(0.05)
    readers[0].cancel()
    store.gate.set()
    assert len({id(await reader) for reader in readers[1:]}) == 1
    await cache.frame(digest, offset=0)
    assert store.reads == 1


async def test_the_least_recently_used_frame_goes_when_the_budget_is_full(store, digest, disk):
    cache = FrameCache(store, disk=disk, budget_bytes=2 * FRAME_BYTES + 1000)
    for offset in (0, FRAME_BYTES, 0, 2 * FRAME_BYTES):
        await cache.frame(digest, offset=offset)
    assert store.reads == 3
    await cache.frame(digest, offset=0)
    assert store.reads == 3
    await cache.frame(digest, offset=FRAME_BYTES)
    assert store.reads == 4


async def test_without_a_budget_every_frame_is_still_served(store, digest, disk):
    cache = FrameCache(store, disk=disk, budget_bytes=0)
    for _ in range(2):
        assert frames.decode(await cache.frame(digest, offset=0)).data == CONTENT[:FRAME_BYTES]


async def test_a_failed_reading_is_not_remembered(store, digest, disk):
    cache = FrameCache(store, disk=disk, budget_bytes=1 << 20)
    held = store.path(digest).read_bytes()
    store.delete(digest)
    with pytest.raises(NotFound):
        await cache.frame(digest, offset=0)
    (store._blobs / digest[:2] / digest).write_bytes(held)
    assert frames.decode(await cache.frame(digest, offset=0)).offset == 0
