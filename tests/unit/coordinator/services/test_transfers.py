from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coordinator.services.transfers import STREAMS_PER_CALLER, WAITING_PER_TURN, TransferService
from coordinator.settings import Storage, Transfers
from protos import errors, frames
from protos.digests import digest_of
from protos.frames import FRAME_BYTES
from protos.identity import Identity, Role
from protos.tensors import MAX_HEADER_BYTES
from protos.v1 import operator_pb2, transfer_pb2
from protos.v1.manifest_pb2 import BlobRef
from tests.unit.coordinator.services.conftest import PATIENCE_SECONDS, manifest, tensor_file, upload_frames

MODEL = tensor_file(fill=0.5, elements=700_000)  # 2.8 MB: three frames
UPDATE = tensor_file(fill=0.25, elements=700_000)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[TransferService]:
    """Those of the coordinators that are started from now on, to see which streams have come."""
    made: list[TransferService] = []

    class Seen(TransferService):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            made.append(self)

    monkeypatch.setattr("coordinator.main.TransferService", Seen)
    return made


async def committed(site: Any, content: bytes) -> tuple[int, bool]:
    blob = BlobRef(digest=digest_of(content), size=len(content))
    status = await site.transfer("QueryWriteStatus", transfer_pb2.QueryWriteStatusRequest(blob=blob))
    return status.committed_size, status.sealed


async def test_a_model_is_read_whole_and_from_any_offset(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    for offset in (0, 1, FRAME_BYTES, FRAME_BYTES + 17, len(MODEL) - 1, len(MODEL)):
        assert await site.read(task.model.digest, offset=offset) == MODEL[offset:]
    with pytest.raises(errors.InvalidInput, match="beyond the end"):
        await site.read(task.model.digest, offset=len(MODEL) + 1)


async def test_one_model_is_framed_once_for_readers_that_come_together(start: Any):
    federation = await start(transfers=Transfers(frame_cache_bytes=16 << 20))
    sites = [federation.site(name) for name in ("a", "b", "c", "d")]
    first = await federation.job_with_version_0(sites[0], content=MODEL, others=tuple(sites[1:]))
    await asyncio.gather(*(site.lease() for site in sites[1:]))
    read = await asyncio.gather(*(site.read(first.model.digest) for site in sites))
    assert set(read) == {MODEL}


async def test_what_no_live_task_of_the_caller_names_is_not_found_whether_it_exists_or_not(federation: Any):
    site, other = federation.site("st-olav"), federation.site("other")
    task = await federation.job_with_version_0(site, content=MODEL, cohort={"sites": ["st-olav"]})
    update = await site.upload(task, UPDATE)
    sentences = []
    for digest in (task.model.digest, update.digest, digest_of(b"nowhere")):
        with pytest.raises(errors.NotFound) as caught:
            await other.read(digest)
        sentences.append(caught.value.message.replace(digest[:16], "X"))
        with pytest.raises(errors.NotFound):
            await federation.operator().read(digest_of(b"nowhere"))
    assert len(set(sentences)) == 1
    with pytest.raises(errors.NotFound):
        await site.read(update.digest)
    wanted = transfer_pb2.FindMissingRequest(blobs=[update])
    assert not (await site.transfer("FindMissing", wanted)).missing
    assert list((await other.transfer("FindMissing", wanted)).missing) == [update]
    assert await committed(other, UPDATE) == (0, False)


async def test_the_operator_reads_models_and_not_updates(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    update = await site.upload(task, UPDATE)
    operator = federation.operator()
    assert await operator.read(task.model.digest) == MODEL
    with pytest.raises(errors.NotFound):
        await operator.read(update.digest)


async def test_an_upload_that_was_cut_off_continues_at_the_committed_offset(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    cut = FRAME_BYTES + 1000
    partial = await site.write(upload_frames(task, UPDATE, until=cut))
    assert (partial.committed_size, partial.sealed) == (cut, False)
    assert await committed(site, UPDATE) == (cut, False)
    done = await site.write(upload_frames(task, UPDATE, offset=cut))
    assert (done.committed_size, done.sealed) == (len(UPDATE), True)
    assert await committed(site, UPDATE) == (len(UPDATE), True)
    again = await site.write(upload_frames(task, UPDATE))
    assert again.sealed


async def test_an_upload_survives_a_restart_of_the_coordinator(start: Any):
    before = await start()
    site = before.site("st-olav")
    task = await before.job_with_version_0(site, content=MODEL)
    await site.write(upload_frames(task, UPDATE, until=2 * FRAME_BYTES))
    await before.shut_down()
    after = await start()
    site = after.peer(Identity(Role.SITE, "st-olav"))
    assert await committed(site, UPDATE) == (2 * FRAME_BYTES, False)
    assert (await site.write(upload_frames(task, UPDATE, offset=2 * FRAME_BYTES))).sealed


async def test_a_wrong_offset_names_the_right_one(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    await site.write(upload_frames(task, UPDATE, until=FRAME_BYTES))
    for offset in (0, 2 * FRAME_BYTES):
        with pytest.raises(errors.WrongOffset) as caught:
            await site.write(upload_frames(task, UPDATE, offset=offset))
        assert caught.value.committed_size == FRAME_BYTES


async def test_a_damaged_frame_is_refused_and_the_offset_stays_before_it(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    messages = upload_frames(task, UPDATE)
    messages[2] = messages[2][:-1] + bytes([messages[2][-1] ^ 1])
    with pytest.raises(errors.CorruptData, match="checksum"):
        await site.write(messages)
    assert await committed(site, UPDATE) == (FRAME_BYTES, False)
    assert (await site.write(upload_frames(task, UPDATE, offset=FRAME_BYTES))).sealed


async def test_bytes_that_are_not_those_of_the_digest_are_never_sealed(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    liar = upload_frames(task, UPDATE)[:1] + upload_frames(task, bytes(len(UPDATE)))[1:]
    with pytest.raises(errors.CorruptData, match="digest"):
        await site.write(liar)
    assert await committed(site, UPDATE) == (0, False)
    longer = [*upload_frames(task, UPDATE), frames.encode(b"more", offset=len(UPDATE))]
    with pytest.raises(errors.InvalidInput, match="announced"):
        await site.write(longer)


async def test_an_upload_needs_the_current_lease_of_its_own_task(federation: Any):
    site, other = federation.site("st-olav"), federation.site("other")
    task = await federation.job_with_version_0(site, content=MODEL)
    with pytest.raises(errors.NotFound):
        await other.write(upload_frames(task, UPDATE))
    newer = await site.lease()
    assert newer.generation > task.generation
    with pytest.raises(errors.LeaseFenced):
        await site.write(upload_frames(task, UPDATE))
    assert (await site.write(upload_frames(newer, UPDATE))).sealed


async def reach(site: Any, content: bytes, *, offset: int) -> None:
    """Waits until the coordinator has kept `offset` bytes."""
    while (await committed(site, content))[0] < offset:
        await asyncio.sleep(0.02)


async def test_an_open_upload_ends_when_its_lease_is_replaced(federation: Any, monkeypatch: Any):
    monkeypatch.setattr("coordinator.services.transfers.LEASE_CHECK_FRAMES", 1)
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    messages, upload = upload_frames(task, UPDATE), site.open_write()
    upload.messages.put(messages[0])
    upload.messages.put(messages[1])
    await reach(site, UPDATE, offset=FRAME_BYTES)
    await site.lease()
    upload.messages.put(messages[2])
    with pytest.raises(errors.LeaseFenced):
        await upload.end()


async def test_an_open_upload_ends_when_its_site_is_revoked(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    messages, upload = upload_frames(task, UPDATE), site.open_write()
    upload.messages.put(messages[0])
    upload.messages.put(messages[1])
    await reach(site, UPDATE, offset=FRAME_BYTES)
    await federation.operator().operator("RevokeSite", operator_pb2.RevokeSiteRequest(name="st-olav"))
    # Also while it sends nothing.
    with pytest.raises(errors.Unauthenticated, match="revoked"):
        await asyncio.wait_for(asyncio.shield(upload.outcome), PATIENCE_SECONDS)
    upload.messages.put(None)


async def test_the_newer_of_two_writers_goes_on_and_nothing_is_mixed(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    messages, stuck = upload_frames(task, UPDATE), site.open_write()
    stuck.messages.put(messages[0])
    stuck.messages.put(messages[1])
    await reach(site, UPDATE, offset=FRAME_BYTES)
    assert (await site.write(upload_frames(task, UPDATE, offset=FRAME_BYTES))).sealed
    stuck.messages.put(messages[2])
    with pytest.raises(errors.Conflict, match="Another connection"):
        await stuck.end()


async def test_the_disk_reserve_and_the_largest_size_are_kept(start: Any):
    federation = await start(storage=Storage(reserve_bytes=0, max_blob_bytes=len(MODEL)))
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    with pytest.raises(errors.InvalidInput, match="most allowed"):
        await site.write(upload_frames(task, UPDATE + b"x"))
    await federation.shut_down()
    full = await start(storage=Storage(reserve_bytes=1 << 62))
    with pytest.raises(errors.OutOfSpace, match="no room"):
        await full.peer(Identity(Role.SITE, "st-olav")).write(upload_frames(task, UPDATE))


async def test_more_streams_than_turns_wait_and_are_all_served(start: Any):
    federation = await start(transfers=Transfers(max_transfers=1))
    sites = [federation.site(name) for name in ("a", "b", "c")]
    tasks = [await federation.job_with_version_0(sites[0], content=MODEL, others=tuple(sites[1:]))]
    tasks += [await site.lease() for site in sites[1:]]
    contents = [tensor_file(fill=fill, elements=700_000) for fill in (1, 2, 3)]
    uploads = [site.upload(task, content) for site, task, content in zip(sites, tasks, contents, strict=True)]
    downloads = [site.read(task.model.digest) for site, task in zip(sites, tasks, strict=True)]
    await asyncio.gather(*uploads)
    await asyncio.gather(*downloads)


async def test_streams_beyond_those_that_may_wait_are_told_to_come_again(start: Any, services: list[TransferService]):
    federation = await start(transfers=Transfers(max_transfers=1))
    names = [f"site-{number}" for number in range(2 + WAITING_PER_TURN)]
    sites = [federation.site(name) for name in names]
    first = await federation.job_with_version_0(sites[0], content=MODEL, others=tuple(sites[1:]))
    tasks = [first, *[await site.lease() for site in sites[1:]]]
    silent = [site.open_write() for site in sites[:-1]]
    for stream, task in zip(silent, tasks, strict=False):
        stream.messages.put(upload_frames(task, UPDATE)[0])
    while services[0]._waiting < WAITING_PER_TURN:
        await asyncio.sleep(0.02)
    with pytest.raises(errors.Unavailable, match="as many transfers as it can"):
        await sites[-1].read(tasks[-1].model.digest)
    for stream in silent:
        stream.messages.put(None)
    await asyncio.gather(*(stream.outcome for stream in silent), return_exceptions=True)
    assert await sites[-1].read(tasks[-1].model.digest) == MODEL


async def test_one_site_cannot_take_all_turns(start: Any, services: list[TransferService]):
    federation = await start()
    greedy, other = federation.site("greedy"), federation.site("other")
    task = await federation.job_with_version_0(greedy, content=MODEL, others=(other,))
    streams = [greedy.open_write() for _ in range(STREAMS_PER_CALLER)]
    # Each its own blob: a newer writer of the same one would end the older.
    for fill, stream in enumerate(streams, start=1):
        stream.messages.put(upload_frames(task, tensor_file(fill=fill, elements=700_000))[0])
    while services[0]._streams["greedy"] < STREAMS_PER_CALLER:
        await asyncio.sleep(0.02)
    with pytest.raises(errors.Unavailable):
        await greedy.read(task.model.digest)
    assert await other.read((await other.lease()).model.digest) == MODEL
    for stream in streams:
        stream.messages.put(None)
    await asyncio.gather(*(stream.outcome for stream in streams), return_exceptions=True)


async def test_an_update_far_larger_than_the_model_is_refused_before_its_bytes(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    huge = UPDATE + bytes(len(MODEL) + MAX_HEADER_BYTES)
    with pytest.raises(errors.InvalidInput, match="has at most"):
        await site.write(upload_frames(task, huge)[:1])


async def test_a_silent_stream_gives_its_turn_back_and_keeps_its_bytes(start: Any, monkeypatch: Any):
    federation = await start(transfers=Transfers(max_transfers=1))
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    first, second, third, _ = upload_frames(task, UPDATE)
    silent = site.open_write()
    silent.messages.put(first)
    silent.messages.put(second)
    await reach(site, UPDATE, offset=FRAME_BYTES)
    with monkeypatch.context() as patch:
        # So little time is given from the next frame on, when this one cannot be late any more.
        patch.setattr("coordinator.services.transfers.STALL_SECONDS", 0.3)
        silent.messages.put(third)
        with pytest.raises(errors.Unavailable, match="Nothing moved"):
            await silent.outcome
    silent.messages.put(None)
    assert await committed(site, UPDATE) == (2 * FRAME_BYTES, False)
    assert (await site.write(upload_frames(task, UPDATE, offset=2 * FRAME_BYTES))).sealed


async def test_bytes_are_counted_for_the_round(federation: Any):
    site = federation.site("st-olav")
    task = await federation.job_with_version_0(site, content=MODEL)
    await site.read(task.model.digest)
    update = await site.upload(task, UPDATE)
    await site.finish(task, manifest=manifest(update), examples=1)
    job = operator_pb2.GetJobRequest(job=task.job_id)
    rounds = (await federation.operator().operator("GetJob", job)).rounds
    assert [(one.number, one.bytes_down, one.bytes_up) for one in rounds] == [
        (0, 0, len(MODEL)),
        (1, len(MODEL), len(UPDATE)),
    ]


async def test_a_first_frame_without_a_target_is_refused(federation: Any):
    site = federation.site("st-olav")
    for messages in (
        [],
        [b"\xff"],
        [frames.encode(b"data", offset=0)],
        [frames.encode_target(transfer_pb2.UploadTarget())],
    ):
        with pytest.raises(errors.InvalidInput):
            await site.write(messages)
