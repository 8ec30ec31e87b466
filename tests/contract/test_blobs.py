"""What every blob store promises, on each that there is: files, and a bucket of an S3 server (tests/servers/s3.py)."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.storage.blobs import BlobStore
from coordinator.storage.bucket import Bucket
from coordinator.storage.file_blobs import FileBlobStore
from coordinator.storage.s3 import PART_BYTES, S3BlobStore
from protos.digests import digest_of
from protos.errors import Conflict, CorruptData, InvalidInput, NotFound, OutOfSpace, Unavailable, WrongOffset
from tests.servers.s3 import S3Server, s3

Reopen = Callable[..., BlobStore]
# Not a single part of an upload to S3.
CONTENT = os.urandom(PART_BYTES + 300_000)
DIGEST = digest_of(CONTENT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3(tmp_path_factory.mktemp("s3")) as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        started.bucket("silotune-contract")
        yield started


@pytest.fixture(params=["files", "s3"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Reopen:
    """Opens the same store as a new process would; nothing is carried over in memory."""
    if request.param == "files":
        return lambda *, reserve_bytes=0: FileBlobStore(tmp_path / "blobs", reserve_bytes=reserve_bytes)
    url = request.getfixturevalue("server").url
    # It holds connections and nothing else.
    bucket = Bucket("silotune-contract", prefix=str(uuid.uuid4()), endpoint_url=url)

    def open_again(*, reserve_bytes: int = 0) -> BlobStore:
        return S3BlobStore(bucket, directory=tmp_path / "cache", reserve_bytes=reserve_bytes, cache_bytes=1 << 30)

    return open_again


def put(store: BlobStore, content: bytes, *, owner: str = "st-olav") -> str:
    upload = store.open_upload(owner, digest_of(content), size=len(content))
    upload.append(content[upload.offset :], offset=upload.offset)
    upload.seal()
    upload.close()
    store.forget_upload(owner, digest_of(content))
    return digest_of(content)


def test_a_sealed_blob_is_read_from_any_offset(reopen: Reopen):
    store = reopen()
    assert store.size(DIGEST) is None
    put(store, CONTENT)
    for again in (store, reopen()):
        assert again.size(DIGEST) == len(CONTENT)
        assert again.path(DIGEST).read_bytes() == CONTENT
        for offset, length in ((0, 10), (12_345, 1000), (len(CONTENT) - 5, 100), (len(CONTENT), 10)):
            assert again.read(DIGEST, offset=offset, length=length) == CONTENT[offset : offset + length]


def test_an_upload_goes_on_at_any_byte_after_its_writer_was_killed(reopen: Reopen):
    for cut in (0, 131_073, PART_BYTES, len(CONTENT)):
        content = bytes([cut % 251]) + CONTENT
        digest = digest_of(content)
        reopen().open_upload("st-olav", digest, size=len(content)).append(content[:cut], offset=0)
        store = reopen()
        assert store.committed_size("st-olav", digest) == cut
        upload = store.open_upload("st-olav", digest, size=len(content))
        assert upload.offset == cut
        upload.append(content[cut:], offset=cut)
        upload.seal()
        assert store.path(digest).read_bytes() == content


def test_a_writer_killed_between_seal_and_record_finds_its_upload_complete(reopen: Reopen):
    upload = reopen().open_upload("st-olav", DIGEST, size=len(CONTENT))
    upload.append(CONTENT, offset=0)
    upload.seal()
    store = reopen()
    assert store.committed_size("st-olav", DIGEST) == len(CONTENT)
    assert store.committed_size("other", DIGEST) == 0
    again = store.open_upload("st-olav", DIGEST, size=len(CONTENT))
    assert again.offset == len(CONTENT)
    again.seal()
    again.close()
    store.forget_upload("st-olav", DIGEST)
    assert store.committed_size("st-olav", DIGEST) == 0
    assert store.size(DIGEST) == len(CONTENT)


def test_an_upload_that_was_sealed_and_never_named_is_made_again_after_the_blob_was_deleted(reopen: Reopen):
    upload = reopen().open_upload("st-olav", DIGEST, size=len(CONTENT))
    upload.append(CONTENT, offset=0)
    upload.seal()
    store = reopen()
    store.delete(DIGEST)
    put(store, CONTENT)
    assert store.size(DIGEST) == len(CONTENT)


def test_an_append_anywhere_but_at_the_end_names_the_end(reopen: Reopen):
    upload = reopen().open_upload("st-olav", DIGEST, size=len(CONTENT))
    upload.append(CONTENT[:100], offset=0)
    for offset in (0, 99, 101):
        with pytest.raises(WrongOffset) as caught:
            upload.append(b"x", offset=offset)
        assert caught.value.committed_size == 100
    upload.append(CONTENT[100:], offset=100)
    with pytest.raises(InvalidInput, match="more than"):
        upload.append(b"x", offset=len(CONTENT))
    upload.seal()


@pytest.mark.parametrize("content", [CONTENT[:-1], b"\x00" + CONTENT[1:]])
def test_wrong_bytes_are_not_sealed_and_the_next_writer_begins_anew(reopen: Reopen, content: bytes):
    store = reopen()
    upload = store.open_upload("st-olav", DIGEST, size=len(CONTENT))
    upload.append(content, offset=0)
    with pytest.raises(CorruptData):
        upload.seal()
    assert store.size(DIGEST) is None
    assert store.committed_size("st-olav", DIGEST) == 0
    put(store, CONTENT)


def test_bytes_damaged_at_rest_between_two_writers_are_noticed(reopen: Reopen, tmp_path: Path):
    upload = reopen().open_upload("st-olav", DIGEST, size=len(CONTENT))
    upload.append(CONTENT[:1000], offset=0)
    upload.close()
    (part,) = tmp_path.rglob("*.part")
    with part.open("r+b") as file:
        file.write(b"damage")
    again = reopen().open_upload("st-olav", DIGEST, size=len(CONTENT))
    again.append(CONTENT[1000:], offset=1000)
    with pytest.raises(CorruptData):
        again.seal()


def test_the_newest_writer_wins_and_the_older_one_can_do_nothing(reopen: Reopen):
    store = reopen()
    older = store.open_upload("st-olav", DIGEST, size=len(CONTENT))
    older.append(CONTENT[:100], offset=0)
    newer = store.open_upload("st-olav", DIGEST, size=len(CONTENT))
    assert newer.offset == 100
    for attempt in (lambda: older.append(CONTENT[100:], offset=100), older.seal):
        with pytest.raises(Conflict):
            attempt()
    older.close()
    newer.append(CONTENT[100:], offset=100)
    newer.seal()


def test_many_writers_at_once_never_mix_their_bytes(reopen: Reopen):
    store = reopen()
    sealed = []

    def write() -> None:
        while not sealed:
            try:
                upload = store.open_upload("st-olav", DIGEST, size=len(CONTENT))
                while upload.offset < len(CONTENT):
                    upload.append(CONTENT[upload.offset : upload.offset + 100_000], offset=upload.offset)
                upload.seal()
                sealed.append(True)
            except (Conflict, WrongOffset, Unavailable):
                continue

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert store.path(DIGEST).read_bytes() == CONTENT


def test_two_owners_of_the_same_bytes_do_not_meet(reopen: Reopen):
    store = reopen()
    put(store, CONTENT, owner="st-olav")
    assert store.committed_size("other", DIGEST) == 0
    upload = store.open_upload("other", DIGEST, size=len(CONTENT))
    assert upload.offset == 0
    upload.append(CONTENT, offset=0)
    upload.seal()
    assert store.path(DIGEST).read_bytes() == CONTENT


def test_nothing_is_written_into_the_reserve_and_it_goes_on_when_there_is_room(reopen: Reopen):
    with pytest.raises(OutOfSpace):
        reopen(reserve_bytes=1 << 62).open_upload("st-olav", DIGEST, size=len(CONTENT))
    room = reopen().spare_bytes()
    upload = reopen(reserve_bytes=room // 2).open_upload("st-olav", DIGEST, size=len(CONTENT))
    upload.append(CONTENT[:10], offset=0)
    with pytest.raises(OutOfSpace):
        reopen(reserve_bytes=room // 2).open_upload("st-olav", digest_of(b"large"), size=room)
    store = reopen()
    assert store.committed_size("st-olav", DIGEST) == 10
    put(store, CONTENT)


def test_what_was_promised_to_open_uploads_is_not_promised_again(reopen: Reopen):
    store = reopen()
    most = store.spare_bytes() * 2 // 3
    first = store.open_upload("a", digest_of(b"1"), size=most)
    with pytest.raises(OutOfSpace):
        store.open_upload("b", digest_of(b"2"), size=most)
    first.close()
    store.open_upload("b", digest_of(b"2"), size=most).close()


def test_a_local_file_is_adopted_under_its_digest(reopen: Reopen, tmp_path: Path):
    store = reopen()
    made = tmp_path / "aggregate"
    made.write_bytes(CONTENT)
    assert store.adopt(made) == (DIGEST, len(CONTENT))
    assert not made.exists()
    made.write_bytes(CONTENT)
    assert store.adopt(made) == (DIGEST, len(CONTENT))
    assert store.path(DIGEST).read_bytes() == CONTENT


def test_what_is_deleted_is_gone_and_deleting_twice_is_fine(reopen: Reopen):
    store = reopen()
    put(store, CONTENT)
    store.delete(DIGEST)
    store.delete(DIGEST)
    assert store.size(DIGEST) is None
    for access in (lambda: store.read(DIGEST, offset=0, length=1), lambda: store.path(DIGEST)):
        with pytest.raises(NotFound):
            access()


def test_an_empty_blob_is_a_blob(reopen: Reopen):
    store = reopen()
    assert store.size(put(store, b"")) == 0


@pytest.mark.parametrize("name", ["../x", "", "a/b", "A", "x\0"])
def test_owners_and_digests_cannot_leave_the_directory(reopen: Reopen, name: str):
    store = reopen()
    with pytest.raises(InvalidInput):
        store.open_upload(name, DIGEST, size=1)
    with pytest.raises(InvalidInput):
        store.size(name)


def test_a_full_disk_stops_an_upload_and_what_was_written_counts(reopen: Reopen, monkeypatch: pytest.MonkeyPatch):
    store = reopen()
    upload = store.open_upload("st-olav", DIGEST, size=len(CONTENT))
    real = os.pwrite

    def nearly_full(handle: int, data: memoryview, offset: int) -> int:
        if offset >= 1000:
            raise OSError(28, "No space left on device")
        return real(handle, data[: 1000 - offset], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", nearly_full)
        with pytest.raises(OutOfSpace, match="No space"):
            upload.append(CONTENT, offset=0)
    again = store.open_upload("st-olav", DIGEST, size=len(CONTENT))
    assert again.offset == 1000
    again.append(CONTENT[1000:], offset=1000)
    again.seal()


def test_what_is_kept_can_be_listed_and_dropped(reopen: Reopen):
    store = reopen()
    assert [*store.stored(), *store.unfinished()] == []
    put(store, CONTENT)
    store.open_upload("st-olav", digest_of(b"begun"), size=5).append(b"beg", offset=0)
    sealed = store.open_upload("other", digest_of(b"sealed"), size=6)
    sealed.append(b"sealed", offset=0)
    sealed.seal()
    again = reopen()
    assert {(blob.digest, blob.size) for blob in again.stored()} == {(DIGEST, len(CONTENT)), (digest_of(b"sealed"), 6)}
    kept = list(again.unfinished())
    assert {(part.owner, part.digest) for part in kept} == {
        ("st-olav", digest_of(b"begun")),
        ("other", digest_of(b"sealed")),
    }
    # By another machine's clock it may even be in the future, but not by hours.
    assert all(abs(each.age_seconds) < 3600 for each in (*kept, *again.stored()))
    for part in kept:
        again.drop_unfinished(part.owner, part.digest)
        again.drop_unfinished(part.owner, part.digest)
    assert list(again.unfinished()) == []
    assert again.committed_size("st-olav", digest_of(b"begun")) == 0
    assert again.size(digest_of(b"sealed")) == 6


def test_a_store_says_which_one_it_is_and_that_it_works(reopen: Reopen):
    store = reopen()
    assert store.check() == ""
    assert store.location == reopen().location != ""


def test_a_local_copy_stays_while_it_is_used(reopen: Reopen):
    store = reopen()
    put(store, CONTENT)
    with store.local(DIGEST) as path:
        assert path.read_bytes() == CONTENT
    store.verify(DIGEST)
    with pytest.raises(NotFound):
        store.verify(digest_of(b"none"))
    with pytest.raises(NotFound), store.local(digest_of(b"none")):
        pass
