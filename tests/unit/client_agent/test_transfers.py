from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from client_agent import transfers
from client_agent.bandwidth import SMALLEST_FRAME_BYTES, UNLIMITED, Pace
from client_agent.home import Home
from client_agent.session import Session, Waiting
from client_agent.transfers import BlobCache
from protos.digests import digest_of
from protos.errors import CorruptData, LeaseFenced, NotFound, Unavailable
from protos.v1.manifest_pb2 import BlobRef
from tests.unit.client_agent.coordinator_in_memory import Coordinator
from tests.unit.client_agent.work_to_do import task

MIB = 1 << 20
DATA = os.urandom(9 * MIB + 1234)
BLOB = BlobRef(digest=digest_of(DATA), size=len(DATA))


class Side:
    """The agent's side of the transfers of one test."""

    def __init__(self, home: Home, coordinator: Coordinator) -> None:
        self.home = home
        self.coordinator = coordinator
        self.cache = BlobCache(home.blobs)
        self.steps: list[tuple[int, int]] = []
        self.wire_bytes = 0
        self.generation = 1
        self.pace = UNLIMITED
        coordinator.blobs[BLOB.digest] = DATA
        coordinator.tasks = [task()]
        coordinator.leased["train-1"] = 1

    def count(self, number: int) -> None:
        self.wire_bytes += number

    async def download(self, blob: BlobRef = BLOB) -> Path:
        return await transfers.download(
            blob,
            cache=self.cache,
            open_channel=Session(self.home, waiting=Waiting()).open_channel,
            progress=lambda done, total: self.steps.append((done, total)),
            received=self.count,
            pace=self.pace,
        )

    async def upload(self, path: Path, blob: BlobRef = BLOB) -> None:
        await transfers.upload(
            path,
            blob,
            task_id="train-1",
            generation=self.generation,
            open_channel=Session(self.home, waiting=Waiting()).open_channel,
            progress=lambda done, total: self.steps.append((done, total)),
            sent=self.count,
            pace=self.pace,
        )


@pytest.fixture
def side(home: Home, coordinator: Coordinator) -> Side:
    return Side(home, coordinator)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "update.safetensors"
    path.write_bytes(DATA)
    return path


async def test_a_blob_is_downloaded_once_and_then_found_in_the_cache(side: Side, coordinator: Coordinator) -> None:
    path = await side.download()
    assert path.read_bytes() == DATA
    assert path == side.home.blobs / BLOB.digest[:2] / BLOB.digest
    assert side.steps[-1] == (len(DATA), len(DATA))
    assert await side.download() == path
    assert coordinator.reads == [0]
    assert side.wire_bytes == len(DATA)


async def test_a_cut_download_goes_on_where_it_stopped(side: Side, coordinator: Coordinator) -> None:
    coordinator.cut_read_at = 6 * MIB
    with pytest.raises(Unavailable):
        await side.download()
    path = await side.download()
    assert path.read_bytes() == DATA
    assert coordinator.reads == [0, 6 * MIB]
    assert side.wire_bytes == len(DATA)


async def test_a_damaged_frame_is_not_kept_and_what_came_before_it_is(side: Side, coordinator: Coordinator) -> None:
    coordinator.cut_read_at = 2 * MIB
    with pytest.raises(Unavailable):
        await side.download()
    coordinator.damage_next_frame = True
    with pytest.raises(CorruptData, match="frame at byte 2097152"):
        await side.download()
    assert (await side.download()).read_bytes() == DATA
    assert coordinator.reads == [0, 2 * MIB, 2 * MIB]


async def test_a_blob_with_another_digest_is_deleted(side: Side, coordinator: Coordinator) -> None:
    coordinator.blobs[BLOB.digest] = DATA[:-1] + bytes([DATA[-1] ^ 1])
    with pytest.raises(CorruptData, match="another digest"):
        await side.download()
    assert list(side.home.blobs.rglob("*.part")) == []
    coordinator.blobs[BLOB.digest] = DATA
    assert (await side.download()).read_bytes() == DATA


async def test_a_part_that_was_damaged_on_disk_is_found_at_the_end(side: Side, coordinator: Coordinator) -> None:
    part = side.cache.path(BLOB.digest).with_name(BLOB.digest + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(3 * MIB))
    with pytest.raises(CorruptData, match="another digest"):
        await side.download()
    assert (await side.download()).read_bytes() == DATA


async def test_a_part_that_is_longer_than_the_blob_is_begun_again(side: Side, coordinator: Coordinator) -> None:
    part = side.cache.path(BLOB.digest).with_name(BLOB.digest + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(DATA + b"more")
    assert (await side.download()).read_bytes() == DATA


async def test_a_blob_that_no_live_task_names_is_not_found(side: Side, coordinator: Coordinator) -> None:
    with pytest.raises(NotFound):
        await side.download(BlobRef(digest="0" * 64, size=10))


async def test_an_upload_is_sealed_and_a_repeat_sends_nothing(side: Side, coordinator: Coordinator, file: Path) -> None:
    await side.upload(file)
    assert coordinator.sealed[BLOB.digest] == DATA
    assert side.wire_bytes == len(DATA)
    await side.upload(file)
    assert coordinator.bytes_written == len(DATA)


async def test_a_cut_upload_goes_on_at_the_committed_offset(side: Side, coordinator: Coordinator, file: Path) -> None:
    coordinator.cut_write_at = 5 * MIB
    while BLOB.digest not in coordinator.sealed:
        with suppress(Unavailable):
            await side.upload(file)
    assert coordinator.sealed[BLOB.digest] == DATA
    assert coordinator.cut_write_at is None
    assert coordinator.bytes_written == len(DATA)


class Told:
    """A pace that a test looks at: what was counted, and the clock that its waits are measured by."""

    def __init__(self, mbit: float) -> None:
        self.counted: list[int] = []
        self.pace = Pace(lambda: mbit, monotonic=self._clock)

    def _clock(self) -> float:
        # So fast a clock that nothing ever waits.
        self.counted.append(0)
        return 1e6 * len(self.counted)


async def test_a_limit_sends_smaller_frames_and_arrives_whole(side: Side, coordinator: Coordinator, file: Path) -> None:
    told = Told(0.5)
    side.pace = told.pace
    await side.upload(file)
    assert coordinator.sealed[BLOB.digest] == DATA
    # Every frame but the last asked how long to wait.
    assert len(told.counted) == -(-len(DATA) // SMALLEST_FRAME_BYTES) - 1
    assert (await side.download()).read_bytes() == DATA


async def test_a_limit_holds_for_what_is_received(side: Side, coordinator: Coordinator) -> None:
    told = Told(8)
    side.pace = told.pace
    await side.download()
    assert len(told.counted) == len(DATA) // MIB


async def test_a_slow_download_outlives_the_deadline_of_its_call(
    side: Side, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STREAM_TIMEOUT_SECONDS", 3.0)
    serve = coordinator.read

    async def slow(message, context):
        async for frame in serve(message, context):
            yield frame
            if len(coordinator.reads) == 1 and coordinator.bytes_read >= MIB:
                await coordinator.until(lambda: False)

    monkeypatch.setattr(coordinator, "read", slow)
    assert (await side.download()).read_bytes() == DATA
    assert len(coordinator.reads) >= 2
    assert coordinator.reads[1] > 0


async def test_a_slow_upload_outlives_the_deadline_of_its_call(
    side: Side, coordinator: Coordinator, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STREAM_TIMEOUT_SECONDS", 3.0)
    receive = coordinator.write
    calls = 0

    async def slow(messages):
        nonlocal calls
        calls += 1
        first = calls == 1

        async def passed_on():
            async for message in messages:
                yield message
                if first and coordinator.bytes_written >= 2 * MIB:
                    await coordinator.until(lambda: False)

        return await receive(passed_on())

    monkeypatch.setattr(coordinator, "write", slow)
    await side.upload(file)
    assert coordinator.sealed[BLOB.digest] == DATA
    assert coordinator.bytes_written == len(DATA)
    assert calls >= 2


async def test_an_upload_under_a_fenced_lease_is_refused(side: Side, coordinator: Coordinator, file: Path) -> None:
    coordinator.leased["train-1"] = 2
    with pytest.raises(LeaseFenced):
        await side.upload(file)
    side.generation = 2
    await side.upload(file)
    assert coordinator.sealed[BLOB.digest] == DATA


async def test_an_empty_blob_passes(side: Side, coordinator: Coordinator, tmp_path: Path) -> None:
    empty = BlobRef(digest=digest_of(b""), size=0)
    coordinator.blobs[empty.digest] = b""
    assert (await side.download(empty)).read_bytes() == b""
    (tmp_path / "empty").touch()
    await side.upload(tmp_path / "empty", empty)
    assert coordinator.sealed[empty.digest] == b""


async def test_no_transfer_begins_or_goes_on_outside_its_hours_and_it_resumes_where_it_stopped(
    side: Side, coordinator: Coordinator, file: Path
) -> None:
    sentence = "It is outside the hours."
    shut_at = 0
    side.pace = Pace(lambda: 0.0, closed=lambda: sentence if side.wire_bytes >= shut_at else "")
    for transfer in (side.download, lambda: side.upload(file)):
        side.wire_bytes, shut_at = 0, 0
        with pytest.raises(Unavailable, match=sentence):
            await transfer()
        assert side.wire_bytes == 0
        shut_at = 3 * MIB
        with pytest.raises(Unavailable, match=sentence):
            await transfer()
        assert shut_at <= side.wire_bytes < shut_at + MIB
        shut_at = 100 * MIB
        await transfer()
    assert coordinator.reads == [0, 3 * MIB]
    assert coordinator.sealed[BLOB.digest] == DATA


async def test_a_transfer_that_stands_still_is_ended(
    side: Side, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "QUEUE_SECONDS", 0.2)

    async def never(message, context):
        await coordinator.until(lambda: False)
        yield b""

    monkeypatch.setattr(coordinator, "read", never)
    with pytest.raises(Unavailable, match="stood still"):
        await side.download()


def test_pruning_keeps_what_is_needed_and_the_newest_few(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path)
    digests = [digest_of(bytes([number])) for number in range(6)]
    for age, digest in enumerate(digests):
        cache.path(digest).parent.mkdir(exist_ok=True)
        cache.path(digest).touch()
        os.utime(cache.path(digest), (1000 - age, 1000 - age))
    cache.prune(needed={digests[5]}, keep=2)
    assert [cache.path(digest).exists() for digest in digests] == [True, True, False, False, False, True]
